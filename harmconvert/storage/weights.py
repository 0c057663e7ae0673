"""State dicts in files and in networks: read without running code, written atomically, loaded strictly."""

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

from ..errors import Argument, InputError, Message, OutsideError, UsageError, counted, first_line, shortened
from ..files import outside_error, read_json, write_file
from ..network.classifier import classes_of_weights
from ..network.state import fill, loads_by_itself, state_of, take_dtypes, tensors_of
from ..network.state import weights_sha256 as weights_sha256
from .containers import Names, StateDict, names_in, state_dicts, with_key, without_wrapper
from .unpickling import UNREADABLE, placeholder_kind, read_weights_pickle, why_pickle_unreadable, why_tensor_refused

log = logging.getLogger(__name__)

_KEY = Argument("weights_key", "KEY")
Rename = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def read_weights(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors or .pth file; no code in the file is run.

    The state dict may be in a container of a training script; moving averages (EMA) come first. Prefixes of wrappers
    ("module.") are dropped if all names have them. For a checkpoint in several files, name its index (.index.json) in
    the same folder.

    Args:
        key: key of the state dict if the file has several: "model", or keys joined by dots.

    Raises:
        InputError: the file is unreadable, damaged, not a state dict, or a pickle that would run code.
    """
    first, *others = _states(path, key)
    if first.rank and others and first.rank == others[0].rank and first.ema == others[0].ema:
        keys = shortened([state.key for state in (first, *others)])
        raise InputError(f"{path} holds several state dicts ({keys}): say which one (", _KEY, ")")
    return without_wrapper(first.tensors)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename = lambda model, state: state,
) -> dict[str, str]:
    """Load the weights in a file that fit a network; return a record of what was loaded.

    Args:
        key: key of the state dict, as in `read_weights`; default: the first one that fits, moving averages first.
        prefix: prefix of the names to load; it is dropped. Default: a prefix without which all names fit.
        rename: changes the names of an older file to those of the network.

    Returns:
        The name of the ``file``, and, if there are any, the ``key``, the ``prefix`` and the names ``left_out``.

    Raises:
        InputError: the file is unreadable, no state dict in it fits the network, or several do.
    """
    states = _states(path, key)
    considered = [state for state in states if state.ema == states[0].ema]
    own = tensors_of(model)
    tries = [(state, _renamed(model, own, state, prefix, rename)) for state in considered]
    fitting = [one for one in tries if not _problems(own, names_in(own, one[1], prefix), one[1])]
    equal = [state.key for state, _ in fitting if (state.ema, state.rank) == (fitting[0][0].ema, fitting[0][0].rank)]
    if len(equal) > 1 and not fitting[0][0].ema:
        what = f"{path} holds several state dicts that fit ({shortened(equal)}): say which one ("
        raise InputError(what, _KEY, ")")
    state, tensors = (fitting or tries)[0]
    try:
        names = load_state(model, tensors, str(path), prefix=prefix)
    except InputError as error:
        others = [other.key for other in states if other is not state]
        if not state.path:
            raise
        more = (f"; it also holds {shortened(others)} (", _KEY, ")") if others else ()
        raise InputError(error.message, f" (its {state.key})", *more) from error
    left_out = shortened(list(names.beside), 3) if names.beside else ""
    record = {"file": Path(path).name, "key": state.key, "prefix": names.prefix, "left_out": left_out}
    return {what: text for what, text in record.items() if text}


def _renamed(
    model: nn.Module, own: Mapping[str, Tensor], state: StateDict, prefix: str | None, rename: Rename
) -> Mapping[str, Tensor]:
    """Return the tensors of a state dict, renamed if their names do not fit the network."""
    if prefix is not None or (names := names_in(own, state.tensors)).complete or names.uncertain:
        return state.tensors
    return rename(model, without_wrapper(state.tensors))


def _states(path: str | Path, key: str | None = None) -> list[StateDict]:
    """Return the state dicts of a file (at least one), the most likely one first."""
    if not isinstance(path, str | Path):
        raise UsageError(f"weights (={path!r:.80}) must be the path of a file")
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    if str(path).endswith(".index.json"):
        return _single_state(_read_shards(Path(path)), key, path)
    if Path(path).suffix == ".safetensors":
        with open_safetensors(path):
            return _single_state(safetensors.torch.load_file(path), key, path)
    content = _read_pth(path)
    states = state_dicts(content)
    if not states:
        if kind := placeholder_kind(content):
            raise InputError(
                f"{path} holds more than tensors, and reading it would run code: refused ({kind}); save its "
                "state_dict as .safetensors where you trust it"
            )
        keys = [str(key)[:80] for key in content] if isinstance(content, Mapping) else []
        named = f"; its keys are {shortened(keys)}" if keys else ""
        raise InputError(f"{path} holds no state dict (a mapping from names to tensors){named}")
    states = with_key(states, key, str(path)) if key is not None else states
    for state in states:
        for name, tensor in state.tensors.items():
            if not isinstance(name, str) or (reason := why_tensor_refused(tensor)):
                reason = reason if isinstance(name, str) else "is not a valid name of a tensor"
                raise InputError(f"{path}: {name!r:.80} {reason}")
    return states


def _single_state(tensors: Mapping[str, Tensor], key: str | None, path: str | Path) -> list[StateDict]:
    states = [StateDict((), tensors)]
    return states if key is None else with_key(states, key, str(path))


def _read_pth(path: str | Path) -> Any:
    try:
        return read_weights_pickle(path)
    except InputError:
        raise
    except UNREADABLE as error:
        if "GLOBAL" in str(error):
            raise InputError(
                f"{path} holds more than tensors, and reading it would run code: refused; save its state_dict as "
                f".safetensors where you trust it"
            ) from error
        raise InputError(f"{path} is not a readable .pth file: {why_pickle_unreadable(path, error)}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index names; each file must have exactly the tensors of its list."""
    try:
        places = read_json(index)["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not an index of weights: {first_line(error) or type(error).__name__}") from error
    state: dict[str, Tensor] = {}
    for name in names:
        if not name or name != Path(name).name or name.endswith(".index.json"):
            raise InputError(f"{index} names {name[:80]!r}, which is not a file in its folder: refused")
        part = _states(index.with_name(name))[0].tensors
        listed = {key for key, place in places.items() if place == name}
        if differing := sorted(listed ^ set(part)):
            raise InputError(f"{index} and {name} disagree on {shortened(differing)}: get the files again")
        state |= part
    if not state:
        raise InputError(f"{index} names no weights")
    return state


def open_safetensors(path: str | Path) -> Any:
    """Open a file with `safetensors.safe_open`.

    Raises:
        InputError: the file does not exist, is empty, or is not a safetensors file; the message says what it is.
    """
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}; get the file again") from error
    except OSError as error:
        raise outside_error(error, f"cannot read {path}") from error


