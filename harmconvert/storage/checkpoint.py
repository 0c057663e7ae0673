"""The harmonic checkpoint: one self-describing .safetensors, written atomically and read without running any code.

``<conv>.coefficients`` (O, I, F) replaces ``<conv>.weight``. If the basis is fitted to the layer,
``<conv>.fitted_basis`` (F, K) is stored, too. Every other tensor keeps its key. `docs/file-format.md` describes the
file.
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

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import __version__
from ..codecs.codec import Entry, codec_of
from ..codecs.table import CodecTable
from ..documents import input_errors, parse_json
from ..errors import Argument, DamageWarning, InputError, OutsideError, UsageError, first_line, shortened
from ..files import check_output
from ..layers.block import HarmonicBlock2d, to_block
from ..layers.harmonic import is_harmonic_layer
from ..network.checks import check_finite
from ..network.copying import deep_copy
from ..network.declared import declare_preprocessing, preprocessing_record
from ..network.exchange import replace_module
from ..network.forms import dense_form, factor, fuse
from ..network.layers import all_layers, convolutions, harmonic_layers, kernel_size, state_key
from ..network.low_rank import in_one_layer
from ..network.state import tensors_of
from ..plan import AXES, Plan, apply_plan, fits, plan_of_model
from .header import METADATA_KEY, BlockRecord, Header, checksum, header_text
from .source import Source, as_source, timm_source
from .tensors import (
    StoredTensors,
    decode_tensors,
    encode_tensors,
    equal,
    memory_limit,
    read_stored,
    stored_tensors,
    with_packed,
)
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
    """Write a harmonic network to one .safetensors file; return its header.

    Args:
        model: a network with harmonic convolutions or blocks.
        header: the network's plan, source and history. Missing entries are read from the network: the plan from its
            layers, the source from a network that timm built.
        source: replaces the header's source.
        history: replaces entries of the header's history.
        preprocessing: replaces entries of the network's ``pretrained_cfg``.
        force: replace an existing file.

    Raises:
        UsageError: the output exists or cannot be a file, or no layer of the network is harmonic.
        InputError: weights are not finite or have no values (meta device), or the file could not be loaded again.
        OutsideError: the disk is full or permission is missing.
    """
    check_output(path, force, ".safetensors")
    model = in_one_layer(model)
    check_finite(model)
    header = header or Header(plan_in(model))
    header = replace(header, source=as_source(source) or header.source or timm_source(model))
    header = replace(header, history={**header.history, **(history or {})})
    tensors, tied = untied_state(model)
    stored, coded = encode_tensors(tensors, header.codecs.coded)
    written = _completed(header, model, stored, coded, tied, preprocessing)
    text = header_text(written, stored)
    with input_errors(f"the header of {path} could not be read again"):
        written = replace(written, crc32=parse_json(text)["crc32"])
    check = partial(_check_written, model=model, header=written, tensors=tensors)
    write_tensors(stored, path, _metadata(text), force, check)
    return written


def file_bytes(model: nn.Module, header: Header) -> int:
    """Return the bytes of the file that `write_checkpoint` makes of a network with this header, without making it."""
    model = in_one_layer(model)
    header = replace(header, source=header.source or timm_source(model))
    tensors, tied = untied_state(model)
    coded = {key: entry for key, entry in header.codecs.coded.items() if key in tensors}
    streams = {key: torch.zeros(codec_of(entry).bytes(entry), dtype=torch.uint8) for key, entry in coded.items()}
    stored, coded = with_packed({**tensors, **streams}, coded)
    text = header_text(_completed(header, model, stored, coded, tied), stored)
    return len(safetensors.torch.save(stored, _metadata(text)))


def _completed(
    header: Header, model: nn.Module, stored: Mapping[str, Tensor], coded: Mapping[str, Entry], tied: dict[str, str],
    preprocessing: Mapping[str, Any] | None = None,
) -> Header:  # fmt: skip
    """Return the header with all entries that follow from the network and from how its tensors are stored."""
    versions = {"harmconvert": __version__, **{name: version(name) for name in ("torch", "timm")}}
    codecs = CodecTable.of({tensor.dtype for key, tensor in stored.items() if key not in coded}, coded)
    written = Header(header.plan, header.source, tied, header.history, versions, _blocks_of(model), codecs)
    return replace(written, preprocessing=preprocessing_record(model, preprocessing))


def _metadata(text: str) -> dict[str, str]:
    return {"format": "pt", METADATA_KEY: text}


def _check_written(staging: Path, model: nn.Module, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError if the file that was just written could not be loaded again into the network.

    The header and all tensors are read back. The network to load them into is built as in `load`, but without values.
    """
    try:
        plain = dense_form(_without_values(model))
    except Exception as error:  # a part of the network cannot be copied without values
        log.info(
            "%s is checked with its values: it cannot be copied without them (%s)",
            type(model).__name__, first_line(error),
        )  # fmt: skip
        plain = dense_form(model)
    structure = harmonic_like(plain, header.plan, "what would be written", header.blocks)
    expected = {key: tuple(tensor.shape) for key, tensor in tensors_of(structure).items()}
    written = {key: tuple(tensor.shape) for key, tensor in tensors_of(model).items()}
    if differing := [key for key in {**expected, **written} if expected.get(key) != written.get(key)]:
        raise InputError(
            f"this {type(model).__name__} could not be loaded again: {shortened(differing)} would not be in the "
            "network that its plan makes; convert the network again"
        )
    header_read, text = _header_of(staging)
    stored = StoredTensors(staging)
    if checksum(text, stored) == header.crc32:
        coded = header_read.codecs.entries
        again = decode_tensors({key: stored[key] for key in coded}, coded)
        if all(equal(tensor, tensors[key]) for key, tensor in again.items()):
            return
    raise OutsideError("the file that was written cannot be read back unchanged: the disk or the memory is faulty")


