"""Build the networks of sources: one function for each scheme, with pretrained weights or without."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torchvision
from torch import Tensor, nn

from ..errors import Argument, InputError, UsageError, first_line
from ..files import read_json
from ..network.classifier import replace_classifier
from ..network.declared import pretrained_config
from ..network.state import tensors_of
from ..samples import SAMPLES
from ..storage.source import SCHEMES, Source
from ..storage.weights import load_state, load_weights
from ..user_code import import_function
from .downloads import downloading, torchvision_loading, torchvision_preprocessing
from .libraries import LIBRARIES, SMP, network_class
from .reference import open_reference
from .repositories import Repository, plain_config

log = logging.getLogger(__name__)

# Names of the weights in a folder; with .index.json appended, the index of weights in several files.
_LOCAL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def build_structure(source: Source) -> nn.Module:
    """Return the network of a source without its weights."""
    return build(source)[0]


def build(source: Source, pretrained: bool = False) -> tuple[nn.Module, Source]:
    """Return the network of a source, and the source with what building it added (licence, weights, arguments).

    The network has its own weights if ``pretrained``. The errors are those of `open_source`.
    """
    model, source = _MAKERS[source.scheme](source, pretrained)
    if source.classes is not None:
        replace_classifier(model, source.classes)
    declare_size(model, source.arguments)
    return model, source


def declare_size(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Write the number of channels and the image size of ``arguments`` into the network's ``pretrained_cfg``.

    >>> network = timm.create_model("test_vit", in_chans=1, img_size=64)
    >>> declare_size(network, {"in_chans": 1, "img_size": 64})
    >>> pretrained_config(network)["input_size"]
    (1, 64, 64)
    """
    config = pretrained_config(model)
    size = config.get("input_size")
    if not isinstance(size, list | tuple) or len(size) != 3:
        return
    side = arguments.get("img_size", arguments.get("image_size"))
    sides = [side, side] if isinstance(side, int) else side
    changed = [
        arguments.get("in_chans"),
        *(sides if isinstance(sides, list | tuple) and len(sides) == 2 else (None, None)),
    ]
    new_size = tuple(new if isinstance(new, int) and new > 0 else old for new, old in zip(changed, size, strict=True))
    if new_size != tuple(size):
        try:
            cast(Any, model).pretrained_cfg = {**config, "input_size": new_size}
        except AttributeError:  # pretrained_cfg is a property of this class
            log.info("this %s computes its pretrained_cfg, which keeps the input size %s", type(model).__name__, size)


