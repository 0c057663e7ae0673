"""The file: one self-describing .safetensors (DESIGN 9), written whole or not at all, read without running anything.

``<conv>.coefficients`` (O, I, F) stands in the place of ``<conv>.weight``, with ``<conv>.fitted_basis`` (F, K) beside
it where the basis is the layer's own; every other tensor keeps its key. The header's metadata entry ``harmconvert`` is
JSON: where the network came from, and its plan.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..documents import parsed, reading
from ..errors import DamageWarning, InputError, OutsideError, UsageError, shortened
from ..files import check_output
from ..kernels.basis import NORMALIZATIONS
from ..layers.block import HarmonicBlock2d, to_block
from ..network.checks import check_finite
from ..network.copying import deep_copy
from ..network.declared import check_preprocessing, declare, recorded
from ..network.exchange import put_in_place
from ..network.forms import dense_form, factor, fuse
from ..network.layers import convolutions, harmonic_layers, is_harmonic_layer, kernel_size, state_key, weighted_layers
from ..network.state import tensors_crc32, tensors_of
from ..plan import AXES, Plan, apply_plan, plan_of_model
from .history import check_history
from .source import Source, as_source, timm_source
from .weights import load_exactly, open_safetensors, untied_state, why_unreadable, write_tensors

FORMAT_VERSION = 1
METADATA_KEY = "harmconvert"
FORMS = ("harmonic", "dense", "factored")


@dataclass(frozen=True)
class BlockRecord:
    """How a `HarmonicBlock2d` stands in a network: whether it normalises, and the scale of its DCT kernels."""

    normalize: bool = True
    normalization: str = "ortho"

    @classmethod
    def from_json(cls, data: Any) -> BlockRecord:
        """Read what `dataclasses.asdict` wrote, or the bare ``normalize`` of files from before there was more."""
        if isinstance(data, bool):
            return cls(data)
        record = cls(bool(data["normalize"]), str(data["normalization"]))
        if record.normalization not in NORMALIZATIONS:
            raise ValueError(f"a block's normalization is {record.normalization!r}")
        return record


@dataclass(frozen=True)
class Header:
    """What a harmonic checkpoint says of itself. ``preprocessing`` is None in files from before it was recorded."""

    plan: Plan
    source: Source | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, BlockRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    crc32: str | None = None
    preprocessing: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; inverse of `from_json`."""
        return {
            "format_version": self.format_version,
            "source": asdict(self.source) if self.source else None,
            **self.plan.to_json(),
            "blocks": {name: asdict(block) for name, block in self.blocks.items()},
            "tied": dict(self.tied),
            "history": dict(self.history),
            "versions": dict(self.versions),
            "crc32": self.crc32,
            **({"preprocessing": dict(self.preprocessing)} if self.preprocessing else {}),
        }

    def checksum(self, tensors: Mapping[str, Tensor]) -> str:
        """CRC-32 of this header and the tensors that are in the file with it."""
        known = {key: value for key, value in self.to_json().items() if key != "crc32"}
        return tensors_crc32(tensors, json.dumps(known, sort_keys=True).encode())

    @property
    def calibrated(self) -> dict[str, str]:
        """Keys of the tensors that calibration wrote, each with the sha256 of what it wrote."""
        record = self.history.get("calibration")
        changed = record.get("changed") if isinstance(record, dict) else None
        return {str(k): str(v) for k, v in changed.items()} if isinstance(changed, dict) else {}

    @classmethod
    def from_json(cls, data: Any) -> Header:
        """Read what `to_json` wrote.

        Raises:
            InputError: an unknown format version or basis, or anything that is not such a header.
        """
        found = data.get("format_version") if isinstance(data, dict) else None
        if found != FORMAT_VERSION:
            raise InputError(
                f"it has format version {found!r}, this harmconvert reads version {FORMAT_VERSION}: update harmconvert"
            )
        source = Source.from_json(data["source"]) if data.get("source") else None
        try:
            check_history(data.get("history", {}))
            check_preprocessing(data.get("preprocessing"))
            return cls(
                Plan.from_json(data),
                source,
                {str(k): str(v) for k, v in data.get("tied", {}).items()},
                dict(data.get("history", {})),
                {str(k): str(v) for k, v in data.get("versions", {}).items()},
                {str(k): BlockRecord.from_json(v) for k, v in data.get("blocks", {}).items()},
                crc32=data.get("crc32"),
                preprocessing=data.get("preprocessing") or None,
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"its header is unreadable: {error}") from error


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
    source = as_source(source) or (header.source if header else None) or timm_source(model)
    versions = {name: version(name) for name in ("harmconvert", "torch", "timm")}
    record = {**(header.history if header else {}), **(history or {})}
    written = Header(plan, source, tied, record, versions, _blocks_of(model))
    written = replace(written, preprocessing=recorded(model, preprocessing))
    written = replace(written, crc32=written.checksum(tensors))
    text = json.dumps(written.to_json(), separators=(",", ":"))
    with reading(f"the header of {path} could not be read again"):
        parsed(text)
    metadata = {"format": "pt", METADATA_KEY: text}
    write_tensors(tensors, path, metadata, force, partial(_check_written, model=model, header=written))
    return written


