"""The file: one self-describing .safetensors, written whole or not at all, read without running anything.

``<conv>.coefficients`` (O, I, F) stands in the place of ``<conv>.weight``, with ``<conv>.fitted_basis`` (F, K) beside
it where the basis is the layer's own; every other tensor keeps its key. `docs/file-format.md` describes the file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs.table import CodecTable
from ..documents import input_errors, parse_json
from ..errors import DamageWarning, InputError, OutsideError, UsageError, first_line, shortened
from ..files import check_output
from ..layers.block import HarmonicBlock2d, to_block
from ..network.checks import check_finite
from ..network.copying import deep_copy
from ..network.declared import declare_preprocessing, preprocessing_record
from ..network.exchange import replace_module
from ..network.forms import dense_form, factor, fuse
from ..network.layers import convolutions, harmonic_layers, is_harmonic_layer, kernel_size, state_key, weighted_layers
from ..network.state import tensors_of
from ..plan import AXES, Plan, apply_plan, plan_of_model
from .header import METADATA_KEY, BlockRecord, Header, checksum, header_text
from .source import Source, as_source, timm_source
from .tensors import decoded, encoded, equal, memory_limit, read_stored, stored_in
from .weights import load_exactly, open_safetensors, untied_state, why_unreadable, write_tensors

log = logging.getLogger(__name__)

FORMS = ("harmonic", "dense", "factored")


def write_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    header: Header | None = None,
    source: Source | str | None = None,
    history: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Header:
    """Write a harmonic network to one .safetensors file; returns the header written.

    Args:
        model: a network with harmonic convolutions or blocks.
        header: what is known of it: its plan, source and history. What is None there, or where no header is given, is
            read from the network: the plan from its layers, the source from a network that timm made.
        source: replaces the header's source.
        history: replaces entries of the header's history.
        preprocessing: replaces what the network declares in its ``pretrained_cfg``, entry by entry.
        force: replace a file that is there.

    Raises:
        UsageError: the output exists or cannot be a file, or nothing in the network is harmonic.
        InputError: weights that are not finite, or without values (meta device), or what could not be loaded again.
        OutsideError: the disk is full, permission is missing.
    """
    check_output(path, force, ".safetensors")
    check_finite(model)
    plan = header.plan if header else plan_in(model)
    tensors, tied = untied_state(model)
    stored, coded = encoded(tensors, header.codecs.coded if header else {})
    source = as_source(source) or (header.source if header else None) or timm_source(model)
    versions = {name: version(name) for name in ("harmconvert", "torch", "timm")}
    record = {**(header.history if header else {}), **(history or {})}
    codecs = CodecTable.of({tensor.dtype for key, tensor in stored.items() if key not in coded}, coded)
    written = Header(plan, source, tied, record, versions, _blocks_of(model), codecs)
    written = replace(written, preprocessing=preprocessing_record(model, preprocessing))
    text = header_text(written, stored)
    with input_errors(f"the header of {path} could not be read again"):
        written = replace(written, crc32=parse_json(text)["crc32"])
    metadata = {"format": "pt", METADATA_KEY: text}
    write_tensors(stored, path, metadata, force, partial(_check_written, model=model, header=written, tensors=tensors))
    return written


def _check_written(staging: Path, model: nn.Module, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError where a file that was just written could not be loaded again as the network that it is of.

    The header and all tensors are read back. The network to load them into is made as `load` makes it, without values.
    """
    try:
        plain = dense_form(_without_values(model))
    except Exception as error:  # a part that cannot be copied without values
        log.info("%s is checked with its values: it has no copy without (%s)", type(model).__name__, first_line(error))
        plain = dense_form(model)
    structure = harmonic_like(plain, header.plan, "what would be written", header.blocks)
    wanted = {key: tuple(tensor.shape) for key, tensor in tensors_of(structure).items()}
    written = {key: tuple(tensor.shape) for key, tensor in tensors_of(model).items()}
    if differing := [key for key in {**wanted, **written} if wanted.get(key) != written.get(key)]:
        raise InputError(
            f"this {type(model).__name__} could not be loaded again: {shortened(differing)} would not be in the "
            "network that its plan makes; convert the network anew"
        )
    found, text = _header_of(staging)
    stored = read_stored(staging)
    if checksum(text, stored) == header.crc32:
        again = decoded({key: stored[key] for key in found.codecs.coded}, found.codecs.coded)
        if all(equal(tensor, tensors[key]) for key, tensor in again.items()):
            return
    raise OutsideError("what was written is not what can be read back: the disk or the memory is faulty")


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a network whose parameters are on the meta device."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
        for tensor in model.parameters()
    }
    return deep_copy(model, memo)


