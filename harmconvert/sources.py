"""Source strings -> networks (DESIGN 1): where a network and its weights come from."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torchvision
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import Header, Source
from .copying import deep_copy
from .cost import bytes_of
from .downloads import reaching_out, torchvision_loading, torchvision_preprocessing
from .errors import HarmconvertError, InputError, UsageError, first_line
from .files import read_json
from .forms import fuse
from .reference import open_reference
from .samples import SAMPLES
from .surgery import pretrained_config
from .user_code import import_place
from .weights import load_state, read_weights, weights_sha256

SCHEMES = ("timm", "torchvision", "hf-hub", "local-dir", "sample", "reference")

# Arguments of timm.create_model that would open files or reach out, which a checkpoint has no business to ask for.
_REBUILT = ("timm", "torchvision", "sample", "code")
_NOT_FOR_REBUILDING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}

# What a folder's weights may be called; with .index.json at the end, a large network's index of several files.
_LOCAL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# A file of a few bytes may name a network of any size: it is built up to this size, and this many times the file's.
_LEAST_LIMIT, _MOST_PER_BYTE = 1 << 30, 64


@dataclass(frozen=True)
class Network:
    """A network, where it came from, and (for a harmonic checkpoint) what its file says of it."""

    model: nn.Module
    source: Source
    header: Header | None = None


def open_source(
    text: str,
    *,
    weights: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    form: str = "harmonic",
    trust_code: bool = False,
) -> Network:
    """The network that a source string names, with its weights, in eval mode.

    Args:
        text: ``NAME`` or ``timm:NAME``, ``torchvision:NAME``, ``hf-hub:USER/REPO``, ``local-dir:PATH``,
            ``package.module:factory``, ``file.py:factory``, ``sample:NAME``, ``reference:FILE`` (a checkpoint of the
            reference implementation: `harmconvert.reference`), or the path of a harmonic checkpoint.
        weights: a .safetensors or .pth file that replaces the weights (never unpickled beyond plain tensors).
        arguments: keyword arguments for the network's maker, such as num_classes.
        pretrained: False leaves the weights at random, for looking at sizes.
        form: of a checkpoint, harmonic or reference: ``"harmonic"`` or ``"dense"``.
        trust_code: let a harmonic checkpoint name user code to build its network with, and run that.

    Raises:
        UsageError: a source that names nothing.
        InputError: weights that are unreadable or do not fit.
        OutsideError: the network is needed and not there, or a package is missing.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{text!r} is not UTF-8, and a checkpoint would have to name it: rename it")
    if text.startswith("reference:"):
        given = parse_source(text, arguments)
        if weights is not None or {*given.arguments} - {"pool"}:
            raise UsageError(f"{text} is a checkpoint: it takes neither other weights nor arguments, but for pool")
        model, source, found = open_reference(given.name, given.arguments, form)
        return Network(model.eval(), source, found)
    if is_checkpoint_path(text):
        header = checkpoint.read_header(text)
        model = load(text, form=form, trust_code=trust_code)
        if weights is not None or arguments:
            raise UsageError(f"{text} is a harmonic checkpoint: it takes neither other weights nor arguments")
        return Network(model.eval(), header.source or Source("unknown", text), header)
    source = _with_weights_name(parse_source(text, arguments))
    if weights is not None:
        state = read_weights(weights)
        model, source = _build(source)
        if source.scheme == "torchvision" and set(state) != set(model.state_dict()):
            # Trained from scratch, perhaps: the untrained structure may be the one that fits.
            plain = replace(source, name=source.name.partition(".")[0])
            other = _build(plain)[0]
            if set(state) == set(other.state_dict()):
                model, source = other, plain
        load_state(model, _renamed(model, state), str(weights))
    else:
        model, source = _build(source, pretrained=pretrained)
    return Network(model.eval(), replace(source, sha256=weights_sha256(model)))


