"""Open the network that a source string names, with its weights."""

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
from .downloads import offline
from .hub import published_checkpoint
from .libraries import LIBRARIES
from .limits import built_within
from .makers import build, build_structure, declare_size, renamed, with_weights_name
from .reference import open_reference
from .repositories import loads_files

log = logging.getLogger(__name__)

_REBUILT = ("timm", "torchvision", "sample", "code")
# Arguments of timm.create_model that open files or download: a checkpoint must not set them.
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
    """Return the network that a source string names, with its weights, in eval mode.

    Args:
        text: ``NAME`` or ``timm:NAME``, ``torchvision:NAME``, ``hf-hub:USER/REPO`` or ``local-dir:PATH`` (a harmonic
            checkpoint in it is used first), ``transformers:NAME_OR_FOLDER``, ``smp:ARCH/ENCODER`` or
            ``smp:NAME_OR_FOLDER``, ``diffusers:NAME_OR_FOLDER``, ``package.module:factory``, ``file.py:factory``,
            ``sample:NAME``,
            ``reference:FILE`` (a checkpoint of the reference implementation: `harmconvert.sources.reference`), or the
            path of a harmonic checkpoint.
        weights: a .safetensors or .pth file that replaces the weights; only plain tensors are unpickled.
        weights_key, strip_prefix: which part of that file to read: ``key`` and ``prefix`` of `load_weights`.
        arguments: keyword arguments for the function that builds the network, such as num_classes.
        pretrained: False leaves the weights random, for example to look at sizes.
        form: ``"harmonic"`` or ``"dense"``, for a harmonic or a reference checkpoint.
        trust_code: run the user code that a harmonic checkpoint names to build its network.
        code: ``file.py:factory`` that builds the network of a harmonic checkpoint, instead of the recorded source.

    Raises:
        UsageError: the source does not exist.
        InputError: the weights are unreadable or do not fit.
        OutsideError: a download failed, or a package is missing.
    """
    text = str(text) if isinstance(text, Path) else text
    if not isinstance(text, str):
        raise UsageError(f"source (={text!r:.80}) must be a text such as 'resnet50' or 'FILE.py:FACTORY'")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UsageError(f"arguments (={arguments!r:.80}) must be a dict, such as {{'num_classes': 10}}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{text!r} is not UTF-8, and a checkpoint would have to name it: rename it")
    if weights is None and (weights_key is not None or strip_prefix is not None):
        key, prefix = Argument("weights_key"), Argument("strip_prefix")
        raise UsageError(
            "a key or a prefix (",
            key,
            ", ",
            prefix,
            ") selects a part of a file of weights: give ",
            Argument("weights", "FILE"),
        )
    if text.startswith("reference:"):
        reference = parse_source(text, arguments)
        if weights is not None or {*reference.arguments} - {"pool"}:
            raise UsageError(f"{text} is a checkpoint: it takes no other weights, and no arguments except pool")
        model, source, header = open_reference(reference.name, reference.arguments, form)
        return Network(model.eval(), source, header)
    if is_checkpoint_path(text):
        return _open_checkpoint(text, weights, arguments, form, trust_code, code)
    if weights is None and not arguments and (published := published_checkpoint(text)) is not None:
        return _open_checkpoint(str(published), None, None, form, trust_code, code)
    if code is not None:
        raise UsageError(f"{text} is not a harmonic checkpoint: name {code} as the source instead")
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
    """Open a harmonic checkpoint; ``code`` builds its network if given, and is trusted because the user named it."""
    header = read_header(path)
    if weights is not None or (arguments and code is None):
        raise UsageError(f"{path} is a harmonic checkpoint: it takes neither other weights nor arguments")
    if code is None:
        network = read(path, form=form, trust_code=trust_code)
        network.model.eval()
        return network
    recorded = header.source or Source("code", code)
    requested = parse_source(code, arguments or (recorded.arguments if recorded.scheme == "code" else None))
    if requested.scheme != "code":
        raise UsageError(f"{code} is not user code: name FILE.py:FACTORY or package.module:factory")
    source = replace(recorded, scheme="code", name=requested.name, arguments=requested.arguments)
    loaded = read_checkpoint(path, model=build_structure(source), form=form)
    return Network(loaded.model.eval(), source, replace(header, source=source))


def _with_weights(source: Source, weights: str | Path, key: str | None, prefix: str | None) -> tuple[nn.Module, Source]:
    """Return the network of a source with the weights in a file, and the source with a record of the file."""

    def with_file(source: Source) -> tuple[nn.Module, Source]:
        model, source = build(source)
        record = load_weights(model, weights, key=key, prefix=prefix, rename=renamed)
        return model, replace(source, weights=record)

    if source.scheme != "torchvision":
        return with_file(source)
    # Weights that were trained from scratch may fit only the untrained structure.
    untrained = replace(source, name=source.name.partition(".")[0])
    try:
        return with_file(source)
    except InputError as error:
        log.info("%s does not fit %s, so the untrained structure is tried: %s", weights, source, error)
        try:
            return with_file(untrained)
        except HarmconvertError:
            raise error from None