def is_harmonic(path: str | Path) -> bool:
    """Whether a file calls itself a harmonic checkpoint, readable or not."""
    if Path(path).suffix != ".safetensors" or why_unreadable(path):
        return False
    with open_safetensors(path) as file:
        return METADATA_KEY in (file.metadata() or {})


def read_header(path: str | Path) -> Header:
    """What the checkpoint at ``path`` says of itself; reads no tensor.

    Raises:
        InputError: no such file, not a safetensors file, not a harmonic checkpoint, or of an unknown version.
    """
    return _header_of(path)[0]


def _header_of(path: str | Path) -> tuple[Header, str]:
    """The header of a checkpoint, compared with the shapes of the tensors in its file, and its text."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        raise InputError(
            f"{path} is a safetensors file but not a harmonic checkpoint: "
            f"name its network and give the weights with --checkpoint {path}"
        )
    try:
        data = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise InputError(f"{path}: its header is not JSON: {error}") from error
    stored = stored_in(path)
    try:
        header = Header.from_json(data)
        if header.format_version > 1:
            header.codecs.check(stored, memory_limit(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    shapes = {key: list(one.shape) for key, one in stored.items()}
    shapes |= {key: list(entry.shape) for key, entry in header.codecs.coded.items()}
    _check_shapes(path, header, shapes)
    return header, metadata[METADATA_KEY]


def _check_shapes(path: str | Path, header: Header, shapes: Mapping[str, list[int]]) -> None:
    """Raise InputError where the tensors of a file, once they are decoded, are not those of its plan."""
    expected = {
        state_key(layer.name, tensor): wanted
        for layer in header.plan.layers
        for kept in layer.keeps
        for tensor, wanted in AXES[kept.axis].tensors(kept, layer.kernel_size).items()
    }
    for key, wanted in expected.items():
        shape = shapes.get(key)
        if (shape is None and key in header.tied) or (shape is not None and wanted.fits(shape)):
            continue
        found = "it is missing" if shape is None else f"it has shape {shape}"
        raise InputError(f"{path}: its header and tensors disagree: {key} should {wanted.text}, {found}")


@dataclass(frozen=True)
class Network:
    """A network, where it came from, and (where it was read from a harmonic checkpoint) what its file says of it."""

    model: nn.Module
    source: Source
    header: Header | None = None


def read_checkpoint(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    form: str = "harmonic",
    example_input: Any = None,
    rebuild: Callable[[Source], nn.Module] | None = None,
) -> Network:
    """Read a harmonic checkpoint into a network; `harmconvert.load` also rebuilds the recorded source.

    Args:
        model: the plain network to fill; it is copied, not changed. Where None, ``rebuild`` makes it from the source.
        form: ``"harmonic"``, ``"dense"``, or ``"factored"``: in eval mode, as `factor` finds it to be fastest here.
        example_input: what the factored form is to be fast at, and what the dense form is compared on; default: one
            input of the network's own size.

    Raises:
        InputError: the file is unreadable, holds NaN, or does not fit the network (the first ten keys are named).
        UsageError: no network to fill, an unknown form, or nothing known to measure the factored form on.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}: use one of {', '.join(FORMS)}")
    header, text = _header_of(path)
    if model is None:
        if header.source is None or rebuild is None:
            raise UsageError(f"{path} does not say how to build its network: pass the plain network as model=")
        try:
            model = rebuild(header.source)
        except (InputError, UsageError) as error:
            raise type(error)(f"{path}: {error}") from error
    harmonic = harmonic_like(model, header.plan, str(path), header.blocks)
    del model  # where it was made for this, it is memory
    stored = read_stored(path)
    if header.crc32 is not None and checksum(text, stored) != header.crc32:
        remark = f"{path} is not as harmconvert wrote it: damaged, or changed since; verify it against its original"
        warnings.warn(remark, DamageWarning, stacklevel=2)
    _check_coded(harmonic, header, path)
    with input_errors(str(path)):
        state = decoded(stored, header.codecs.coded)
    del stored
    state |= {alias: state[key] for alias, key in header.tied.items() if key in state}
    load_exactly(harmonic, state, str(path))
    del state
    with input_errors(str(path)):
        check_finite(harmonic)
    declare_preprocessing(harmonic, header.preprocessing)
    source = header.source or Source("unknown", str(path))
    return Network(in_form(harmonic, form, example_input), source, header)


