"""Hand a network over to others: plain state dicts, timm folders, ONNX, torch.export; never from the harmonic form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from ..arguments import FORMATS, GRAPHS, TIMM_FILES, check_format
from ..errors import UsageError
from ..files import write_folder
from ..forms import fuse
from ..precision import check_rounding, dtype_named, rounded
from ..surgery import default_input, pretrained_config
from ..weights import saving, untied_state, write_tensors
from .graphs import Exported, check_packages, check_runs, export_onnx, export_program, random_batch

__all__ = ["FORMATS", "Exported", "check_target", "export"]


def check_target(
    path: str | Path, format: str, force: bool = False, dtype: str = "float32", form: str = "dense"
) -> None:
    """Raise what `export` would raise before it begins; call it before long work.

    Raises:
        UsageError: the output exists, or the format does not go with its suffix, the dtype or the form.
        OutsideError: a package is missing.
    """
    dtype_named(dtype)
    check_format(path, format, force, dtype, form)
    if format == "onnx":
        check_packages()


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "dense",
    *,
    form: str = "dense",
    dtype: str = "float32",
    example_input: Any = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Exported | None:
    """Write ``model`` for use without this package, and say how exact the file is (None where nothing was run).

    ``dense``: a .safetensors state dict with the original network's keys and shapes, which stock timm or torchvision
    loads strictly. ``timm``: a folder for ``timm.create_model("local-dir:PATH", pretrained=True)``. ``onnx``: one
    .onnx file of standard operators, any batch size, compared with the network in ONNX Runtime before it is kept.
    ``torch-export``: a .pt2 program of torch's operators, read again and compared before it is kept.

    Args:
        form: ``"dense"``, or (onnx, torch-export) ``"factored"``: truncated convolutions as depthwise ones and a 1x1,
            where that is faster: of onnx as ONNX Runtime runs it here, else as `factor` finds.
        dtype: (dense, timm) ``"float16"`` or ``"bfloat16"`` store weights in 16 bits, within a tolerance of the
            outputs.
        example_input: as for `convert`; by default of the network's own size. Needed but for float32 state dicts.

    Raises:
        UsageError: unknown format, an output that exists, no example input, or a timm folder of another's network.
        InputError: the network cannot be exported.
        CheckError: the file does not compute what the network does; nothing was written.
        OutsideError: the disk is full, permission or a package is missing.
    """
    check_target(path, format, force, dtype, form)
    runs = format in GRAPHS or dtype != "float32"
    if runs and example_input is None and (example_input := default_input(model)) is None:
        raise UsageError("this network does not say what it takes: give example_input (--input-size C,H,W)")
    if runs:
        check_runs(model, example_input)
    if format == "onnx":
        return export_onnx(model, Path(path), form, example_input, force, progress)
    if format == "torch-export":
        return export_program(model, Path(path), form, example_input, force, progress)
    dense = fuse(model)
    difference = None
    if dtype != "float32":
        small = rounded(dense, dtype_named(dtype))
        difference = check_rounding(dense, small, random_batch(example_input, None))
        dense = small
    if format == "dense":
        write_tensors(_full_state(dense), path, {"format": "pt"}, force)
    else:
        _export_timm_folder(dense, Path(path), force)
    return None if difference is None else Exported(difference, None, ())


def _full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under each of their keys, as a strict load wants them."""
    tensors, tied = untied_state(model)
    return tensors | {alias: tensors[key].clone() for alias, key in tied.items()}


def _export_timm_folder(dense: nn.Module, path: Path, force: bool) -> None:
    architecture = pretrained_config(dense).get("architecture")
    if not architecture or not timm.is_model(architecture):
        raise UsageError(
            f"a timm folder needs a timm network, and this is a {type(dense).__name__}: use --format dense"
        )
    arguments = {"in_chans": dense.in_chans} if isinstance(getattr(dense, "in_chans", None), int) else {}

    def fill(folder: Path) -> None:
        timm.models.save_for_hf(dense, folder, model_args=arguments or None, safe_serialization=True)

    with saving(path):
        write_folder(path, TIMM_FILES, fill, force)
