"""Source strings -> networks (DESIGN 1): where a network and its weights come from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from ..errors import Argument, HarmconvertError, InputError, UsageError, first_line, shortened
from ..network.copying import deep_copy
from ..network.forms import dense_form
from ..network.state import tensors_of, weights_sha256
from ..storage.checkpoint import Header, Network, is_harmonic, read_checkpoint, read_header
from ..storage.source import Source, as_source
from ..storage.source import parse_source as parse_source
from ..storage.tensors import memory_limit
from ..storage.weights import load_weights
from ..user_code import functions_in
from .limits import built_within
from .makers import build, built, declare_size, renamed, with_weights_name
from .reference import open_reference

log = logging.getLogger(__name__)

# Arguments of timm.create_model that would open files or reach out, which a checkpoint has no business to ask for.
_REBUILT = ("timm", "torchvision", "sample", "code")
_NOT_FOR_REBUILDING = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def open_source(
    text: str,
    *,
    weights: str | Path | None = None,
    weights_key: str | None = None,
    strip_prefix: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    form: str = "harmonic",
    trust_code: bool = False,
    code: str | None = None,
) -> Network:
    """The network that a source string names, with its weights, in eval mode.

    Args:
        text: ``NAME`` or ``timm:NAME``, ``torchvision:NAME``, ``hf-hub:USER/REPO``, ``local-dir:PATH``,
            ``package.module:factory``, ``file.py:factory``, ``sample:NAME``, ``reference:FILE`` (a checkpoint of the
            reference implementation: `harmconvert.sources.reference`), or the path of a harmonic checkpoint.
        weights: a .safetensors or .pth file that replaces the weights (never unpickled beyond plain tensors).
        weights_key, strip_prefix: what to take of that file, as ``key`` and ``prefix`` of `load_weights`.
        arguments: keyword arguments for the network's maker, such as num_classes.
        pretrained: False leaves the weights at random, for looking at sizes.
        form: of a checkpoint, harmonic or reference: ``"harmonic"`` or ``"dense"``.
        trust_code: let a harmonic checkpoint name user code to build its network with, and run that.
        code: ``file.py:factory`` that makes the network of a harmonic checkpoint, whatever the checkpoint names.

    Raises:
        UsageError: a source that names nothing.
        InputError: weights that are unreadable or do not fit.
        OutsideError: the network is needed and not there, or a package is missing.
    """
    text = str(text) if isinstance(text, Path) else text
    if not isinstance(text, str):
        raise UsageError(f"source (={text!r:.80}) must be a text such as 'resnet50' or 'FILE.py:FACTORY'")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UsageError(f"arguments (={arguments!r:.80}) must be a dict, such as {{'num_classes': 10}}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{text!r} is not UTF-8, and a checkpoint would have to name it: rename it")
    if weights is None and (weights_key is not None or strip_prefix is not None):
        raise UsageError("a key or a prefix (--checkpoint-key, --strip-prefix) is of a file of weights: name that, too")
    if text.startswith("reference:"):
        given = parse_source(text, arguments)
        if weights is not None or {*given.arguments} - {"pool"}:
            raise UsageError(f"{text} is a checkpoint: it takes neither other weights nor arguments, but for pool")
        model, source, found = open_reference(given.name, given.arguments, form)
        return Network(model.eval(), source, found)
    if is_checkpoint_path(text):
        return _open_checkpoint(text, weights, arguments, form, trust_code, code)
    if code is not None:
        raise UsageError(f"{text} is no harmonic checkpoint: {code} would be its network; name that as the source")
    source = with_weights_name(parse_source(text, arguments))
    if weights is not None:
        model, source = _with_weights(source, weights, weights_key, strip_prefix)
    else:
        model, source = build(source, pretrained=pretrained)
    return Network(model.eval(), replace(source, sha256=weights_sha256(model)))


def _open_checkpoint(
    path: str,
    weights: str | Path | None,
    arguments: Mapping[str, Any] | None,
    form: str,
    trust_code: bool,
    code: str | None,
) -> Network:
    """A harmonic checkpoint, its network made by ``code`` where that is given: to name code is to trust it."""
    header = read_header(path)
    if weights is not None or (arguments and code is None):
        raise UsageError(f"{path} is a harmonic checkpoint: it takes neither other weights nor arguments")
    if code is None:
        network = read(path, form=form, trust_code=trust_code)
        network.model.eval()
        return network
    recorded = header.source or Source("code", code)
    given = parse_source(code, arguments or (recorded.arguments if recorded.scheme == "code" else None))
    if given.scheme != "code":
        raise UsageError(f"{code} is no user code: name FILE.py:FACTORY or package.module:factory")
    source = replace(recorded, scheme="code", name=given.name, arguments=given.arguments)
    loaded = read_checkpoint(path, model=built(source), form=form)
    return Network(loaded.model.eval(), source, replace(header, source=source))


def _with_weights(source: Source, weights: str | Path, key: str | None, prefix: str | None) -> tuple[nn.Module, Source]:
    """The network of a source with the weights in a file, and the source that says so."""

    def filled(source: Source) -> tuple[nn.Module, Source]:
        model, source = build(source)
        taken = load_weights(model, weights, key=key, prefix=prefix, rename=renamed)
        return model, replace(source, weights=taken)

    if source.scheme != "torchvision":
        return filled(source)
    # Trained from scratch, perhaps: the untrained structure may be the one that fits.
    plain = replace(source, name=source.name.partition(".")[0])
    try:
        return filled(source)
    except InputError as error:
        log.info("%s does not fit %s, the untrained structure is tried: %s", weights, source, error)
        try:
            return filled(plain)
        except HarmconvertError:
            raise error from None


def open_counterpart(text: str, original: Network) -> Network:
    """The network to compare with an original: a harmonic checkpoint or plain weights of its, or any other source.

    The original's own structure is filled where ``text`` is a file, so nothing that the file names is built or run.

    Raises: as `open_source`.
    """
    if not Path(text).is_file() or ".py:" in text:
        return open_source(text)
    plain = dense_form(original.model) if original.header else original.model
    if not is_harmonic(text):
        with_weights = deep_copy(plain)
        load_weights(with_weights, text, rename=renamed)
        return Network(with_weights, original.source)
    network = read_checkpoint(text, model=plain)
    network.model.eval()
    return network


def open_rival(
    text: str,
    known: Source | None,
    remedy: str,
    *,
    weights: str | Path | None = None,
    trust_code: bool = False,
    code: str | None = None,
) -> Network:
    """A network to compare with one of a ``known`` source, which it may be the uncut form of, in dense form.

    The arguments of the known source are used where both are of the same maker.

    Args:
        remedy: what to do where its weights are not there.
        weights: a file of weights for it.
        code: makes the network of a harmonic checkpoint that is made by user code.

    Raises: as `open_source`; InputError also where it has not the weights that the known source had, but the values it
        was made with: to compare with those would say nothing.
    """
    if is_harmonic_source(text) or is_checkpoint_path(text):
        code = code if made_by_code(text) else None
        return open_source(text, weights=weights, form="dense", trust_code=trust_code, code=code)
    asked = parse_source(text)
    alike = known is not None and _maker(known) == _maker(asked)
    arguments = known.arguments if known is not None and alike and "architecture" not in known.arguments else None
    if asked.scheme == "sample":
        arguments = None  # a sample comes with its own weights, whatever it was fine-tuned for
    rival = open_source(text, weights=weights, arguments=arguments, trust_code=trust_code)
    if weights is not None:
        return rival
    if known is not None and alike and known.sha256 not in (None, rival.source.sha256):
        file = f" (they came from {known.weights['file']})" if known.weights and "file" in known.weights else ""
        raise InputError(f"{text} does not have the weights of {known} that were converted{file}: ", remedy)
    if asked.scheme == "code" and weights_sha256(built(rival.source)) != rival.source.sha256:
        raise InputError(f"{text} makes a network of random weights, others each time: ", remedy)
    return rival


def _maker(source: Source) -> tuple[str, str]:
    """What makes the network of a source, whatever its weights."""
    if source.scheme == "torchvision":
        return source.scheme, source.name.partition(".")[0]
    place, colon, factory = source.name.rpartition(":")
    if source.scheme == "code" and place.endswith(".py"):
        return source.scheme, f"{Path(place).resolve()}{colon}{factory}"
    return source.scheme, source.name


def open_original(header: Header, teacher: str | None = None, trust_code: bool = False) -> nn.Module:
    """The uncut network that a harmonic checkpoint was converted from, with its weights, in eval mode.

    Args:
        teacher: a source, or a file of weights for the recorded structure; None opens the recorded source, whose
            weights must be those that were converted.

    Raises: as `open_source`; InputError where the weights are others.
    """
    if teacher is not None and not Path(teacher).is_file():
        return open_rival(teacher, header.source, "name a file of weights instead", trust_code=trust_code).model
    if teacher is not None and is_harmonic(teacher):
        return load(teacher, form="dense", trust_code=trust_code).eval()
    source, named = header.source, Argument("teacher", "SOURCE")
    if source is None:
        raise UsageError("the checkpoint does not say what network it was: name the uncut one with ", named)
    if teacher is not None:
        model = rebuild(source, trust_code)
        load_weights(model, teacher, rename=renamed)
        return model.eval()
    if source.sha256 is None:
        what = f"the checkpoint was not converted from weights of {source} that it knows"
        raise UsageError(what, ", so there is no uncut network to compare it with: name one with ", named)
    rebuild(source, trust_code)  # refuses what a file has no business to ask for
    arguments = dict(source.arguments)
    if source.scheme != "reference":  # a hub and a folder say theirs; of a reference file it tells how it was read
        arguments.pop("architecture", None)
    if source.scheme == "sample":  # classes that it was fine-tuned for, which its own weights do not have
        arguments.pop("num_classes", None)
    model, opened = build(replace(source, arguments=arguments, sha256=None), pretrained=True)
    if (opened.sha256 or weights_sha256(model)) != source.sha256:
        named = Argument("teacher")
        raise InputError(f"the weights of {source} are not those that were converted: name them with ", named)
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
        example_input: what the factored form is to be fast at, and what the dense form is compared on; default: one
            input of the network's own size.
        trust_code: rebuild from user code that the file names. Off, because that would run what a file says.

    Raises:
        InputError: the file is unreadable or does not fit; UsageError: no network to fill, or an unknown form.
    """
    return read(path, model=model, form=form, example_input=example_input, trust_code=trust_code).model