def _without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a network with its parameters on the meta device."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
        for tensor in model.parameters()
    }
    return deep_copy(model, memo)


def is_harmonic(path: str | Path) -> bool:
    """Return whether a file declares itself a harmonic checkpoint; it may still be unreadable."""
    if Path(path).suffix != ".safetensors" or why_unreadable(path):
        return False
    with open_safetensors(path) as file:
        return METADATA_KEY in (file.metadata() or {})


def read_header(path: str | Path) -> Header:
    """Return the header of the checkpoint at ``path``; read no tensor.

    Raises:
        InputError: the file does not exist, is not a harmonic checkpoint, or has an unknown version.
    """
    return _header_of(path)[0]


def _header_of(path: str | Path) -> tuple[Header, str]:
    """Return the header of a checkpoint and its text, after a check against the shapes of the tensors in the file."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        what = (
            f"{path} is a safetensors file but not a harmonic checkpoint: name its network and give the weights with "
        )
        raise InputError(what, Argument("weights", path))
    try:
        data = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise InputError(f"{path}: its header is not JSON: {error}") from error
    stored = stored_tensors(path)
    try:
        header = Header.from_json(data)
        if header.format_version > 1:
            header.codecs.check(stored, memory_limit(path))
    except InputError as error:
        raise InputError(f"{path}: ", error.message) from error
    shapes = {key: list(tensor.shape) for key, tensor in stored.items()}
    shapes |= {key: list(entry.shape) for key, entry in header.codecs.entries.items()}
    _check_shapes(path, header, shapes)
    return header, metadata[METADATA_KEY]


def _check_shapes(path: str | Path, header: Header, shapes: Mapping[str, list[int]]) -> None:
    """Raise InputError if the decoded tensors of a file do not have the shapes of its plan."""
    expected_shapes = {
        state_key(layer.name, tensor): expected
        for layer in header.plan.layers
        for kept in layer.keeps
        for tensor, expected in AXES[kept.axis].tensors(kept, layer.kernel_size).items()
    }
    for key, expected in expected_shapes.items():
        if expected is None:
            continue
        shape = shapes.get(key)
        if (shape is None and key in header.tied) or (shape is not None and expected.fits(shape)):
            continue
        actual = "it is missing" if shape is None else f"it has shape {shape}"
        raise InputError(f"{path}: its header and tensors disagree: {key} should {expected.text}, {actual}")


@dataclass(frozen=True)
class Network:
    """A network, its source, and, if it was read from a harmonic checkpoint, the header of its file."""

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
        model: the plain network to load into; it is copied, not changed. If None, ``rebuild`` builds it.
        form: ``"harmonic"``, ``"dense"``, or ``"factored"`` (in eval mode, the fastest form by `factor`).
        example_input: the input on which the factored form is timed and the dense form is compared; default: one input
            of the network's own size.
        rebuild: builds the plain network of the recorded source.

    Raises:
        InputError: the file is unreadable, contains NaN, or does not fit the network (the message names ten keys).
        UsageError: the network is unknown, the form is unknown, or the factored form needs an example input.
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
            raise type(error)(f"{path}: ", error.message) from error
    harmonic = harmonic_like(model, header.plan, str(path), header.blocks)
    del model  # a network that ``rebuild`` made is freed here
    stored = read_stored(path)
    if header.crc32 is not None and checksum(text, stored) != header.crc32:
        if any(codec_of(entry).entropy_coded for entry in header.codecs.entries.values()):
            raise InputError(f"{path} is damaged, or was changed after harmconvert wrote it: get the file again")
        remark = f"{path} is damaged, or was changed after harmconvert wrote it: verify it against its original"
        warnings.warn(remark, DamageWarning, stacklevel=2)
    _check_coded(harmonic, header, path)
    with input_errors(str(path)):
        state = decode_tensors(stored, header.codecs.entries)
    header = replace(header, codecs=header.codecs.with_streams(stored))
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
    """Raise InputError if a coded tensor does not fit the network, before memory is allocated for its values."""
    own = tensors_of(harmonic, keep_vars=True)
    for key, entry in header.codecs.entries.items():
        if key not in own or (not is_lazy(own[key]) and tuple(own[key].shape) != entry.shape):
            actual = f"the network's has {tuple(own[key].shape)}" if key in own else "the network has no such tensor"
            raise InputError(
                f"{path} does not fit this {type(harmonic).__name__}: its codec table says that {key} has shape "
                f"{entry.shape}, {actual}"
            )


def in_form(harmonic: nn.Module, form: str, example_input: Any = None) -> nn.Module:
    """Return a harmonic network in one of `FORMS`."""
    if form == "factored":
        return factor(harmonic.eval(), example_input)
    return fuse(harmonic, example_input) if form == "dense" else harmonic


def harmonic_like(
    model: nn.Module, plan: Plan, where: str, blocks: Mapping[str, BlockRecord] | None = None
) -> nn.Module:
    """Return a copy of a plain network with the harmonic convolutions and blocks of a plan, without their values.

    Raises:
        InputError: the network lacks a convolution of the plan; the message starts with ``where``.
    """
    complaint = f"{where} does not fit this {type(model).__name__}"
    known = all_layers(model)
    wrong = [p.name for p in plan.layers if p.name not in known or not fits(p, known[p.name])]
    if wrong:
        raise InputError(f"{complaint}: it has no such layer: {shortened(wrong)}")
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
    """Return the records of a network's blocks, by name."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)}
    return {
        name: BlockRecord(isinstance(block.norm, nn.BatchNorm2d), block.normalization, kernel_size(block))
        for name, block in blocks.items()
    }


def plan_in(model: nn.Module, known: Plan | None = None) -> Plan:
    """Return the plan that a network follows: ``known`` if its layers agree with it, else a plan read from them.

    The plan is empty if the network has only blocks.

    Raises:
        UsageError: no layer of the network is harmonic.
    """
    if _blocks_of(model) and not harmonic_layers(model):
        return Plan(())
    return plan_of_model(model, known)