def open_counterpart(text: str, original: Network) -> Network:
    """Return the network to compare with an original: a harmonic checkpoint, a file of weights, or any other source.

    If ``text`` is a file, it is loaded into a copy of the original, so nothing that the file names is built or run.
    The errors are those of `open_source`.
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


def open_for_comparison(
    text: str,
    known: Source | None,
    remedy: str,
    *,
    weights: str | Path | None = None,
    trust_code: bool = False,
    code: str | None = None,
) -> Network:
    """Return a network in dense form, to compare with a network of a ``known`` source.

    It may be the uncut form of that network. If both come from the same builder, the arguments of the known source are
    used. The errors are those of `open_source`.

    Args:
        remedy: the end of the message if the weights are not available.
        weights: a file of weights for the network.
        code: ``file.py:factory`` that builds the network of a harmonic checkpoint, if user code built it.

    Raises:
        InputError: the network has random weights instead of those of the known source, so a comparison is useless.
    """
    if is_harmonic_source(text) or is_checkpoint_path(text):
        code = code if made_by_code(text) else None
        return open_source(text, weights=weights, form="dense", trust_code=trust_code, code=code)
    requested = parse_source(text)
    same_builder = known is not None and _builder(known) == _builder(requested)
    arguments = None
    if known is not None and same_builder and "architecture" not in known.arguments and requested.scheme != "sample":
        arguments = known.arguments  # a sample has its own weights, also if the known one was fine-tuned
    network = open_source(text, weights=weights, arguments=arguments, trust_code=trust_code)
    if weights is not None:
        return network
    if known is not None and same_builder and known.sha256 not in (None, network.source.sha256):
        file = f" (they came from {known.weights['file']})" if known.weights and "file" in known.weights else ""
        raise InputError(f"{text} does not have the weights of {known} that were converted{file}: ", remedy)
    if requested.scheme == "code" and weights_sha256(build_structure(network.source)) != network.source.sha256:
        raise InputError(f"{text} builds a network with new random weights each time: ", remedy)
    return network


def _builder(source: Source) -> tuple[str, str]:
    """Return what builds the network of a source, independent of its weights."""
    if source.scheme == "torchvision":
        return source.scheme, source.name.partition(".")[0]
    place, colon, factory = source.name.rpartition(":")
    if source.scheme == "code" and place.endswith(".py"):
        return source.scheme, f"{Path(place).resolve()}{colon}{factory}"
    return source.scheme, source.name


def open_original(header: Header, teacher: str | None = None, trust_code: bool = False) -> nn.Module:
    """Return the uncut network from which a harmonic checkpoint was converted, with its weights, in eval mode.

    The errors are those of `open_source`.

    Args:
        teacher: a source, or a file of weights for the recorded structure; None opens the recorded source, whose
            weights must be those that were converted.

    Raises:
        InputError: the weights of the recorded source have changed.
    """
    if teacher is not None and not Path(teacher).is_file():
        return open_for_comparison(
            teacher, header.source, "name a file of weights instead", trust_code=trust_code
        ).model
    if teacher is not None and is_harmonic(teacher):
        return load(teacher, form="dense", trust_code=trust_code).eval()
    source, teacher_argument = header.source, Argument("teacher", "SOURCE")
    if source is None:
        raise UsageError("the checkpoint does not record its source: name the uncut network with ", teacher_argument)
    if teacher is not None:
        model = rebuild(source, trust_code)
        load_weights(model, teacher, rename=renamed)
        return model.eval()
    if source.sha256 is None:
        what = f"the checkpoint does not record weights of {source} from which it was converted"
        raise UsageError(what, ", so there is no uncut network to compare with: name one with ", teacher_argument)
    rebuild(source, trust_code)  # refuses a source that a file must not name
    arguments = dict(source.arguments)
    if source.scheme in ("hf-hub", "local-dir"):  # they name the architecture
        arguments.pop("architecture", None)
    if source.scheme == "sample":  # the classes of a fine-tuned network do not fit the sample's own weights
        arguments.pop("num_classes", None)
    model, opened = build(replace(source, arguments=arguments, sha256=None), pretrained=True)
    if (opened.sha256 or weights_sha256(model)) != source.sha256:
        remedy = Argument("teacher")
        raise InputError(f"the weights of {source} are not those that were converted: name them with ", remedy)
    return model.eval()


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    form: str = "harmonic",
    example_input: Any = None,
    trust_code: bool = False,
) -> nn.Module:
    """Read a harmonic checkpoint into the network that its source names, or into ``model``.

    Args:
        model: the plain network to load the checkpoint into (if user code builds it); it is copied, not changed.
        form: ``"harmonic"``, ``"dense"``, or ``"factored"`` (in eval mode, the fastest form by `factor`).
        example_input: the input on which the factored form is timed and the dense form is compared; default: one input
            of the network's own size.
        trust_code: run the user code that the file names to rebuild the network.

    Raises:
        InputError: the file is unreadable or does not fit the network.
        UsageError: the network is unknown and ``model`` is not given, or the form is unknown.
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
    """Read a harmonic checkpoint as `load` does; return the network together with the header of the file."""
    return read_checkpoint(
        path, model=model, form=form, example_input=example_input,
        rebuild=lambda source: rebuild(source, trust_code, memory_limit(path)),
    )  # fmt: skip