def open_counterpart(text: str, original: Network) -> nn.Module:
    """The network to compare with an original: a harmonic checkpoint or plain weights of its, or any other source.

    The original's own structure is filled where ``text`` is a file, so nothing that the file names is built or run.

    Raises: as `open_source`.
    """
    if not Path(text).is_file() or ".py:" in text:
        return open_source(text).model
    plain = fuse(original.model) if original.header else original.model
    if not checkpoint.is_harmonic(text):
        with_weights = deep_copy(plain)
        load_state(with_weights, _renamed(with_weights, read_weights(text)), text)
        return with_weights
    return checkpoint.load(text, model=plain).eval()


def open_original(header: Header, teacher: str | None = None, trust_code: bool = False) -> nn.Module:
    """The uncut network that a harmonic checkpoint was converted from, with its weights, in eval mode.

    Args:
        teacher: a source, or a file of weights for the recorded structure; None opens the recorded source, whose
            weights must be those that were converted.

    Raises: as `open_source`; InputError where the weights are others.
    """
    if teacher is not None and not Path(teacher).is_file():
        return open_source(teacher, form="dense", trust_code=trust_code).model
    if teacher is not None and checkpoint.is_harmonic(teacher):
        return load(teacher, form="dense", trust_code=trust_code).eval()
    source = header.source
    if source is None:
        raise UsageError("the checkpoint does not say what network it was: name the uncut one with --teacher SOURCE")
    if teacher is not None:
        model = rebuild(source, trust_code)
        load_state(model, _renamed(model, read_weights(teacher)), teacher)
        return model.eval()
    if source.sha256 is None:
        raise UsageError(
            f"the checkpoint was not converted from weights of {source} that it knows, so there is no uncut network to "
            "compare it with: name one with --teacher SOURCE"
        )
    rebuild(source, trust_code)  # refuses what a file has no business to ask for
    arguments = dict(source.arguments)
    if source.scheme != "reference":  # a hub and a folder say theirs; of a reference file it tells how it was read
        arguments.pop("architecture", None)
    model, opened = _build(replace(source, arguments=arguments, sha256=None), pretrained=True)
    if (opened.sha256 or weights_sha256(model)) != source.sha256:
        raise InputError(f"the weights of {source} are not those that were converted: name them with --teacher")
    return model.eval()


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    form: str = "harmonic",
    example_input: Any = None,
    trust_code: bool = False,
) -> nn.Module:
    """Read a harmonic checkpoint, rebuilding the network that its source names unless ``model`` is given.

    Args:
        model: the plain network to fill (for the user's own code); it is copied, not changed.
        form: ``"harmonic"``, ``"dense"``, or ``"factored"``: in eval mode, as `factor` finds it to be fastest here.
        example_input: what the factored form is to be fast at; default: one input of the network's own size.
        trust_code: rebuild from user code that the file names. Off, because that would run what a file says.

    Raises:
        InputError: the file is unreadable or does not fit; UsageError: no network to fill, or an unknown form.
    """
    return checkpoint.load(
        path, model=model, form=form, example_input=example_input,
        rebuild=lambda source: rebuild(source, trust_code, _LEAST_LIMIT + _MOST_PER_BYTE * Path(path).stat().st_size),
    )  # fmt: skip