def read(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    form: str = "harmonic",
    example_input: Any = None,
    trust_code: bool = False,
) -> Network:
    """The same, with the header of the file."""
    return read_checkpoint(
        path, model=model, form=form, example_input=example_input,
        rebuild=lambda source: rebuild(source, trust_code, memory_limit(path)),
    )  # fmt: skip


def rebuild(source: Source | str, trust_code: bool = False, limit: int | None = None) -> nn.Module:
    """The network that a recorded source names, its weights still to be loaded. Needs no network.

    ``limit``: bytes that its tensors may take, where a file that may be anybody's names it.

    Raises:
        UsageError: the source is user code and ``trust_code`` is not set; InputError: it cannot be built.
    """
    source = cast(Source, as_source(source))
    if source.scheme == "code" and not trust_code:
        raise UsageError(
            f"this checkpoint's network is made by user code ({source.name}), which is not run unasked: "
            "pass the plain network as model=, or --trust-code if you know the file, or --model FILE.py:FACTORY"
        )
    try:
        if "architecture" in source.arguments:  # hubs and folders: what their config said is recorded
            arguments = dict(source.arguments)
            if not timm.is_model(str(arguments["architecture"])) or {*arguments} & _NOT_FOR_REBUILDING:
                raise InputError(f"the recorded source {source} asks for more than a timm architecture: refused")
            make = partial(timm.create_model, arguments.pop("architecture"), pretrained=False, **arguments)
        elif {*source.arguments} & _NOT_FOR_REBUILDING or source.scheme not in _REBUILT:
            raise InputError(f"the recorded source {source} asks for more than its structure: refused; pass model=")
        else:
            make = partial(built, source)
        limited = limit is not None and source.scheme != "code"  # trusted code may build what it likes
        model = built_within(make, cast(int, limit), f"the recorded source {source}") if limited else make()
        declare_size(model, source.arguments)
        return model
    except HarmconvertError as error:
        if source.scheme != "code":
            raise
        raise type(error)(f"{error}; or name the code with --model FILE.py:FACTORY") from error
    except Exception as error:
        raise InputError(f"the recorded source {source} cannot be built: {first_line(error)}; pass model=") from error


