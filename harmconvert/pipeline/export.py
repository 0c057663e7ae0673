"""export(): a network in, a file or folder out that is used without this package."""

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
    """What was written, from what, and how exact it is: ``check`` is None where the network was not run."""

    output: str
    format: str
    form: str
    dtype: str
    source: str
    check: Exported | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
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
    ...     done = export("sample:resnet_mnist5k", f"{folder}/dense.safetensors")
    >>> done.format, done.source
    ('dense', 'sample:resnet_mnist5k')

    Args:
        model: a source string, a request or a network; a given network is not changed.
        output: the file or, for ``"timm"``, the folder to write.
        format: ``"dense"`` (a state dict for stock timm or torchvision), ``"timm"`` (a folder for ``local-dir:``),
            ``"onnx"`` (one file for any batch size) or ``"torch-export"`` (a .pt2 program).
        form: ``"dense"``, or of ``"onnx"`` and ``"torch-export"`` also ``"factored"``: truncated convolutions as
            depthwise ones and a 1x1, where that is faster.
        dtype: of the weights of ``"dense"`` and ``"timm"``: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        input_sizes: of each input of one example, (C, H, W); default: the network's own.
        example_input: instead of ``input_sizes``, as for `convert`.
        force: replace what is there.
        listener: is told what happens.

    Raises:
        UsageError: an output that exists, a format that does not go with the form or the dtype, no input size.
        InputError: the network cannot be exported. CheckError: the file does not compute what the network does.
        OutsideError: a disk, a permission or a package is missing.
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
