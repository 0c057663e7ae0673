"""export(): write a network to a file or a folder that other packages can read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..deploy.export import check_target
from ..deploy.export import export as write_export
from ..deploy.graphs import Exported
from .inputs import Sizes, zeros_of
from .listener import SILENT, Listener
from .networks import Openable, opened


@dataclass(frozen=True)
class ExportedFile:
    """An exported file: its format, its source, and its exactness (``check``: None if the network was not run)."""

    output: str
    format: str
    form: str
    dtype: str
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
    input_sizes: Sizes = (),
    example_input: Any = None,
    force: bool = False,
    listener: Listener = SILENT,
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
            ``"onnx"`` (one file for any batch size) or ``"torch-export"`` (a .pt2 program).
        form: ``"dense"``, or for ``"onnx"`` and ``"torch-export"`` also ``"factored"``: cut convolutions become
            depthwise and 1x1 convolutions if that is faster.
        dtype: type of the weights for ``"dense"`` and ``"timm"``: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        input_sizes: size of each input of one example, (C, H, W); default: the network's own.
        example_input: instead of ``input_sizes``, as for `convert`.
        force: replace an existing output.
        listener: receives messages and progress.

    Raises:
        UsageError: the output exists, the format does not support the form or the dtype, or no input size is known.
        InputError: the network cannot be exported.
        CheckError: the outputs of the file differ from those of the network.
        OutsideError: the disk is full, or a permission or a package is missing.
    """
    check_target(output, format, force, dtype, form)
    network = opened(model, listener, intact=True)
    if example_input is None and input_sizes:
        example_input = zeros_of(input_sizes, network.model)
    with listener.busy(f"writing {output}") as say:
        check = write_export(
            network.model,
            output,
            format,
            form=form,
            dtype=dtype,
            example_input=example_input,
            force=force,
            progress=say,
        )
    listener.wrote(output)
    return ExportedFile(str(output), format, form, dtype, str(network.source), check)
