"""State dicts in files and in networks: read without running anything, written whole, loaded strictly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import InputError, OutsideError, UsageError, first_line, shortened
from ..files import outside, read_json, write_file
from ..network.state import fill, loads_by_itself, state_of, take_dtypes, tensors_of
from ..network.state import weights_sha256 as weights_sha256
from .containers import Names, StateDict, names_in, state_dicts, with_key, without_wrapper
from .unpickling import UNREADABLE, Placeholder, weights_content, why_no_values, why_not_read

log = logging.getLogger(__name__)

Rename = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def read_weights(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pth file; reading it runs nothing, whatever the environment.

    Containers of training scripts are opened, moving averages (EMA) first, and the prefixes of wrappers ("module.")
    are dropped where all names have them. A checkpoint in several files is named by its index (.index.json), beside
    which they lie.

    Args:
        key: of the container, where the file holds several: "model", or keys joined by dots.

    Raises:
        InputError: unreadable, damaged, not a state dict, or a pickle that would run code.
    """
    first, *others = _states(path, key)
    if first.rank and others and first.rank == others[0].rank and first.ema == others[0].ema:
        keys = shortened([state.key for state in (first, *others)])
        raise InputError(f"{path} holds several state dicts ({keys}): say which one (key=, --checkpoint-key KEY)")
    return without_wrapper(first.tensors)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename = lambda model, state: state,
) -> dict[str, str]:
    """Load the weights in a file that fit a network, and say which they were.

    Args:
        key: of the container, as in `read_weights`; default: the first whose tensors fit, moving averages before all.
        prefix: of the names to take, which is dropped; default: one that makes all names fit, where they do not.
        rename: from the names of an older file to those of the network.

    Returns:
        The name of the file, and where there are such the ``key``, the ``prefix`` and the tensors ``left_out``.

    Raises:
        InputError: unreadable, or nothing in the file fits the network, or several parts of it do.
    """
    states = _states(path, key)
    considered = [state for state in states if state.ema == states[0].ema]
    own = tensors_of(model)
    tries = [(state, _renamed(model, own, state, prefix, rename)) for state in considered]
    fitting = [one for one in tries if not _problems(own, names_in(own, one[1], prefix), one[1])]
    rivals = [state.key for state, _ in fitting if (state.ema, state.rank) == (fitting[0][0].ema, fitting[0][0].rank)]
    if len(rivals) > 1 and not fitting[0][0].ema:
        raise InputError(
            f"{path} holds several state dicts that fit ({shortened(rivals)}): say which one (--checkpoint-key KEY)"
        )
    state, tensors = (fitting or tries)[0]
    try:
        names = load_state(model, tensors, str(path), prefix=prefix)
    except InputError as error:
        others = [other.key for other in states if other is not state]
        if not state.path:
            raise
        more = f"; it also holds {shortened(others)} (--checkpoint-key KEY)" if others else ""
        raise InputError(f"{error} (its {state.key}){more}") from error
    left_out = shortened(list(names.beside), 3) if names.beside else ""
    record = {"file": Path(path).name, "key": state.key, "prefix": names.prefix, "left_out": left_out}
    return {what: text for what, text in record.items() if text}


def _renamed(
    model: nn.Module, own: Mapping[str, Tensor], state: StateDict, prefix: str | None, rename: Rename
) -> Mapping[str, Tensor]:
    """The tensors under names that may lead to the network's."""
    if prefix is not None or (names := names_in(own, state.tensors)).complete or names.possible:
        return state.tensors
    return rename(model, without_wrapper(state.tensors))


def _states(path: str | Path, key: str | None = None) -> list[StateDict]:
    """The state dicts of a file, that which is meant unless something else says so first; there is one at least."""
    if not isinstance(path, str | Path):
        raise UsageError(f"weights (={path!r:.80}) must be the path of a file")
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    if str(path).endswith(".index.json"):
        return _of_one(_read_shards(Path(path)), key, path)
    if Path(path).suffix == ".safetensors":
        with open_safetensors(path):
            return _of_one(safetensors.torch.load_file(path), key, path)
    content = _pickled(path)
    found = state_dicts(content)
    if not found:
        if kind := _foreign(content):
            raise InputError(
                f"{path} holds more than tensors, and reading it would run code: refused ({kind}); save its "
                "state_dict as .safetensors where you trust it"
            )
        keys = [str(key)[:80] for key in content] if isinstance(content, Mapping) else []
        named = f"; its keys are {shortened(keys)}" if keys else ""
        raise InputError(f"{path} holds no state dict (a mapping from names to tensors){named}")
    found = with_key(found, key, str(path)) if key is not None else found
    for state in found:
        for name, tensor in state.tensors.items():
            if not isinstance(name, str) or (reason := why_no_values(tensor)):
                reason = reason if isinstance(name, str) else "is no name of a tensor"
                raise InputError(f"{path}: {name!r:.80} {reason}")
    return found