def _check_written(staging: Path, model: nn.Module, header: Header) -> None:
    """Raise InputError where a file that was just written could not be loaded again as the network that it is of.

    Read back are its header and its tensors; what they are loaded into is made as `load` makes it, without values.
    """
    try:
        plain = dense_form(_without_values(model))
    except Exception:  # a part that cannot be copied without values
        plain = dense_form(model)
    structure = harmonic_like(plain, header.plan, "what would be written", header.blocks)
    wanted = {key: tuple(tensor.shape) for key, tensor in tensors_of(structure).items()}
    written = {key: tuple(tensor.shape) for key, tensor in tensors_of(model).items()}
    if differing := [key for key in {**wanted, **written} if wanted.get(key) != written.get(key)]:
        raise InputError(
            f"this {type(model).__name__} could not be loaded again: {shortened(differing)} would not be in the "
            "network that its plan makes; convert the network anew"
        )
    if read_header(staging).checksum(_read_tensors(staging)) != header.crc32:
        raise OutsideError("what was written is not what can be read back: the disk or the memory is faulty")


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a network whose parameters are on the meta device."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
        for tensor in model.parameters()
    }
    return deep_copy(model, memo)


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict


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
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if METADATA_KEY not in metadata:
            raise InputError(
                f"{path} is a safetensors file but no harmonic checkpoint: "
                f"name its network and give the weights with --checkpoint {path}"
            )
        try:
            data = parsed(metadata[METADATA_KEY])
        except ValueError as error:
            raise InputError(f"{path}: its header is not JSON: {error}") from error
        try:
            header = Header.from_json(data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  not a dict
    for key, wanted in _expected_tensors(header.plan).items():
        shape = shapes.get(key)
        if not _fits(shape, wanted) and not (shape is None and key in header.tied):
            raise _disagreement(path, key, wanted, shape)
    return header


def _expected_tensors(plan: Plan) -> dict[str, tuple[int | None, ...]]:
    """The tensors that the layers of a plan have in a file, by key: their shape, None for any length."""
    return {
        state_key(layer.name, tensor): shape
        for layer in plan.layers
        for kept in layer.keeps
        for tensor, shape in AXES[kept.axis].tensors(kept, layer.kernel_size).items()
    }


def _fits(shape: list[int] | None, wanted: tuple[int | None, ...]) -> bool:
    return (
        shape is not None
        and len(shape) == len(wanted)
        and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))
    )


def _disagreement(path: str | Path, key: str, wanted: tuple[int | None, ...], shape: list[int] | None) -> InputError:
    found = "it is missing" if shape is None else f"it has shape {shape}"
    text = ", ".join("any" if length is None else str(length) for length in wanted)
    return InputError(f"{path}: its header and tensors disagree: {key} should have shape [{text}], {found}")


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
    header = read_header(path)
    if model is None:
        if header.source is None or rebuild is None:
            raise UsageError(f"{path} does not say how to build its network: pass the plain network as model=")
        try:
            model = rebuild(header.source)
        except (InputError, UsageError) as error:
            raise type(error)(f"{path}: {error}") from error
    harmonic = harmonic_like(model, header.plan, str(path), header.blocks)
    del model  # where it was made for this, it is memory
    state = _read_tensors(path)
    if header.crc32 is not None and header.checksum(state) != header.crc32:
        remark = f"{path} is not as harmconvert wrote it: damaged, or changed since; verify it against its original"
        warnings.warn(remark, DamageWarning, stacklevel=2)
    state |= {alias: state[key] for alias, key in header.tied.items() if key in state}
    load_exactly(harmonic, state, str(path))
    del state
    with reading(str(path)):
        check_finite(harmonic)
    declare(harmonic, header.preprocessing)
    source = header.source or Source("unknown", str(path))
    return Network(in_form(harmonic, form, example_input), source, header)


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
        copied = put_in_place(copied, conv, to_block(conv, block.normalize, block.normalization))
    return copied


def _blocks_of(model: nn.Module) -> dict[str, BlockRecord]:
    """The blocks of a network that stand in the place of convolutions."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)}
    return {
        name: BlockRecord(isinstance(block.norm, nn.BatchNorm2d), block.normalization) for name, block in blocks.items()
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
