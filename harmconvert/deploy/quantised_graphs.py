"""Quantise a graph to 8 bits on calibration inputs, and keep in floating point the layers that this harms most.

ONNX Runtime's quantiser makes the graph, for ONNX Runtime and for OpenVINO. What it does not do is done here: weights
are rounded with feedback and biases are corrected first (`int8`), and the result is compared with the network on inputs
that are held back.
"""

from __future__ import annotations

import ast
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import Batch, CalibrationContext, CalibrationSettings
from ..errors import InputError, UsageError, counted, first_line
from .int8 import layers_by_harm, prepared, sums_overflow, with_layers_of
from .runtimes import Target, arrays_of

# Operators whose weights may stay in floating point.
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that the runtimes run in float32 even if their input has 8 bits.
_IN_FLOAT = (
    "BatchNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "GroupNormalization",
    "Softmax",
    "LogSoftmax",
)
_UNROUND = "DequantizeLinear"
# After the number of layers in floating point has been doubled often enough, it is halved at most so often.
_MOST_HALVINGS = 3

Make = Callable[[nn.Module], bytes]


@dataclass(frozen=True)
class HeldBack:
    """How a file in low precision differs from the network, on inputs that were held back.

    ``inputs``: their number. ``agreement``: share with the same top-1 (None: the outputs are not logits).
    ``divergence``: as for a calibration. ``drop``: the loss in %: inputs with another top-1, or else the squared
    difference of the outputs relative to their squares. ``float_layers``: layers that stay in floating point.
    ``notes``: how the file was made.
    """

    inputs: int
    agreement: float | None
    divergence: float
    drop: float
    float_layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantised:
    """A graph in 8 bits, and how it differs from the network."""

    content: bytes
    held_back: HeldBack


def calibration_context(network: nn.Module, batches: Iterable[Any], inputs: int) -> CalibrationContext:
    """Read calibration inputs, of which every fourth is held back.

    Raises:
        UsageError: there are too few inputs to hold one back, or the network does not run on them.
        InputError: there are no inputs, or one has NaN.
    """
    context = CalibrationContext.of(network, batches, CalibrationSettings(inputs=inputs))
    if context.data.fit_total == context.data.total:
        raise UsageError(f"low precision is checked on inputs that are held back, but {context.data.why_nothing_held}")
    return context


def measured(context: CalibrationContext, run: nn.Module, float_layers: Collection[str] = ()) -> HeldBack:
    """Compare a network in a runtime with the original on the inputs that are held back.

    Raises:
        InputError: the outputs cannot be compared.
    """
    divergence, why = context.compare(run)
    if divergence is None:
        raise InputError(f"the outputs of the exported file cannot be compared with those of the network: {why}")
    agreement = context.compare.agreement
    drop = round(100 * (divergence if agreement is None else 1 - agreement), 6)  # 1 - 0.99 is a little over 0.01
    held = context.data.total - context.data.fit_total
    return HeldBack(held, agreement, divergence, drop, tuple(float_layers))


def quantise_within(
    network: nn.Module,
    make: Make,
    target: Target,
    context: CalibrationContext,
    max_drop: float,
    progress: Callable[[str], None],
) -> tuple[Quantised, bool]:
    """Quantise a network to 8 bits; move layers back to floating point until the loss is at most ``max_drop``.

    Args:
        network: the dense or factored form.
        make: exports a network as a graph in float32.
        max_drop: in %, see `HeldBack`.

    Returns:
        The graph, and whether the loss is small enough; if not, it is the best of all attempts.
    """
    notes = ("weights have 7 bits, because this processor has no VNNI",) if sums_overflow() else ()
    progress("rounding weights with feedback, and correcting biases")
    better = prepared(network, context)

    def attempt(source: nn.Module, float_layers: Sequence[str]) -> Quantised:
        kept = f", {counted(len(float_layers), 'layer')} in floating point" if float_layers else ""
        progress(f"quantising to 8 bits{kept}")
        graph = make(with_layers_of(source, network, float_layers))
        content = to_int8(graph, context.data.fit, target.runtime, float_layers)
        return Quantised(content, replace(measured(context, target.open(content), float_layers), notes=notes))

    first = [(source, attempt(source, ())) for source in (better, network)]
    source, best = min(first, key=lambda one: (one[1].held_back.drop, one[1].held_back.divergence))
    if best.held_back.drop <= max_drop:
        return best, True
    progress("measuring the harm of each layer")
    order = layers_by_harm(network, source, context.data.fit)
    failing, count, found = 0, 1, None
    while found is None and failing < len(order):
        count = min(count, len(order))
        now = attempt(source, order[:count])
        best = min(best, now, key=lambda one: one.held_back.drop)
        if now.held_back.drop <= max_drop:
            found = now
        else:
            failing, count = count, 2 * count
    if found is None:
        return best, False
    for _ in range(_MOST_HALVINGS):
        middle = (failing + count) // 2
        if middle == failing:
            break
        now = attempt(source, order[:middle])
        if now.held_back.drop <= max_drop:
            found, count = now, middle
        else:
            failing = middle
    return found, True