def rebuild(source: Source | str, trust_code: bool = False, limit: int | None = None) -> nn.Module:
    """Return the network that a recorded source names, without its weights. It needs no download.

    Args:
        limit: most bytes that its tensors may need; for sources that an untrusted file names.

    Raises:
        UsageError: the source is user code, and ``trust_code`` is not set.
        InputError: the network cannot be built, or it exceeds the limit.
    """
    source = cast(Source, as_source(source))
    if source.scheme == "code" and not trust_code:
        raise UsageError(
            f"this checkpoint's network is made by user code ({source.name}), which is not run without permission: "
            "pass the plain network as model=, or ",
            Argument("trust_code", True), " if you know the file, or ", Argument("code", "FILE.py:FACTORY"),
        )  # fmt: skip
    try:
        if source.scheme in LIBRARIES:
            if not _rebuilt_from_record(source):
                raise InputError(f"the recorded source {source} sets arguments that load files or weights: refused")
            make = partial(build_structure, source)
        elif "architecture" in source.arguments:  # recorded from the config of a hub or a folder
            arguments = dict(source.arguments)
            if not timm.is_model(str(arguments["architecture"])) or {*arguments} & _NOT_FOR_REBUILDING:
                raise InputError(f"the recorded source {source} sets arguments that load files or weights: refused")
            make = partial(timm.create_model, arguments.pop("architecture"), pretrained=False, **arguments)
        elif {*source.arguments} & _NOT_FOR_REBUILDING or source.scheme not in _REBUILT:
            raise InputError(f"the recorded source {source} cannot be rebuilt safely: refused; pass model=")
        else:
            make = partial(build_structure, source)
        limited = limit is not None and source.scheme != "code"  # trusted code has no limit
        with offline():
            model = built_within(make, cast(int, limit), f"the recorded source {source}") if limited else make()
        declare_size(model, source.arguments)
        return model
    except HarmconvertError as error:
        if source.scheme != "code":
            raise
        code = Argument("code", "FILE.py:FACTORY")
        raise type(error)(error.message, "; or name the code with ", code) from error
    except Exception as error:
        raise InputError(f"the recorded source {source} cannot be built: {first_line(error)}; pass model=") from error


def _rebuilt_from_record(source: Source) -> bool:
    """Return whether the record of a network of a library is enough to build it, without any file."""
    config = source.arguments.get("config")
    alone = isinstance(config, Mapping) if "config" in source.arguments else source.scheme == "smp"
    return alone and not loads_files(source.arguments)


def made_by_code(text: str) -> bool:
    """Return whether a source string names a harmonic checkpoint whose source is user code or unknown."""
    if not Path(text).is_file() or not is_harmonic(text):
        return False
    source = read_header(text).source
    return source is None or source.scheme == "code"


def check_rebuilds(source: Source, model: nn.Module, trust_code: bool = False) -> None:
    """Raise InputError unless a source builds a network with the tensors of ``model`` in dense form.

    Otherwise a file that names this source could not be opened again.
    """
    rebuilt, expected = (
        {key: tuple(tensor.shape) for key, tensor in tensors_of(network).items()}
        for network in (rebuild(source, trust_code), dense_form(model))
    )
    if differing := [key for key in {**expected, **rebuilt} if expected.get(key) != rebuilt.get(key)]:
        raise InputError(
            f"{source} with {source.classes or source.arguments.get('num_classes')} classes is another network than "
            f"this one ({shortened(differing)}): the file could not be opened again"
        )


def is_harmonic_source(text: str) -> bool:
    """Return whether a source string names a harmonic or a reference checkpoint; the weights are not read."""
    return text.startswith("reference:") or (Path(text).is_file() and is_harmonic(text))


def is_checkpoint_path(text: str) -> bool:
    """Return whether a source string looks like the path of a harmonic checkpoint.

    Raises:
        UsageError: it is a Python file or a file of weights; the message says what to do.
    """
    if text.endswith(".py") and Path(text).is_file():
        raise UsageError(f"{text} is Python code: name the function in it that makes the network{functions_in(text)}")
    if text.endswith((".pth", ".pt", ".pth.tar", ".bin", ".ckpt", ".index.json")) and Path(text).exists():
        what = f"{text} holds weights only: name its network, and give the weights with "
        raise UsageError(what, Argument("weights", text))
    return text.endswith(".safetensors") or (Path(text).is_file() and ":" not in text)
