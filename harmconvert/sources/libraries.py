"""Networks of transformers, segmentation-models-pytorch and diffusers: built from a config, with the weights beside it.

A library is imported when a source needs it. Code that a repository contains is never run.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import Argument, InputError, OutsideError, UsageError
from ..network.state import tensors_of
from .repositories import Repository, plain_config


class Library:
    """A library whose networks are a class and a config.

    ``scheme`` is also the name of the extra that installs the library. ``weights`` are names of files.
    """

    scheme: str
    module: str
    weights: tuple[str, ...]
    class_entry: str  # of the config

    def imported(self) -> Any:
        """Return the module of the library.

        Raises:
            OutsideError: it is not installed.
        """
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            install = f"pip install 'harmconvert[{self.scheme}]'"
            raise OutsideError(f"{self.scheme}: sources need the package {self.module}: {install}") from error

    def architecture(self, config: Mapping[str, Any]) -> str | None:
        """Return the name of the class in a config, or None."""
        name = config.get(self.class_entry)
        return name if isinstance(name, str) else None

    def network_class(self, name: Any) -> Any:
        """Return a class of networks of the library.

        Raises:
            InputError: the library has no such class.
        """
        module = self.imported()
        found = getattr(module, name, None) if isinstance(name, str) and name.isidentifier() else None
        if not (isinstance(found, type) and issubclass(found, self.base())):
            version = getattr(module, "__version__", "")
            raise InputError(f"{self.module} {version} has no network {name!r:.80}: another version may have it")
        return found

    def base(self) -> type[nn.Module]:
        """Return the class from which all networks of the library are derived."""
        raise NotImplementedError

    def build(self, kind: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
        """Return an untrained network of a class; ``arguments`` of the user replace entries of the config.

        Raises:
            UsageError: the config has no such entry.
        """
        raise NotImplementedError

    def renamed(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of an older version of the library under the names of this network."""
        return state

    def declaration(self, model: nn.Module, repository: Repository) -> dict[str, Any]:
        """Return what is known of the network's inputs and pre-processing, in the form of timm's ``pretrained_cfg``."""
        return {}