def _of_one(tensors: Mapping[str, Tensor], key: str | None, path: str | Path) -> list[StateDict]:
    states = [StateDict((), tensors)]
    return states if key is None else with_key(states, key, str(path))


def _pickled(path: str | Path) -> Any:
    try:
        return weights_content(path)
    except InputError:
        raise
    except UNREADABLE as error:
        if "GLOBAL" in str(error):
            raise InputError(
                f"{path} holds more than tensors, and reading it would run code: refused; save its state_dict as "
                f".safetensors where you trust it"
            ) from error
        raise InputError(f"{path} is not a readable .pth file: {why_not_read(path, error)}") from error


def _foreign(content: Any, depth: int = 5) -> str | None:
    """The class of an object in a file that is neither a tensor nor a plain container."""
    if isinstance(content, Placeholder):
        return f"an object of the class {content.kind[:80]}"
    if isinstance(content, Mapping) and depth:
        return next((kind for value in content.values() if (kind := _foreign(value, depth - 1))), None)
    return None


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index places in files beside it, each file holding just those that it should."""
    try:
        places = read_json(index)["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights: {first_line(error) or type(error).__name__}") from error
    state: dict[str, Tensor] = {}
    for name in names:
        if not name or name != Path(name).name or name.endswith(".index.json"):
            raise InputError(f"{index} names {name[:80]!r}, which is no file beside it: refused")
        part = _states(index.with_name(name))[0].tensors
        wanted = {key for key, place in places.items() if place == name}
        if differing := sorted(wanted ^ set(part)):
            raise InputError(f"{index} and {name} disagree on {shortened(differing)}: get the files again")
        state |= part
    if not state:
        raise InputError(f"{index} names no weights")
    return state


def open_safetensors(path: str | Path) -> Any:
    """`safetensors.safe_open`, with a plain word about what the file is where it is none.

    Raises:
        InputError: no such file, empty, or something else.
    """
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}; get the file again") from error
    except OSError as error:
        raise outside(error, f"cannot read {path}") from error


def why_unreadable(path: str | Path) -> str | None:
    """Why no weights can be in a file, judged by its first bytes; None where they may be."""
    path = Path(path)
    try:
        if not path.exists():
            return "does not exist"
        if not path.is_file():
            return "is not a regular file"
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise outside(error, f"cannot read {path}") from error
    text = start.lstrip().lower()
    if not start:
        return "is empty: get the file again"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run 'git lfs pull' where it came from"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: the download went wrong; get the file again"
    # A safetensors file starts with any eight bytes, but its ninth opens the header.
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        return "is a pickle, not safetensors: rename it to .pth and give it with --checkpoint"
    return None


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    metadata: dict[str, str],
    force: bool,
    check: Callable[[Path], None] = lambda staging: None,
) -> None:
    """Write named tensors as .safetensors, by way of a staging file that is ``check``ed; raises as `save` does."""

    def write(staging: Path) -> None:
        try:
            safetensors.torch.save_file(dict(tensors), staging, metadata)
        except KeyError as error:  # a dtype that the format has no name for
            keys = [key for key, tensor in tensors.items() if tensor.dtype == error.args[0]]
            kind = str(error.args[0]).removeprefix("torch.")
            raise InputError(f"{shortened(keys)}: no safetensors file can hold {kind} values") from error
        check(staging)

    with saving(path):
        write_file(path, write, force)


@contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """What safetensors raises when a disk is full is no OSError; here it is an OutsideError, as others are."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OutsideError(f"cannot write {path}: {error}; free some space or name another place") from error