def why_unreadable(path: str | Path) -> str | None:
    """Return why a file cannot contain weights, judged by its first bytes; None if it may."""
    path = Path(path)
    try:
        if not path.exists():
            return "does not exist"
        if not path.is_file():
            return "is not a regular file"
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise outside_error(error, f"cannot read {path}") from error
    text = start.lstrip().lower()
    if not start:
        return "is empty: get the file again"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run 'git lfs pull' where it came from"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: the download went wrong; get the file again"
    # The first eight bytes of a safetensors file can be anything; the ninth is the "{" of the header.
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        return Message("is a pickle, not safetensors: rename it to .pth and give it with ", Argument("weights"))
    return None


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    metadata: dict[str, str],
    force: bool,
    check: Callable[[Path], None] = lambda staging: None,
) -> None:
    """Write named tensors as .safetensors, atomically; ``check`` gets the staging file before it is renamed.

    Raises:
        UsageError: the output exists or cannot be a file.
        InputError: a tensor has a dtype that safetensors does not support.
        OutsideError: the disk is full or permission is missing.
    """

    def write(staging: Path) -> None:
        try:
            safetensors.torch.save_file(dict(tensors), staging, metadata)
        except KeyError as error:  # safetensors has no name for this dtype
            keys = [key for key, tensor in tensors.items() if tensor.dtype == error.args[0]]
            kind = str(error.args[0]).removeprefix("torch.")
            raise InputError(f"{shortened(keys)}: a safetensors file cannot hold {kind} values") from error
        check(staging)

    with saving(path):
        write_file(path, write, force)


@contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn the exception of safetensors for a full disk (it is not an OSError) into an OutsideError."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OutsideError(f"cannot write {path}: {error}; free some space or name another place") from error


