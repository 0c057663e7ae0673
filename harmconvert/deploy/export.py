"""Hand a network over to others: plain state dicts, timm folders, ONNX, torch.export; never from the harmonic form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..arguments import FORMATS, GRAPHS, TIMM_FILES, check_format
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
from .graphs import Exported, check_packages, export_onnx, export_program

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
    .onnx file of standard operators, any batch size. ``torch-export``: a .pt2 program of torch's operators. Every file
    is loaded again (ONNX: in ONNX Runtime) and compared with the harmonic network before it is kept, on the example
    input where that is not all zeros, else on seeded random ones; where no input is known, layer by layer.

    Args:
        form: ``"dense"``, or (onnx, torch-export) ``"factored"``: truncated convolutions as depthwise ones and a 1x1,
            where that is faster: of onnx as ONNX Runtime runs it here, else as `factor` finds.
        dtype: (dense, timm) ``"float16"`` or ``"bfloat16"`` store weights in 16 bits, within a tolerance of the
            outputs; ``"float32"`` leaves them as they are. Graphs are float32.
        example_input: as for `convert`; by default of the network's own size. Needed for graphs and for 16 bits.

    Raises:
        UsageError: unknown format, an output that exists, no example input, or a timm folder of another's network.
        InputError: the network cannot be exported.
        CheckError: the file does not compute what the network does; nothing was written.
        OutsideError: the disk is full, permission or a package is missing.
    """
    check_target(path, format, force, dtype, form)
    known = default_input(model) if example_input is None else example_input
    if known is None and (format in GRAPHS or dtype != "float32"):
        raise UsageError("this network does not declare its input size: give ", Argument("example_input"))
    if format in GRAPHS:
        # 16 bits are for files: graphs compute as they are stored, and ONNX Runtime has no such convolutions on a CPU.
        model, known = make_runnable(in_float32(exchange(model, {})), known)
        export_graph = export_onnx if format == "onnx" else export_program
        return export_graph(model, Path(path), form, known, force, progress)
    dense = dense_form(model)
    difference = check_form(model, _strictly_loaded(dense), "dense", example_input)
    if dtype != "float32":
        model, known = make_runnable(model, known)
        small = rounded(dense, dtype_named(dtype))
        difference = check_rounding(dense, _strictly_loaded(small), comparison_inputs(known))
        dense = small
    if format == "dense":
        write_tensors(_full_state(dense), path, {"format": "pt"}, force)
    else:
        _export_timm_folder(dense, Path(path), known, force)
    return None if difference is None else Exported(difference, None, ())


def _strictly_loaded(dense: nn.Module) -> nn.Module:
    """A copy of a network whose parameters are all from a strict load of what its file will hold.

    Raises:
        CheckError: that does not load.
    """
    blank = deep_copy(dense)
    for parameter in blank.parameters():
        if parameter.is_floating_point():
            parameter.data = torch.full_like(parameter, torch.nan)
    try:
        blank.load_state_dict(_full_state(dense))  # strict by default, also where the network has its own
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckError(
            f"the state dict of this {type(dense).__name__} does not load into it again: {first_line(error)}; "
            "nothing was written"
        ) from error
    return blank


def _full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under each of their keys, as a strict load wants them."""
    tensors, tied = untied_state(model)
    return tensors | {alias: tensors[key].clone() for alias, key in tied.items()}


def _export_timm_folder(dense: nn.Module, path: Path, known: Any, force: bool) -> None:
    architecture = pretrained_config(dense).get("architecture")
    if not architecture or not timm.is_model(architecture):
        what = f"a timm folder needs a timm network, and this is a {type(dense).__name__}"
        raise UsageError(what, ": use ", Argument("format", "dense"))
    arguments = {"in_chans": dense.in_chans} if isinstance(getattr(dense, "in_chans", None), int) else {}

    def fill(folder: Path) -> None:
        timm.models.save_for_hf(dense, folder, model_args=arguments or None, safe_serialization=True)
        try:
            other = timm.create_model(f"local-dir:{folder}", pretrained=False)
            other.load_state_dict(load_file(folder / "model.safetensors"))
        except Exception as error:  # what timm raises has no common base
            problem: str | None = f"{type(error).__name__}: {first_line(error)}"
        else:
            problem = None if known is None else compare_outputs(dense, other, comparison_inputs(known)).problem
        if problem:
            what = f"timm makes another network than this {type(dense).__name__} of the folder ({problem})"
            raise CheckError(what, "; nothing was written: use ", Argument("format", "dense"))

    with saving(path):
        write_folder(path, TIMM_FILES, fill, force)