def _check_coded(harmonic: nn.Module, header: Header, path: str | Path) -> None:
    """Raise InputError where a network has no room for a coded tensor: before memory is set aside for its values."""
    own = tensors_of(harmonic, keep_vars=True)
    for key, entry in header.codecs.coded.items():
        if key not in own or (not is_lazy(own[key]) and tuple(own[key].shape) != entry.shape):
            there = f"{key} is {tuple(own[key].shape)} in it" if key in own else f"it has no tensor {key}"
            raise InputError(
                f"{path} does not fit this {type(harmonic).__name__}: its codec table claims {key} to be "
                f"{entry.shape}, {there}"
            )


def in_form(harmonic: nn.Module, form: str, example_input: Any = None) -> nn.Module:
    """A harmonic network in one of `FORMS`."""
    if form == "factored":
        return factor(harmonic.eval(), example_input)
    return fuse(harmonic, example_input) if form == "dense" else harmonic


def harmonic_like(
    model: nn.Module, plan: Plan, where: str, blocks: Mapping[str, BlockRecord] | None = None
) -> nn.Module:
    """A copy of a plain network with the harmonic convolutions of a plan, and blocks, their values to be loaded.

    Raises:
        InputError: the network lacks a convolution of the plan's; ``where`` that is from is named.
    """
    complaint = f"{where} does not fit this {type(model).__name__}"
    known = weighted_layers(model)
    wrong = [p.name for p in plan.layers if p.name not in known or kernel_size(known[p.name]) != p.kernel_size]
    if wrong:
        raise InputError(f"{complaint}: it has no such convolution: {shortened(wrong)}")
    copied = apply_plan(model, plan, values=False)
    for name, block in (blocks or {}).items():
        conv = convolutions(copied).get(name)
        if conv is None or is_harmonic_layer(conv):
            raise InputError(f"{complaint}: it has no such convolution: {name}")
        if block.kernel_size not in (None, kernel_size(conv)):
            raise InputError(f"{complaint}: {name} has kernel {kernel_size(conv)} instead of {block.kernel_size}")
        copied = replace_module(copied, conv, to_block(conv, block.normalize, block.normalization))
    return copied


def _blocks_of(model: nn.Module) -> dict[str, BlockRecord]:
    """The blocks of a network that stand in the place of convolutions."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)}
    return {
        name: BlockRecord(isinstance(block.norm, nn.BatchNorm2d), block.normalization, kernel_size(block))
        for name, block in blocks.items()
    }


def plan_in(model: nn.Module, known: Plan | None = None) -> Plan:
    """The plan that a network follows: ``known`` where its layers say the same, else what they say; an empty one where
    it has blocks alone.

    Raises:
        UsageError: nothing in the network is harmonic.
    """
    if _blocks_of(model) and not harmonic_layers(model):
        return Plan(())
    return plan_of_model(model, known)