def untied_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict with every tensor once and contiguous, and for each other key its first key.

    Raises:
        InputError: a tensor has no values (meta device), or a file cannot hold a value or a name.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_key: dict[int, str] = {}
    storages: set[int] = set()
    for key, value in state_of(model).items():
        if not isinstance(value, Tensor):
            raise InputError(f"{key} is a {type(value).__name__}, which a safetensors file cannot hold: only tensors")
        if value.is_meta:
            raise InputError(f"{key} has no values (meta device): load weights first")
        if value.layout != torch.strided or value.is_quantized:
            kind = f"{value.dtype} {'quantised' if value.is_quantized else value.layout}".replace("torch.", "")
            raise InputError(f"{key} is a {kind} tensor, which a safetensors file cannot hold: make it a plain tensor")
        if any("\ud800" <= letter <= "\udfff" for letter in key):
            raise InputError(f"a file cannot hold the name {key} (lone surrogates): rename that module")
        if id(value) in first_key:
            tied[key] = first_key[id(value)]
            continue
        first_key[id(value)] = key
        tensor = value.detach()
        # Two views of one storage become two tensors in the file.
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in storages and tensor.numel() > 0
        storages.add(storage)
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return tensors, tied


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str, *, prefix: str | None = None) -> Names:
    """Load a state dict strictly, in the dtypes of the file; return how its names map to the network's.

    Counters of batch norms and profilers may be missing or superfluous. If the network has methods or hooks of its own
    for loading, they are used.

    Args:
        prefix: prefix of the names to load; it is dropped. Default: a prefix without which all names fit.

    Raises:
        InputError: keys are missing, unexpected, of another shape or not floating point; the message names ten of each.
    """
    if not isinstance(state, Mapping):
        raise InputError(f"{where} holds a {type(state).__name__}, not a state dict")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{where}: {name!r:.80} is a {type(value).__name__}: a state dict has only named tensors")
    own = tensors_of(model, keep_vars=True)
    names = names_in(own, state, prefix)
    if not names.complete and prefix is None:  # a prefix under which only shapes differ makes the message clearer
        by_name = names_in(own, [*state])
        names = by_name if by_name.complete and not by_name.alternatives else names
    complaint = f"{where} does not fit this {type(model).__name__}"
    if names.alternatives:
        prefixes = shortened([repr(one) for one in (names.prefix, *names.alternatives)])
        what = f"{complaint}: its names fit under several prefixes, {prefixes}: say which ("
        raise InputError(what, Argument("strip_prefix"), ")")
    problems: list[str] = _problems(own, names, state)
    if any(tensor.is_meta for tensor in own.values()):
        problems.append("the network is on the meta device: build it on the CPU")
    elif loads_by_itself(model):
        renamed = dict(state)
        if names.complete:
            renamed = {name: state[in_file] for name, in_file in names.file_names.items()}
        refused = _load_by_itself(model, renamed)
        if not refused:
            return names if names.complete else Names("", {})
        problems = problems and [*problems, refused]
    if problems and names.uncertain:
        prefixes = shortened([repr(one) for one in names.uncertain])
        what = f"there are names that fit under {prefixes}: say which are meant ("
        problems.insert(0, Message(what, Argument("strip_prefix"), ")"))
    if problems:
        more = (part for problem in problems[1:] for part in ("; ", problem))
        raise InputError(f"{complaint}: ", problems[0], *more)
    fill(model, {name: state[in_file] for name, in_file in names.file_names.items()})
    return names


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict that came from `tensors_of` of the same network; raise InputError as `load_state` does.

    Modules with loading methods of their own may derive more values from the state dict, but they change no tensor.
    """
    own = tensors_of(model, keep_vars=True)
    if own.keys() != state.keys() or _problems(own, names_in(own, state), state):
        load_state(model, state, where)
        return
    if loads_by_itself(model):
        _load_by_itself(model, dict(state))
    fill(model, state)


def _problems(own: Mapping[str, Tensor], names: Names, state: Mapping[str, Tensor]) -> list[str]:
    """Return the reasons why the tensors of a file do not fit a network."""
    problems = []
    if names.missing:
        problems.append(f"missing: {shortened(list(names.missing))}")
    if names.unexpected:
        problems.append(f"unexpected: {shortened(list(names.unexpected))}")
    pairs = {key: (own[key], state[in_file]) for key, in_file in names.file_names.items() if not is_lazy(own[key])}
    shapes = {
        key: (tuple(tensor.shape), tuple(read.shape))
        for key, (tensor, read) in pairs.items()
        if read.shape != tensor.shape and (tensor.dim(), tuple(read.shape)) != (0, (1,))  # torch loads (1,) into ()
    }
    if shapes:
        differing = shortened([f"{key} {read} instead of {own}" for key, (own, read) in shapes.items()])
        problems.append(f"other shape: {differing}")
        if (classes := classes_of_weights(shapes)) is not None:
            what = f"the weights are for {counted(classes, 'class')}: build the network with as many ("
            problems.append(Message(what, Argument("arguments", {"num_classes": classes}), ")"))
    kinds = [
        f"{key} {str(read.dtype).removeprefix('torch.')}"
        for key, (tensor, read) in pairs.items()
        if tensor.is_floating_point() and not read.is_floating_point()
    ]
    if kinds:
        problems.append(f"not floating point (quantised?): {shortened(kinds)}")
    return problems


def _load_by_itself(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Let a network load a state dict with its own methods; return what it does not load, or an empty text.

    Its own `load_state_dict` is used only if the names are those of its own `state_dict`.
    """
    try:
        if type(model).load_state_dict is not nn.Module.load_state_dict and set(model.state_dict()) == set(state):
            model.load_state_dict(state)
            return ""
    except Exception as error:
        log.info(
            "the load_state_dict of %s fails, so its modules load one by one: %s",
            type(model).__name__, first_line(error),
        )  # fmt: skip
    take_dtypes(model, state)
    try:
        result = nn.Module.load_state_dict(model, state, strict=False)
    except Exception as error:
        return f"it does not load: {first_line(error) or type(error).__name__}"
    left = names_in(dict.fromkeys(result.missing_keys, torch.empty(0)), result.unexpected_keys)
    return "" if left.complete else f"it does not load {shortened([*left.missing, *left.unexpected])}"