def untied_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every tensor once and contiguous, and which keys are another name of which.

    Raises:
        InputError: a tensor without values (meta device), or a value or a name that no file can hold.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_key: dict[int, str] = {}
    storages: set[int] = set()
    for key, value in state_of(model).items():
        if not isinstance(value, Tensor):
            raise InputError(f"{key} is no tensor but a {type(value).__name__}, which no safetensors file can hold")
        if value.is_meta:
            raise InputError(f"{key} has no values (meta device): load weights first")
        if value.layout != torch.strided or value.is_quantized:
            kind = f"{value.dtype} {'quantised' if value.is_quantized else value.layout}".replace("torch.", "")
            raise InputError(f"{key} is a {kind} tensor, which no safetensors file can hold: make it a plain one")
        if any("\ud800" <= letter <= "\udfff" for letter in key):
            raise InputError(f"{key} is no name that a file can hold (lone surrogates): rename that module")
        if id(value) in first_key:
            tied[key] = first_key[id(value)]
            continue
        first_key[id(value)] = key
        tensor = value.detach()
        # Two views of one storage are two tensors in a file.
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in storages and tensor.numel() > 0
        storages.add(storage)
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return tensors, tied


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str, *, prefix: str | None = None) -> Names:
    """Load a state dict strictly, in the dtypes it has, and say how its names led to the network's.

    Counters of batch norms and profilers may be missing, or be there in vain. A network that reads state dicts in its
    own way (methods or hooks for loading) does so here.

    Args:
        prefix: of the names to take, which is dropped; default: one that makes all names fit, where they do not.

    Raises:
        InputError: keys missing, unexpected, of another shape or not floating point; the first ten of each are named.
    """
    if not isinstance(state, Mapping):
        raise InputError(f"{where} holds no state dict but a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{where}: {name!r:.80} is a {type(value).__name__}: a state dict has named tensors alone")
    own = tensors_of(model, keep_vars=True)
    names = names_in(own, state, prefix)
    complaint = f"{where} does not fit this {type(model).__name__}"
    if names.rivals:
        found = shortened([repr(one) for one in (names.prefix, *names.rivals)])
        raise InputError(f"{complaint}: its names fit under several prefixes, {found}: say which (--strip-prefix)")
    problems = _problems(own, names, state)
    if any(tensor.is_meta for tensor in own.values()):
        problems.append("the network is on the meta device: build it on the CPU")
    elif loads_by_itself(model):
        renamed = {name: state[theirs] for name, theirs in names.of.items()} if names.complete else dict(state)
        refused = _load_by_itself(model, renamed)
        if not refused:
            return names if names.complete else Names("", {})
        problems = problems and [*problems, refused]
    if problems and names.possible:
        found = shortened([repr(one) for one in names.possible])
        problems.insert(0, f"there are names that fit under {found}: say which are meant (--strip-prefix)")
    if problems:
        raise InputError(f"{complaint}: {'; '.join(problems)}")
    fill(model, {name: state[theirs] for name, theirs in names.of.items()})
    return names


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict that was made of the network's `tensors_of`; raises as `load_state`.

    Parts that read state dicts in their own way may derive other values from theirs, and do, but change none of them.
    """
    own = tensors_of(model, keep_vars=True)
    if own.keys() != state.keys() or _problems(own, names_in(own, state), state):
        load_state(model, state, where)
        return
    if loads_by_itself(model):
        _load_by_itself(model, dict(state))
    fill(model, state)


def _problems(own: Mapping[str, Tensor], names: Names, state: Mapping[str, Tensor]) -> list[str]:
    """Why tensors of a file cannot be those of a network."""
    problems = []
    if names.missing:
        problems.append(f"missing: {shortened(list(names.missing))}")
    if names.unexpected:
        problems.append(f"unexpected: {shortened(list(names.unexpected))}")
    pairs = {key: (own[key], state[theirs]) for key, theirs in names.of.items() if not is_lazy(own[key])}
    shapes = [
        f"{key} {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
        for key, (ours, theirs) in pairs.items()
        if theirs.shape != ours.shape and (ours.dim(), tuple(theirs.shape)) != (0, (1,))  # torch loads that, too
    ]
    if shapes:
        problems.append(f"other shape: {shortened(shapes)}")
    kinds = [
        f"{key} {str(theirs.dtype).removeprefix('torch.')}"
        for key, (ours, theirs) in pairs.items()
        if ours.is_floating_point() and not theirs.is_floating_point()
    ]
    if kinds:
        problems.append(f"not floating point (quantised?): {shortened(kinds)}")
    return problems


def _load_by_itself(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Let a network load a state dict in its own way; says what is wrong where it does not take it, or not all of it.

    A `load_state_dict` of its own is used for what its own `state_dict` calls its tensors.
    """
    try:
        if type(model).load_state_dict is not nn.Module.load_state_dict and set(model.state_dict()) == set(state):
            model.load_state_dict(state)
            return ""
    except Exception as error:
        log.info("the load_state_dict of %s fails, its parts are loaded: %s", type(model).__name__, first_line(error))
    take_dtypes(model, state)
    try:
        found = nn.Module.load_state_dict(model, state, strict=False)
    except Exception as error:
        return f"it does not load: {first_line(error) or type(error).__name__}"
    left = names_in(dict.fromkeys(found.missing_keys, torch.empty(0)), found.unexpected_keys)
    return "" if left.complete else f"it does not load {shortened([*left.missing, *left.unexpected])}"