def to_int8(graph: bytes, batches: Sequence[Batch], runtime: str, float_layers: Collection[str] = ()) -> bytes:
    """Return a graph with weights of 8 bits (a scale for each channel) and activations of 8 bits.

    Args:
        batches: inputs on which the ranges of the activations are measured.
        runtime: ``onnx`` or ``openvino``.
        float_layers: names of the layers that stay in floating point.

    Raises:
        InputError: the quantiser fails.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Inputs(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else arrays_of(batch.input)

    with tempfile.TemporaryDirectory() as folder:
        exported, simplified, quantised = (Path(folder) / f"{one}.onnx" for one in ("exported", "simplified", "int8"))
        exported.write_bytes(graph)
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            quant_pre_process(str(exported), str(simplified), skip_symbolic_shape=True)
            signed = _signed_activations(simplified.read_bytes()) if runtime == "openvino" else ()
            overrides = {name: [{"quant_type": QuantType.QInt8, "symmetric": True}] for name in signed}
            quantize_static(
                str(simplified), str(quantised), Inputs(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=sums_overflow(),
                nodes_to_exclude=nodes_of_layers(graph, float_layers),
                extra_options={"TensorQuantOverrides": overrides},
            )  # fmt: skip
        except Exception as error:  # the quantiser raises exceptions of many classes
            raise InputError(f"ONNX Runtime cannot quantise this network: {first_line(error)}") from error
        finally:
            logging.disable(before)
        return _without_idle_rounding(quantised.read_bytes(), simplified.read_bytes())


def _without_idle_rounding(graph: bytes, before: bytes) -> bytes:
    """Return a graph that does not round the outputs of the network, and what only operators in float32 read.

    ``before``: the graph in float32. Where rounding limits values in place of a Relu or a Clip, it stays.
    """
    import onnx

    model = onnx.load_model_from_string(graph)
    network = model.graph
    made_by, made_by_before = (
        {name: node.op_type for node in nodes for name in node.output}
        for nodes in (network.node, onnx.load_model_from_string(before).graph.node)
    )
    readers: dict[str, list[Any]] = {}
    for node in network.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants, outputs = {one.name for one in network.initializer}, {one.name for one in network.output}
    idle: list[Any] = []
    renamed: dict[str, str] = {}
    for node in network.node:
        name = node.input[0] if node.input else ""
        after = readers.get(node.output[0], [])
        if node.op_type != "QuantizeLinear" or name in constants or any(one.op_type != _UNROUND for one in after):
            continue
        results = [one.output[0] for one in after]
        used_by = [one for result in results for one in readers.get(result, [])]
        if any(one.op_type not in _IN_FLOAT for one in used_by) or len(outputs & set(results)) > 1:
            continue
        original = name if name in made_by_before else next((one for one in results if one in made_by_before), name)
        if made_by.get(name) != made_by_before.get(original):
            continue
        idle += [node, *after]
        # The producer writes to the name of the output of the network, if it is one.
        kept = next((result for result in results if result in outputs), name)
        renamed |= dict.fromkeys([name, *results], kept)
    for node in idle:
        network.node.remove(node)
    for node in network.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(one, one) for one in names]
    return model.SerializeToString()


def _signed_activations(graph: bytes) -> set[str]:
    """Return the inputs of a graph, and the outputs of its convolutions and sums that are not rectified.

    OpenVINO is faster if these have a zero point of 0, as in the graphs of NNCF.
    """
    import onnx

    network = onnx.load_model_from_string(graph).graph
    weights = {one.name for one in network.initializer}
    rectified = {name for node in network.node if node.op_type in ("Relu", "Clip") for name in node.input[:1]}
    outputs = {name for node in network.node if node.op_type in ("Conv", "Add") for name in node.output}
    return {one.name for one in network.input} - weights | (outputs - rectified)


def nodes_of_layers(graph: bytes, layers: Collection[str]) -> list[str]:
    """Return the names of the nodes that compute the products of layers."""
    import onnx

    wanted = set(layers)
    nodes = onnx.load_model_from_string(graph).graph.node if wanted else ()
    return [node.name for node in nodes if node.op_type in _WEIGHTED and _layers_of(node) & wanted]


def _layers_of(node: Any) -> set[str]:
    """Return the names of the modules in which a node was exported, and of those whose weight it reads."""
    scopes = [one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"]
    weights = {name.removesuffix(".weight") for name in node.input if name.endswith(".weight")}
    # The last scope is that of the function itself.
    return weights | {name for scope in scopes for name in ast.literal_eval(scope)[-2:-1]}