def made_by_code(text: str) -> bool:
    """Whether a source string names a harmonic checkpoint of a network of user code, or of an unknown source."""
    if not Path(text).is_file() or not is_harmonic(text):
        return False
    source = read_header(text).source
    return source is None or source.scheme == "code"


def check_rebuilds(source: Source, model: nn.Module, trust_code: bool = False) -> None:
    """Raise InputError unless a source makes a network with the tensors of ``model`` in dense form: otherwise a file of
    it that names this source could not be opened."""
    made, wanted = (
        {key: tuple(tensor.shape) for key, tensor in tensors_of(network).items()}
        for network in (rebuild(source, trust_code), dense_form(model))
    )
    if differing := [key for key in {**wanted, **made} if wanted.get(key) != made.get(key)]:
        raise InputError(
            f"{source} with {source.classes or source.arguments.get('num_classes')} classes is another network than "
            f"this one ({shortened(differing)}): what is written could not be opened again"
        )


def is_harmonic_source(text: str) -> bool:
    """Whether a source string names a file that holds a harmonic network, as far as can be told without opening it."""
    return text.startswith("reference:") or (Path(text).is_file() and is_harmonic(text))


def is_checkpoint_path(text: str) -> bool:
    """Whether a source string is a path to a harmonic checkpoint, by its looks; says what to do with a .pth."""
    if text.endswith(".py") and Path(text).is_file():
        raise UsageError(f"{text} is Python code: name the function in it that makes the network{functions_in(text)}")
    if text.endswith((".pth", ".pt", ".pth.tar", ".bin", ".ckpt", ".index.json")) and Path(text).exists():
        raise UsageError(f"{text} holds weights only: name its network, and give the weights with --checkpoint {text}")
    return text.endswith(".safetensors") or (Path(text).is_file() and ":" not in text)