def rebuild(source: Source, trust_code: bool = False, limit: int | None = None) -> nn.Module:
    """The network that a recorded source names, its weights still to be loaded. Needs no network.

    ``limit``: bytes that its tensors may take, where a file that may be anybody's names it.

    Raises:
        UsageError: the source is user code and ``trust_code`` is not set; InputError: it cannot be built.
    """
    if source.scheme == "code" and not trust_code:
        raise UsageError(
            f"this checkpoint's network is made by user code ({source.name}), which is not run unasked: "
            "pass the plain network as model=, or --trust-code if you know the file"
        )
    try:
        if "architecture" in source.arguments:  # hubs and folders: what their config said is recorded
            arguments = dict(source.arguments)
            if not timm.is_model(str(arguments["architecture"])) or {*arguments} & _NOT_FOR_REBUILDING:
                raise InputError(f"the recorded source {source} asks for more than a timm architecture: refused")
            build = partial(timm.create_model, arguments.pop("architecture"), pretrained=False, **arguments)
        elif {*source.arguments} & _NOT_FOR_REBUILDING or source.scheme not in _REBUILT:
            raise InputError(f"the recorded source {source} asks for more than its structure: refused; pass model=")
        else:
            build = partial(_built, source)
        size = bytes_of(build) if limit is not None and source.scheme != "code" else None
        if limit is not None and size is not None and size > limit:
            raise InputError(
                f"the recorded source {source} is a network of {size:,} bytes, far more than the file holds: refused"
            )
        return cast(nn.Module, build())
    except HarmconvertError:
        raise
    except Exception as error:
        raise InputError(f"the recorded source {source} cannot be built: {first_line(error)}; pass model=") from error


def is_harmonic_source(text: str) -> bool:
    """Whether a source string names a file that holds a harmonic network, as far as can be told without opening it."""
    return text.startswith("reference:") or (Path(text).is_file() and checkpoint.is_harmonic(text))


def is_checkpoint_path(text: str) -> bool:
    """Whether a source string is a path to a harmonic checkpoint, by its looks; says what to do with a .pth."""
    if text.endswith((".pth", ".pt", ".bin", ".ckpt", ".index.json")) and Path(text).exists():
        raise UsageError(f"{text} holds weights only: name its network, and give the weights with --checkpoint {text}")
    return text.endswith(".safetensors") or (Path(text).is_file() and ":" not in text)


def parse_source(text: str, arguments: Mapping[str, Any] | None = None) -> Source:
    """Split a source string into scheme and name.

    >>> parse_source("torchvision:resnet18").scheme, parse_source("resnet50").scheme, parse_source("net.py:make").scheme
    ('torchvision', 'timm', 'code')
    """
    scheme, colon, name = text.partition(":")
    arguments = dict(arguments or {})
    scheme = scheme.replace("_", "-")
    if colon and scheme in SCHEMES:
        if not name:
            raise UsageError(f"source {text!r} names nothing after '{scheme}:'")
        return Source(scheme, name, arguments)
    if colon:
        return Source("code", text, arguments)
    return Source("timm", text, arguments)


def _built(source: Source) -> nn.Module:
    return _build(source)[0]


def _build(source: Source, pretrained: bool = False) -> tuple[nn.Module, Source]:
    maker = cast(
        "Callable[[Source, bool], tuple[nn.Module, Source]]", globals()[f"_from_{source.scheme.replace('-', '_')}"]
    )
    return maker(source, pretrained)


