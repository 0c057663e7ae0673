"""Export a network without its harmonic form: as a plain state dict, a timm folder, ONNX or torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..arguments import FORMATS, GRAPHS, PRECISIONS, TIMM_FILES, check_format
from ..errors import Argument, CheckError, UsageError, first_line
from ..files import write_folder
from ..network.copying import deep_copy
from ..network.declared import pretrained_config
from ..network.exchange import exchange
from ..network.form_check import check_form, compare_outputs, comparison_inputs, make_runnable
from ..network.forms import dense_form
from ..network.values import default_input
from ..storage.precision import check_rounding, dtype_named, in_float32, rounded
from ..storage.weights import saving, untied_state, write_tensors
from .graph_files import GraphJob, PrecisionSettings, export_graph
from .graphs import Exported, export_program
from .runtimes import Target

__all__ = ["FORMATS", "Exported", "PrecisionSettings", "check_target", "export"]

_DEFAULTS = PrecisionSettings()


def check_target(
    path: str | Path,
    format: str,
    force: bool = False,
    dtype: str = "float32",
    form: str = "dense",
    precision: str = "f32",
    calibrated: bool = False,
) -> None:
    """Check the arguments of `export`, so that errors appear before long work.

    Raises:
        UsageError: the output exists, the format does not fit its suffix, the dtype, the form or the precision, or
            there are no calibration inputs for 8 bits.
        OutsideError: a package is missing.
    """
    dtype_named(dtype)
    check_format(path, format, force, dtype, form, precision, calibrated)
    if format in PRECISIONS:
        Target(format, precision).check_packages()


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "dense",
    *,
    form: str = "dense",
    dtype: str = "float32",
    precision: str = "f32",
    settings: PrecisionSettings = _DEFAULTS,
    example_input: Any = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda description: None,
) -> Exported | None:
    """Write ``model`` for use without this package; return the accuracy of the file (None: no input was available).

    ``dense``: a .safetensors state dict with the original network's keys and shapes, which timm and torchvision load
    strictly. ``timm``: a folder for ``timm.create_model("local-dir:PATH", pretrained=True)``. ``onnx``: one .onnx file
    of standard operators, for any batch size. ``openvino``: a .xml and a .bin file. ``torch-export``: a .pt2 program of
    torch's operators.

    Each file is loaded again (ONNX: in ONNX Runtime) and compared with the harmonic network before it is written. The
    comparison uses the example input, or seeded random inputs if the example is all zeros. Without an input, layers are
    compared one by one.

    Args:
        form: ``"dense"``, or for graphs ``"factored"``: a truncated convolution becomes a depthwise one and a 1x1 if
            that is faster. For onnx and openvino, layers are timed in the runtime and precision on this machine; else
            `factor` decides.
        dtype: (dense, timm) ``"float16"`` or ``"bfloat16"`` store weights in 16 bits, if the outputs stay within a
            tolerance; ``"float32"`` does not change them. Graphs are float32.
        precision: (onnx) ``"int8"``, (openvino) ``"f16"``, ``"bf16"`` or ``"int8"``: what the runtime computes in.
        settings: the inputs for low precision, and its largest loss.
        example_input: as for `convert`; by default of the network's own input size. Graphs and 16 bits need it.

    Raises:
        UsageError: unknown format, an output that exists, no example input, or a timm folder of a network that is not
            from timm.
        InputError: the network cannot be exported.
        CheckError: the outputs of the file differ from those of the network; nothing was written.
        OutsideError: the disk is full, permission or a package is missing.
    """
    check_target(path, format, force, dtype, form, precision, settings.calibration is not None)
    input = default_input(model) if example_input is None else example_input
    if input is None and (format in GRAPHS or dtype != "float32"):
        raise UsageError("this network does not declare its input size: give ", Argument("example_input"))
    if format in GRAPHS:
        # A graph computes in the dtype of its weights, and ONNX Runtime has no 16-bit convolutions on a CPU.
        model, input = make_runnable(in_float32(exchange(model, {})), input)
        if format in PRECISIONS:
            job = GraphJob(Path(path), Target(format, precision), form, settings, force, progress)
            return export_graph(model, input, job)
        return export_program(model, Path(path), form, input, force, progress)
    dense = dense_form(model)
    difference = check_form(model, _load_strictly(dense), "dense", example_input)
    if dtype != "float32":
        model, input = make_runnable(model, input)
        small = rounded(dense, dtype_named(dtype))
        difference = check_rounding(dense, _load_strictly(small), comparison_inputs(input))
        dense = small
    if format == "dense":
        write_tensors(_full_state(dense), path, {"format": "pt"}, force)
    else:
        _export_timm_folder(dense, Path(path), input, force)
    return None if difference is None else Exported(difference, None, ())


def _load_strictly(dense: nn.Module) -> nn.Module:
    """Return a copy of a network that has loaded the state dict of the file strictly.

    Raises:
        CheckError: the network does not load its own state dict.
    """
    blank = deep_copy(dense)
    for parameter in blank.parameters():
        if parameter.is_floating_point():
            parameter.data = torch.full_like(parameter, torch.nan)
    try:
        blank.load_state_dict(_full_state(dense))  # strict by default, also if the network overrides the method
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckError(
            f"the state dict of this {type(dense).__name__} does not load into it again: {first_line(error)}; "
            "nothing was written"
        ) from error
    return blank


def _full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with tied tensors under each of their keys, as a strict load needs it."""
    tensors, tied = untied_state(model)
    return tensors | {alias: tensors[key].clone() for alias, key in tied.items()}


def _export_timm_folder(dense: nn.Module, path: Path, input: Any, force: bool) -> None:
    _check_timm(dense)
    with saving(path):
        write_folder(path, TIMM_FILES, lambda folder: write_timm_files(dense, folder, input), force)


def _check_timm(dense: nn.Module) -> None:
    architecture = pretrained_config(dense).get("architecture")
    if not architecture or not timm.is_model(architecture):
        problem = f"a timm folder needs a timm network, and this is a {type(dense).__name__}"
        raise UsageError(problem, ": use ", Argument("format", "dense"))


def write_timm_files(dense: nn.Module, folder: Path, input: Any = None) -> None:
    """Write the files of a timm network into an existing folder, and compare what timm reads from it.

    Args:
        dense: the network in dense form.
        input: an input for the comparison; None: the files are only loaded.

    Raises:
        UsageError: the network is not from timm.
        CheckError: timm does not make the same network from the files.
    """
    _check_timm(dense)
    arguments = {"in_chans": dense.in_chans} if isinstance(getattr(dense, "in_chans", None), int) else {}
    timm.models.save_for_hf(dense, folder, model_args=arguments or None, safe_serialization=True)
    try:
        other = timm.create_model(f"local-dir:{folder}", pretrained=False)
        other.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # timm's exceptions have no common base class
        problem: str | None = f"{type(error).__name__}: {first_line(error)}"
    else:
        problem = None if input is None else compare_outputs(dense, other, comparison_inputs(input)).problem
    if problem:
        message = f"timm does not make this {type(dense).__name__} from the folder ({problem})"
        raise CheckError(message, "; nothing was written: use ", Argument("format", "dense"))
