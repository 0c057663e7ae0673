"""export(): write a network to a file or a folder that other packages can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..calibration import CalibrationSettings
from ..deploy.export import check_target
from ..deploy.export import export as write_export
from ..deploy.graph_files import PrecisionSettings
from ..deploy.graphs import Exported
from ..errors import Argument, UsageError
from .calibrating import CalibrationData, calibration_batches
from .inputs import Sizes, zeros_of
from .listener import Listener
from .networks import Openable, opened
from .showing import listener_for

BATCH_SIZE = 32  # calibration images in one forward pass


@dataclass(frozen=True)
class ExportedFile:
    """An exported file: its format, its source, and its exactness (``check``: None if the network was not run)."""

    output: str
    format: str
    form: str
    dtype: str
    precision: str
    source: str
    check: Exported | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def export(
    model: Openable,
    output: str | Path,
    format: str = "dense",
    *,
    form: str = "dense",
    dtype: str = "float32",
    precision: str = "f32",
    calibration: CalibrationData | None = None,
    max_drop: float = 1.0,
    settings: CalibrationSettings | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    input_sizes: Sizes = (),
    example_input: Any = None,
    force: bool = False,
    progress: bool | None = None,
    listener: Listener | None = None,
) -> ExportedFile:
    """Write a network with plain convolutions, and compare the file with the network.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export("sample:resnet_mnist5k", f"{folder}/dense.safetensors")
    >>> file.format, file.source
    ('dense', 'sample:resnet_mnist5k')

    Args:
        model: a source string, a request, or a network object, which is not changed.
        output: the file or, for ``"timm"``, the folder to write.
        format: ``"dense"`` (a state dict for stock timm or torchvision), ``"timm"`` (a folder for ``local-dir:``),
            ``"onnx"`` (one file for any batch size), ``"openvino"`` (a .xml and a .bin file) or ``"torch-export"`` (a
            .pt2 program).
        form: ``"dense"``, or for graphs also ``"factored"``: cut convolutions become depthwise and 1x1 convolutions if
            that is faster in the runtime and precision of the file.
        dtype: type of the weights for ``"dense"`` and ``"timm"``: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        precision: of a graph: ``"f32"``, for ``"onnx"`` also ``"int8"``, for ``"openvino"`` also ``"f16"``, ``"bf16"``
            and ``"int8"``.
        calibration: images or batches, as for `convert_to_file`, for the ranges of ``"int8"`` and for the comparison of
            low precision; every fourth input is held back for the comparison.
        max_drop: the largest loss of low precision on the inputs held back, in %: inputs with another top-1; or the
            squared difference of the outputs, if they are no logits. To meet it, layers stay in floating point.
        settings: the number of calibration inputs.
        preprocessing: of images, with timm's names, if it is not the network's own (`harmconvert.data.preprocessing`).
        input_sizes: size of each input of one example, (C, H, W); default: the network's own.
        example_input: instead of ``input_sizes``, as for `convert`.
        force: replace an existing output.
        progress: show progress bars; None: in an interactive session (a Python prompt, IPython, a notebook).
        listener: receives messages and progress instead; without it, the logger ``harmconvert`` gets them.

    Raises:
        UsageError: the output exists, the format does not support the form or the dtype, or no input size is known.
        InputError: the network cannot be exported.
        CheckError: the outputs of the file differ from those of the network, or low precision loses more than
            ``max_drop``; then the best attempt is written beside the output, with -best in its name.
        OutsideError: the disk is full, or a permission or a package is missing.
    """
    listener = listener_for(listener, progress)
    check_target(output, format, force, dtype, form, precision, calibration is not None)
    if not max_drop >= 0:
        raise UsageError(Argument("max_drop", max_drop), " must be a percentage from 0 on")
    settings = settings or CalibrationSettings(inputs=256)
    network = opened(model, listener, intact=True)
    if example_input is None and input_sizes:
        example_input = zeros_of(input_sizes, network.model)
    batches = calibration_batches(
        calibration, network.model, settings, batch_size=BATCH_SIZE, sizes=input_sizes,
        preprocessing=preprocessing or {}, listener=listener,
    )  # fmt: skip
    with listener.busy(f"writing {output}") as say:
        check = write_export(
            network.model,
            output,
            format,
            form=form,
            dtype=dtype,
            precision=precision,
            example_input=example_input,
            settings=PrecisionSettings(batches, settings.inputs, max_drop),
            force=force,
            progress=say,
        )
    listener.wrote(output)
    return ExportedFile(str(output), format, form, dtype, precision, str(network.source), check)