def _from_timm(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    if not timm.is_model(source.name):
        raise UsageError(f"timm has no model {source.name!r}{_close(source.name, timm.list_models())}")
    with reaching_out(str(source)):
        model = timm.create_model(source.name, pretrained=pretrained, **source.arguments)
    return model, replace(source, licence=pretrained_config(model).get("license"))


def _from_hf_hub(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    with reaching_out(str(source)):
        _, architecture, model_arguments = timm.models.load_model_config_from_hf(source.name)
        model = timm.create_model(f"hf-hub:{source.name}", pretrained=pretrained, **source.arguments)
    return model, _with_config(source, model, architecture, model_arguments)


def _from_local_dir(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    config = Path(source.name) / "config.json"
    try:
        content = read_json(config)
        architecture = str(content["architecture"])
    except FileNotFoundError as error:
        raise InputError(f"{source.name} is no timm folder: it has no config.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config} is unreadable: {first_line(error)}; get the folder again") from error
    try:
        model = timm.create_model(f"local-dir:{source.name}", pretrained=False, **source.arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{config} makes no network: {first_line(error)}") from error
    paths = [Path(source.name) / f"{name}{end}" for end in ("", ".index.json") for name in _LOCAL_WEIGHTS]
    files = [path for path in paths if path.exists()]
    if pretrained and not files:
        raise InputError(f"{source.name} has no weights: neither {' nor '.join(_LOCAL_WEIGHTS)}")
    if pretrained:
        load_state(model, _renamed(model, read_weights(files[0])), str(files[0]))
    return model, _with_config(source, model, architecture, content.get("model_args") or {})


def _from_torchvision(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    """``NAME.WEIGHTS`` is built as for those weights, whose networks differ from untrained ones in more than values
    (frozen norms, auxiliary heads, input transforms); ``NAME`` is the untrained structure."""
    name, _, tag = source.name.partition(".")
    builder = torchvision.models.get_model_builder(name)
    weights = torchvision.models.get_model_weights(name)
    try:
        chosen = weights[tag or "DEFAULT"]
    except KeyError as error:
        known = ", ".join(w.name for w in weights)
        raise UsageError(f"torchvision:{name} has no weights {tag!r}: there are {known}") from error
    arguments: dict[str, Any] = dict(source.arguments)
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments = {"weights_backbone": None, **arguments}
    with reaching_out(str(source)), torchvision_loading(fetch=pretrained):
        model = builder(weights=chosen if tag else None, **arguments)
    if not hasattr(model, "pretrained_cfg") and (cfg := torchvision_preprocessing(builder.__module__, chosen)):
        model.pretrained_cfg = cfg
    return model, source


def _with_weights_name(source: Source) -> Source:
    """``torchvision:NAME`` means its default weights; their name is recorded, because defaults change."""
    if source.scheme != "torchvision" or "." in source.name:
        return source
    if source.name not in torchvision.models.list_models():
        raise UsageError(
            f"torchvision has no model {source.name!r}{_close(source.name, torchvision.models.list_models())}"
        )
    return replace(source, name=f"{source.name}.{torchvision.models.get_model_weights(source.name)['DEFAULT'].name}")


def _from_sample(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    if source.name not in SAMPLES:
        raise UsageError(f"there is no sample {source.name!r}: use one of {', '.join(SAMPLES)}")
    sample = SAMPLES[source.name]
    model = sample.build()
    if pretrained:
        load_state(model, sample.weights(), str(source))
    elif "num_classes" in source.arguments:  # fine-tuned for other classes
        cast(Any, model).reset_classifier(source.arguments["num_classes"])
    return model, replace(source, licence=sample.licence)


def _from_reference(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    return open_reference(source.name, source.arguments, "dense")[:2]


def _from_code(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    """The user's own factory: any weights it gives its network are the pretrained ones."""
    place, _, factory = source.name.rpartition(":")
    try:
        module = import_place(place, SCHEMES)
    except HarmconvertError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {place}: {error}; known schemes are {', '.join(SCHEMES)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{place} fails when imported: {type(error).__name__}: {first_line(error)}") from error
    if not callable(getattr(module, factory, None)):
        raise UsageError(f"{place} has no function {factory!r}")
    try:
        model = getattr(module, factory)(**source.arguments)
    except (Exception, SystemExit) as error:
        raise InputError(f"{source.name} fails: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{source.name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model, source


def _renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under this network's keys: timm's own filter helps where an older file's keys differ."""
    if set(state) == set(model.state_dict()):
        return state
    if not type(model).__module__.startswith("timm."):
        return state
    rename = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if rename is None:
        return state
    try:
        return dict(rename(dict(state), model))
    except Exception:
        return state  # the complaint about the file's own keys says more


def _with_config(source: Source, model: nn.Module, architecture: str, model_arguments: Mapping[str, Any]) -> Source:
    """The source with all that is needed to build the network again without the hub or the folder."""
    recorded = {"architecture": architecture, **model_arguments, **source.arguments}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        recorded["num_classes"] = classes
    return replace(source, arguments=recorded, licence=pretrained_config(model).get("license"))


def _close(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name.partition(".")[0], names, 3)
    return (
        f": did you mean {', '.join(matches)}?"
        if matches
        else "; other schemes are torchvision:, hf-hub:, local-dir:, sample:"
    )