def _from_timm(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    if not timm.is_model(source.name):
        raise UsageError(f"timm has no model {source.name!r}{_suggestion(source.name, timm.list_models())}")
    with downloading(str(source)):
        model = timm.create_model(source.name, pretrained=pretrained, **source.arguments)
    config = pretrained_config(model)
    if pretrained and isinstance(tag := config.get("tag"), str) and tag:
        source = replace(source, weights={"tag": tag})
    return model, replace(source, licence=config.get("license"))


def _from_hf_hub(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    with downloading(str(source)):
        _, architecture, model_arguments = timm.models.load_model_config_from_hf(source.name)
        model = timm.create_model(f"hf-hub:{source.name}", pretrained=pretrained, **source.arguments)
    return model, _with_config(source, model, architecture, model_arguments)


def _from_local_dir(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    config = Path(source.name) / "config.json"
    try:
        content = read_json(config)
        architecture = str(content["architecture"])
    except FileNotFoundError as error:
        raise InputError(f"{source.name} is not a timm folder: it has no config.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config} is unreadable: {first_line(error)}; get the folder again") from error
    try:
        model = timm.create_model(f"local-dir:{source.name}", pretrained=False, **source.arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"no network can be built from {config}: {first_line(error)}") from error
    paths = [Path(source.name) / f"{name}{end}" for end in ("", ".index.json") for name in _LOCAL_WEIGHTS]
    files = [path for path in paths if path.exists()]
    if pretrained and not files:
        raise InputError(f"{source.name} has no weights: neither {' nor '.join(_LOCAL_WEIGHTS)}")
    if pretrained:
        source = replace(source, weights=load_weights(model, files[0], rename=renamed))
    return model, _with_config(source, model, architecture, content.get("model_args") or {})


def _from_torchvision(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    """Build ``NAME.WEIGHTS`` with the structure for those weights, and ``NAME`` with the untrained structure.

    The two structures can differ (frozen norms, auxiliary heads, input transforms).
    """
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
    try:
        with downloading(str(source)), torchvision_loading(fetch=pretrained):
            model = builder(weights=chosen if tag else None, **arguments)
    except InputError as error:
        if not tag or not isinstance(error.__cause__, ValueError) or "expected value" not in str(error):
            raise
        if pretrained:
            raise InputError(
                f"the weights {tag} of torchvision:{name} are for other arguments ({first_line(error.__cause__)}): "
                "give your own with ", Argument("weights", "FILE"),
            ) from error  # fmt: skip
        log.info("torchvision:%s is built without the settings of the weights %s: its arguments differ", name, tag)
        return _from_torchvision(replace(source, name=name), False)
    if not hasattr(model, "pretrained_cfg") and (cfg := torchvision_preprocessing(builder.__module__, chosen)):
        model.pretrained_cfg = cfg
    return model, source


def with_weights_name(source: Source) -> Source:
    """Return the source with the name of the default weights if it names none: torchvision's defaults may change."""
    if source.scheme != "torchvision" or "." in source.name:
        return source
    if source.name not in torchvision.models.list_models():
        raise UsageError(
            f"torchvision has no model {source.name!r}{_suggestion(source.name, torchvision.models.list_models())}"
        )
    return replace(source, name=f"{source.name}.{torchvision.models.get_model_weights(source.name)['DEFAULT'].name}")


def _from_library(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    """Build a network of transformers, segmentation-models-pytorch or diffusers.

    The source then has the config, so that a checkpoint can be opened without the repository.
    """
    library, arguments = LIBRARIES[source.scheme], dict(source.arguments)
    config, name = arguments.pop("config", None), arguments.pop("architecture", None)
    library.imported()
    with downloading(str(source)):
        if config is not None and not pretrained:
            return library.build(library.network_class(name), config, arguments), source
        if source.scheme == "smp" and (pair := SMP.pair(source.name)) is not None:
            return _smp_network(source, pair, pretrained)
        repository = Repository.named(source.name)
        config = _config_in(repository, source)
        kind = network_class(library, config, name, f"{repository}/config.json")
        model = library.build(kind, config, arguments)
        if declared := library.declaration(model, repository):
            cast(Any, model).pretrained_cfg = declared
        file = repository.weights(library.weights) if pretrained else None
    if file is not None:
        record = load_weights(model, file, rename=renamed)
        source = replace(source, weights={"left_out": record["left_out"]} if "left_out" in record else None)
    recorded = {"architecture": kind.__name__, "config": plain_config(config), **arguments}
    return model, replace(source, arguments=recorded)


def _smp_network(source: Source, pair: tuple[str, str], pretrained: bool) -> tuple[nn.Module, Source]:
    if pretrained:
        file = Argument("weights", "FILE")
        raise InputError(f"{source} has no pretrained weights, only its encoder may have: give some with ", file)
    architecture, encoder = pair
    model = SMP.build(SMP.network_class(architecture), {"encoder_name": encoder}, source.arguments)
    return model, source


def _config_in(repository: Repository, source: Source) -> dict[str, Any]:
    """Return the config of a repository; if it is a pipeline of networks, the message names them."""
    if (config := repository.json("config.json")) is not None:
        return config
    pipeline = repository.json("model_index.json") or {}
    parts = [name for name, part in pipeline.items() if isinstance(part, list) and part[:1] == ["diffusers"]]
    networks = [f"{source}/{name}" for name in parts if "scheduler" not in name]
    if networks:
        raise InputError(f"{repository} is a pipeline: name one of its networks, such as {' or '.join(networks)}")
    raise InputError(f"{repository} is no network of {source.scheme}: it has no config.json")


def _from_sample(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    if source.name not in SAMPLES:
        raise UsageError(f"there is no sample {source.name!r}: use one of {', '.join(SAMPLES)}")
    if unknown := {*source.arguments} - (set() if pretrained else {"num_classes"}):
        what = "its weights take" if unknown == {"num_classes"} else "it takes"
        raise UsageError(f"{source} is a sample network: {what} no argument {min(unknown)}")
    classes = source.arguments.get("num_classes")
    if classes is not None and (type(classes) is not int or classes < 1):
        raise UsageError(f"num_classes (={classes!r:.80}) must be a whole number from 1 on")
    sample = SAMPLES[source.name]
    model = sample.build()
    if pretrained:
        load_state(model, sample.weights(), str(source))
    elif classes is not None:  # the sample was fine-tuned for other classes
        cast(Any, model).reset_classifier(classes)
    return model, replace(source, licence=sample.licence)


def _from_reference(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    return open_reference(source.name, source.arguments, "dense")[:2]


def _from_code(source: Source, pretrained: bool) -> tuple[nn.Module, Source]:
    """Call the user's factory; the weights that its network has are the pretrained ones."""
    factory = import_function(source.name, SCHEMES)
    try:
        model = factory(**source.arguments)
    except (Exception, SystemExit) as error:
        raise InputError(f"{source.name} fails: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{source.name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model, source


def renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict under this network's keys; functions of the libraries rename the keys of older files."""
    if set(state) == set(tensors_of(model)):
        return state
    package = type(model).__module__.partition(".")[0]
    library = next((one for one in LIBRARIES.values() if one.module == package), None)
    if library is None and package != "timm":
        return state
    try:
        return _renamed_by_timm(model, state) if library is None else library.renamed(model, state)
    except Exception as error:  # the error about the file's own keys is clearer than the library's
        log.info("%s does not rename the weights for this %s: %s", package, type(model).__name__, first_line(error))
        return state


def _renamed_by_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    rename = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    return state if rename is None else dict(rename(dict(state), model))


def _with_config(source: Source, model: nn.Module, architecture: str, model_arguments: Mapping[str, Any]) -> Source:
    """Return the source with everything that is needed to build the network again without the hub or the folder."""
    recorded = {"architecture": architecture, **model_arguments, **source.arguments}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        recorded["num_classes"] = classes
    return replace(source, arguments=recorded, licence=pretrained_config(model).get("license"))


def _suggestion(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name.partition(".")[0], names, 3)
    return (
        f": did you mean {', '.join(matches)}?"
        if matches
        else "; other schemes are torchvision:, transformers:, smp:, diffusers:, hf-hub:, local-dir:, sample:"
    )


_MAKERS: dict[str, Callable[[Source, bool], tuple[nn.Module, Source]]] = {
    "timm": _from_timm,
    "hf-hub": _from_hf_hub,
    "local-dir": _from_local_dir,
    "torchvision": _from_torchvision,
    "sample": _from_sample,
    "reference": _from_reference,
    **dict.fromkeys(LIBRARIES, _from_library),
    "code": _from_code,
}