class _Transformers(Library):
    scheme = module = "transformers"
    weights = ("model.safetensors", "pytorch_model.bin")
    class_entry = "architectures"

    def architecture(self, config: Mapping[str, Any]) -> str | None:
        names = config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    def base(self) -> type[nn.Module]:
        return cast(type[nn.Module], self.imported().PreTrainedModel)

    def build(self, kind: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
        settings = kind.config_class.from_dict(plain_config(config))
        for key, value in arguments.items():
            name = "num_labels" if key == "num_classes" else key
            if not hasattr(settings, name):
                raise UsageError(f"the config of {kind.__name__} has no entry {key!r}")
            setattr(settings, name, value)
        # A config can name an implementation of attention on the hub, whose code would be run.
        network: nn.Module = kind._from_config(settings, attn_implementation="eager", dtype=torch.float32)
        return network

    def renamed(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        kind, config = cast(Any, type(model)), cast(Any, model).config
        dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
        dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32
        with _without_progress_bars(self.imported().utils.logging):
            loaded, report = kind.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, dtype=dtype
            )
        left = report["missing_keys"] or report["mismatched_keys"] or report["unexpected_keys"]
        return state if left else tensors_of(loaded)

    def declaration(self, model: nn.Module, repository: Repository) -> dict[str, Any]:
        config: Any = model.config
        sides, channels = _sides(getattr(config, "image_size", None)), getattr(config, "num_channels", 3)
        declared = {"input_size": (channels, *sides)} if sides and isinstance(channels, int) else {}
        if (processor := self._image_processor(repository)) is not None:
            declared |= _measured(processor)
        return declared

    def _image_processor(self, repository: Repository) -> Any:
        """Return the image processor of a repository; None if it has none, or one that is not in the library."""
        path = repository.file("preprocessor_config.json")
        if path is None:
            return None
        with suppress(Exception):  # a class that this version does not have, or code of the repository
            return self.imported().AutoImageProcessor.from_pretrained(
                path.parent, local_files_only=True, trust_remote_code=False
            )
        return None


class _SegmentationModels(Library):
    scheme, module = "smp", "segmentation_models_pytorch"
    weights = ("model.safetensors", "pytorch_model.bin")
    class_entry = "_model_class"

    def base(self) -> type[nn.Module]:
        return cast(type[nn.Module], self.imported().base.SegmentationModel)

    def build(self, kind: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
        named = {"classes" if key == "num_classes" else key: value for key, value in arguments.items()}
        network: nn.Module = kind(**{**plain_config(config), **named, "encoder_weights": None})
        return network

    def pair(self, name: str) -> tuple[str, str] | None:
        """Return the names of the class and the encoder in ARCH/ENCODER; None if the name is something else."""
        known = {one.__name__.lower(): one.__name__ for one in vars(self.imported()).values() if self._is_network(one)}
        architecture, _, encoder = name.partition("/")
        found = known.get(architecture.lower())
        return None if found is None or not encoder else (found, encoder)

    def _is_network(self, value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, self.base())


class _Diffusers(Library):
    scheme = module = "diffusers"
    weights = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    class_entry = "_class_name"

    def base(self) -> type[nn.Module]:
        return cast(type[nn.Module], self.imported().ModelMixin)

    def build(self, kind: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
        if unknown := [*{*arguments} - {*inspect.signature(kind.__init__).parameters}]:
            raise UsageError(f"the config of {kind.__name__} has no entry {unknown[0]!r}")
        network: nn.Module = kind.from_config({**plain_config(config), **arguments})
        return network

    def renamed(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(state)
        cast(Any, model)._fix_state_dict_keys_on_load(changed)
        return changed

    def declaration(self, model: nn.Module, repository: Repository) -> dict[str, Any]:
        """Return the sizes of the image, of the time step (one number) and of the embedding of a text."""
        config: Any = model.config
        parameters = inspect.signature(model.forward).parameters.values()
        needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        sides, channels = _sides(getattr(config, "sample_size", None)), getattr(config, "in_channels", None)
        if not sides or not isinstance(channels, int):
            return {}
        image = (channels, *sides)
        if needed == ["sample"]:
            normalised = {"mean": (0.5,) * channels, "std": (0.5,) * channels} if channels in (1, 3) else {}
            return {"input_size": image, **normalised}
        if needed == ["sample", "timestep"]:
            return {"input_sizes": (image, ())}
        width = getattr(config, "cross_attention_dim", None)
        plain = all(getattr(config, key, None) is None for key in ("addition_embed_type", "class_embed_type"))
        if needed == ["sample", "timestep", "encoder_hidden_states"] and isinstance(width, int) and plain:
            return {"input_sizes": (image, (), (_TEXT_LENGTH, width))}
        return {}


def _sides(size: Any) -> tuple[int, ...]:
    """Return height and width of an image from a size in a config, or nothing."""
    sides = (size, size) if isinstance(size, int) else size
    return tuple(sides) if isinstance(sides, list | tuple) and len(sides) == 2 else ()


# Tokens in the text of CLIP, which most networks for diffusion read; any other length works, too.
_TEXT_LENGTH = 77
# Side of the images on which an image processor is measured: larger than most inputs.
_MEASURED_SIDE = 1024


@contextmanager
def _without_progress_bars(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _measured(processor: Any) -> dict[str, Any]:
    """Return the input size, mean, std and crop of an image processor, measured on images of one colour.

    Processors have many settings for the same thing, such as two normalisations in a row. Mean and std are left out if
    the processor changes the order of the colours.
    """
    black, white, red = (_processed(processor, colour) for colour in ("black", "white", "red"))
    config: dict[str, Any] = {"input_size": tuple(black.shape)}
    center = (slice(None), black.shape[1] // 2, black.shape[2] // 2)
    low, high, first = black[center].double(), white[center].double(), red[center].double()
    if len(low) == 3 and torch.equal(first[1:], low[1:]) and bool((high > low).all()):
        std = 1 / (high - low)
        config |= {"mean": tuple((-low * std).tolist()), "std": tuple(std.tolist())}
    with suppress(AttributeError, ValueError, TypeError):
        config["interpolation"] = Image.Resampling(processor.resample).name.lower()
    side = getattr(getattr(processor, "size", None), "shortest_edge", None)
    if side and getattr(processor, "do_center_crop", False):
        return config | {"crop_pct": black.shape[1] / side}
    share = getattr(processor, "crop_pct", None)
    if side and share and side < 384:  # ConvNext's processor does not crop larger images
        return config | {"crop_pct": share}
    return config | {"crop_pct": 1.0, "crop_mode": "squash"}


def _processed(processor: Any, colour: str) -> Tensor:
    image = Image.new("RGB", (_MEASURED_SIDE, _MEASURED_SIDE), colour)
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    return pixels[0]


LIBRARIES: Mapping[str, Library] = {one.scheme: one for one in (_Transformers(), _SegmentationModels(), _Diffusers())}
SMP = cast(_SegmentationModels, LIBRARIES["smp"])


def network_class(library: Library, config: Mapping[str, Any], name: Any, where: str) -> Any:
    """Return the class that the user or a config names.

    Raises:
        InputError: there is no such class.
    """
    name = name or library.architecture(config)
    if name is None:
        remedy = Argument("arguments", {"architecture": "CLASS"})
        raise InputError(f"{where} names no class of a network ({library.class_entry}): give it with ", remedy)
    return library.network_class(name)
