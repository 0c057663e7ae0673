"""Hand a network over to others: plain state dicts and timm folders, from the dense form."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import Tensor, nn

from .errors import UsageError
from .files import check_folder, check_output, write_folder
from .forms import fuse
from .weights import untied_state, write_tensors

FORMATS = ("dense", "timm")
TIMM_FILES = ("config.json", "model.safetensors")


def check_target(path: str | Path, format: str, force: bool = False) -> None:
    """Raise UsageError where `export` would refuse to write; call it before long work begins."""
    if format == "timm":
        check_folder(path, TIMM_FILES, force)
    else:
        check_output(path, force)


def export(model: nn.Module, path: str | Path, format: str = "dense", *, force: bool = False) -> None:
    """Write the dense form of ``model`` for use without this package.

    ``dense``: a .safetensors state dict with the original network's keys and shapes, which stock timm or torchvision
    loads strictly. ``timm``: a folder for ``timm.create_model("local-dir:PATH", pretrained=True)``.

    Raises:
        UsageError: unknown format, an output that exists, or a timm folder of a network that is not timm's.
        OutsideError: the disk is full, permission is missing.
    """
    if format == "dense":
        write_tensors(_full_state(fuse(model)), path, {"format": "pt"}, force)
    elif format == "timm":
        _export_timm_folder(fuse(model), Path(path), force)
    else:
        raise UsageError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")


def _full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under each of their keys, as a strict load wants them."""
    tensors, tied = untied_state(model)
    return tensors | {alias: tensors[key].clone() for alias, key in tied.items()}


def _export_timm_folder(dense: nn.Module, path: Path, force: bool) -> None:
    cfg = getattr(dense, "pretrained_cfg", None)
    cfg = cfg if isinstance(cfg, dict) else getattr(cfg, "__dict__", {})
    architecture = cfg.get("architecture")
    if not architecture or not timm.is_model(architecture):
        raise UsageError(
            f"a timm folder needs a timm network, and this is a {type(dense).__name__}: use --format dense"
        )
    arguments = {"in_chans": dense.in_chans} if isinstance(getattr(dense, "in_chans", None), int) else {}

    def fill(folder: Path) -> None:
        timm.models.save_for_hf(dense, folder, model_args=arguments or None, safe_serialization=True)

    write_folder(path, TIMM_FILES, fill, force)
