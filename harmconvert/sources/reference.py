"""Open checkpoints of the paper's reference implementation (github.com/matej-ulicny/harmonic-networks).

There are two kinds: state dicts of its ImageNet ResNets, and flat dicts of tensors of its CIFAR wide residual networks.
Both multiply coefficients with L1-normalised DCT kernels, as `normalization="l1"` does. They list frequencies row by
row; this package lists them by level. Depth, width, classes, the harmonic layers and their frequencies follow from the
names and shapes of the tensors; no code is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .. import models  # noqa: F401  registers the networks that are built here
from ..codecs.digests import tensors_sha256
from ..errors import Argument, HarmconvertError, InputError, UsageError, first_line, shortened
from ..kernels.basis import Basis, all_frequencies, dct_basis, frequencies_below, level_count
from ..network.state import tensors_of
from ..plan import LayerPlan, Plan, cut_layer
from ..storage.checkpoint import BlockRecord, Header, Source, harmonic_like, in_form
from ..storage.weights import load_state, read_weights

POOLS = ("none", "avg", "max")
RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
# Mean and standard deviation of the images (0 to 255), by number of classes, as in its training code.
CIFAR = {
    10: ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    100: ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}
DCT_TOLERANCE = 1e-6  # its DCT kernels are computed in float32; the largest values are 1/9

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def open_reference(path: str, arguments: Mapping[str, Any], form: str) -> tuple[nn.Module, Source, Header | None]:
    """Return the network of a reference checkpoint, its source, and the header that a file of this package would have.

    Args:
        path: the file that ``imagenet/main.py`` (.pth, .pth.tar) or ``cifar/main.py`` (.pt7) wrote, or a .safetensors
            file with the same tensors.
        arguments: ``pool``: the pooling after the stem of a ResNet, which the tensors do not show: ``"none"`` (a stem
            of stride 4, the default), ``"avg"`` or ``"max"`` (stride 2). The arguments recorded in a `Source` are
            accepted, too.
        form: ``"harmonic"`` or ``"dense"``.

    Returns:
        The network, its source, and its header. The header is None if no layer is harmonic (``wrn``).

    Raises:
        InputError: the file is unreadable, is no such checkpoint, or holds a network that is not supported.
        UsageError: an argument is unknown.
    """
    state = read_weights(path)
    try:
        return _open_state(path, state, arguments, form)
    except HarmconvertError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        raise InputError(f"{path}: the shapes of its tensors do not fit together: {first_line(error)}") from error


def _open_state(
    path: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any], form: str
) -> tuple[nn.Module, Source, Header | None]:
    tensors = _Tensors(path, state)
    if any(re.match(r"layer\d+\.\d+\.", key) for key in state):
        network = _read_resnet(tensors, _pool(arguments))
    elif any(re.match(r"group\d+\.block\d+\.", key) for key in state):
        network = _read_wide_resnet(tensors)
    else:
        raise InputError(
            f"{path} is no ResNet and no wide ResNet of the reference implementation (there are: "
            f"{shortened(list(state), 3)}): name its network and give the weights with ", Argument("weights", path),
        )  # fmt: skip
    tensors.check_all_used()
    source = Source("reference", path, dict(network), tensors_sha256(state))
    plain = timm.create_model(network.pop("architecture"), **network)
    # Older files lack the counters of batch norms, which have no effect here.
    counters = {key: value for key, value in tensors_of(plain).items() if key.endswith("num_batches_tracked")}
    plan = Plan(tuple(tensors.layers))
    # Recorded as trained: it was never an uncut network, so there is nothing to calibrate it to.
    header = Header(plan, source, history={"training": [{"by": "the reference implementation"}]}, blocks=tensors.blocks)
    harmonic = harmonic_like(plain, plan, path, tensors.blocks)
    load_state(harmonic, counters | tensors.renamed, path)
    model = in_form(harmonic, form)
    return model, source, header if tensors.layers or tensors.blocks else None


@dataclass
class _Tensors:
    """The tensors of a file while they are renamed.

    ``renamed`` has the tensors under this package's names, ``used_keys`` their names in the file. ``layers`` and
    ``blocks`` describe the harmonic layers.
    """

    path: str
    state: Mapping[str, Tensor]
    renamed: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerPlan] = field(default_factory=list)
    blocks: dict[str, BlockRecord] = field(default_factory=dict)
    used_keys: set[str] = field(default_factory=set)

    def take(self, key: str, name: str, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Take the tensor ``key`` of the file under ``name``; raise InputError if it is missing."""
        self.renamed[name] = convert(self.get(key)).contiguous()
        self.used_keys.add(key)

    def get(self, key: str) -> Tensor:
        """Return a tensor of the file; raise InputError if it is missing."""
        if key not in self.state:
            raise InputError(f"{self.path} lacks {key}: it is cut off or of another network; get the file again")
        return self.state[key]

    def has_any(self, prefix: str) -> bool:
        """Return whether the file has tensors below a name."""
        return any(key.startswith(f"{prefix}.") for key in self.state)

    def take_batch_norm(self, prefix: str, name: str) -> None:
        for key in BATCH_NORM:
            self.take(f"{prefix}.{key}", f"{name}.{key}")
        self._take_counter(prefix, name)

    def take_coefficients(self, key: str, name: str, size: int) -> None:
        """Take the weight (O, I, F, 1, 1) of a merged layer as coefficients (O, I, F), with frequencies by level."""
        weight = self.get(key)
        frequencies = _frequencies(size, weight.shape[2] if weight.dim() == 5 else 0)
        if frequencies is None:
            raise InputError(
                f"{self.path}: {key} has shape {tuple(weight.shape)}, which is not (out, in, frequencies, 1, 1) "
                f"with whole levels of a {size}x{size} DCT"
            )
        order = _row_by_row_indices(size, len(frequencies))
        self.take(key, f"{name}.coefficients", lambda weight: weight.flatten(2)[:, :, order])
        self.layers.append(cut_layer(name, (size, size), frequencies, Basis("dct", "l1")))

    def take_block(self, weight: str, norm: str, name: str, size: int) -> None:
        """Take the first layer: weight (O, I x F, 1, 1), and statistics (I x F) of the responses if it has them."""
        whole = size * size
        shape = self.get(weight).shape
        if len(shape) != 4 or shape[1] != 3 * whole:
            raise InputError(
                f"{self.path}: {weight} has shape {tuple(shape)}, not (out, {3 * whole}, 1, 1): the first layer must "
                f"keep the whole {size}x{size} DCT of three channels"
            )
        reorder = partial(_reorder_responses, order=_row_by_row_indices(size, whole))
        self.take(weight, f"{name}.mix.weight", partial(reorder, axis=1))
        normalize = self.has_any(norm)
        for key in ("running_mean", "running_var") if normalize else ():
            self.take(f"{norm}.{key}", f"{name}.norm.{key}", partial(reorder, axis=0))
        if normalize:
            self.renamed[f"{name}.norm.num_batches_tracked"] = torch.tensor(0)
            self._take_counter(norm, f"{name}.norm")
        self.blocks[name] = BlockRecord(normalize, "l1")

    def check_dct(self, key: str, size: int, count: int, each_channel: bool) -> None:
        """Raise InputError if a recorded basis is not the L1-normalised DCT with ``count`` frequencies.

        The basis has shape (I x F, 1, K, K) with ``each_channel``, else (I or 1, F, K, K).
        """
        if key not in self.state:
            return
        self.used_keys.add(key)
        basis = self.state[key]
        frequencies = _frequencies(size, count)
        rows = basis.flatten() if each_channel else basis.flatten(1)
        if frequencies is None or basis.shape[-2:] != (size, size) or rows.shape[-1] % (count * size * size):
            raise InputError(
                f"{self.path}: {key} has shape {tuple(basis.shape)}, which is not the {size}x{size} DCT of its layer"
            )
        basis_FK = dct_basis((size, size), frequencies, "l1")[_inverse(_row_by_row_indices(size, count))]
        error = (basis.double().view(-1, *basis_FK.shape) - basis_FK).abs().max().item()
        if not error <= DCT_TOLERANCE:
            raise InputError(
                f"{self.path}: {key} is not the L1-normalised DCT from the zero frequency on (it differs by "
                f"{error:.1e}): networks with another basis are not supported"
            )

    def check_all_used(self) -> None:
        """Raise InputError if the file has tensors that were not used."""
        if rest := [key for key in self.state if key not in self.used_keys]:
            raise InputError(
                f"{self.path} has tensors that no such network of the reference implementation has: {shortened(rest)}"
            )

    def _take_counter(self, prefix: str, name: str) -> None:
        if f"{prefix}.num_batches_tracked" in self.state:
            self.take(f"{prefix}.num_batches_tracked", f"{name}.num_batches_tracked")


def _read_resnet(tensors: _Tensors, pool: str) -> dict[str, Any]:
    """Take the tensors of a ResNet; return its architecture and arguments.

    Harmonic layers are named ``harm1`` at the root and ``harm2`` in the bottlenecks.
    """
    state, path = tensors.state, tensors.path
    counts = _blocks_per_stage(state, r"layer(\d+)\.(\d+)\.")
    if "layer1.0.conv3.weight" not in state:
        raise InputError(
            f"{path} holds a ResNet of basic blocks (18 or 34 layers), which the reference implementation cannot run: "
            "its blocks cannot change the number of channels; only 50, 101 and 152 layers are supported"
        )
    if counts not in RESNETS:
        raise InputError(
            f"{path} has {'-'.join(map(str, counts))} blocks: only ResNets of 50, 101 and 152 layers are supported"
        )
    if not any(".harm" in f".{key}" for key in state):
        raise InputError(
            f"{path} holds a plain ResNet, no layer of it is harmonic: open it as {RESNETS[counts]}_nomaxpool, or "
            f"{RESNETS[counts]} if it has max pooling, with ", Argument("weights", path),
        )  # fmt: skip
    if tensors.has_any("harm1"):
        tensors.take_block("harm1.weight", "harm1.bn", "conv1", 7)
        tensors.check_dct("harm1.dct", 7, 49, each_channel=True)
    else:
        tensors.take("conv1.weight", "conv1.weight")
    tensors.take_batch_norm("bn1", "bn1")
    for stage, index in _block_positions(counts):
        block = f"layer{stage + 1}.{index}"
        if tensors.has_any(f"{block}.harm2"):
            tensors.take_coefficients(f"{block}.harm2.weight", f"{block}.conv2", 3)
            _check_resnet_dct(tensors, block)
        else:
            tensors.take(f"{block}.conv2.weight", f"{block}.conv2.weight")
        for key in ("conv1", "conv3"):
            tensors.take(f"{block}.{key}.weight", f"{block}.{key}.weight")
        for key in ("bn1", "bn2", "bn3"):
            tensors.take_batch_norm(f"{block}.{key}", f"{block}.{key}")
        if index == 0:
            tensors.take(f"{block}.downsample.0.weight", f"{block}.downsample.0.weight")
            tensors.take_batch_norm(f"{block}.downsample.1", f"{block}.downsample.1")
    for key in ("fc.weight", "fc.bias"):
        tensors.take(key, key)
    # With max pooling it is torchvision's ResNet, with the pre-processing of the reference implementation's training.
    name = f"{RESNETS[counts]}.tv_in1k" if pool == "max" else f"{RESNETS[counts]}_nomaxpool"
    arguments: dict[str, Any] = {"architecture": name, "num_classes": len(state["fc.weight"])}
    return arguments | ({"pool": "avg"} if pool == "avg" else {})


def _check_resnet_dct(tensors: _Tensors, block: str) -> None:
    count = tensors.state[f"{block}.harm2.weight"].shape[2]
    if count == 8 and f"{block}.harm2.dct" not in tensors.state:
        raise InputError(
            f"{tensors.path} lacks {block}.harm2.dct: without it, 8 frequencies may be all except the highest or all "
            "except the zero frequency; get a file that has it"
        )
    tensors.check_dct(f"{block}.harm2.dct", 3, count, each_channel=False)


def _read_wide_resnet(tensors: _Tensors) -> dict[str, Any]:
    """Take the tensors of a wide ResNet for CIFAR; return its architecture and arguments.

    The networks for STL have the same tensors but a first layer of stride 2, so they cannot be distinguished.
    """
    state, path = tensors.state, tensors.path
    counts = _blocks_per_stage(state, r"group(\d+)\.block(\d+)\.")
    if len(counts) != 3 or len(set(counts)) != 1:
        raise InputError(
            f"{path} has {'-'.join(map(str, counts))} blocks: a wide ResNet has three groups with equally many blocks"
        )
    if tensors.has_any("harmonic0"):
        tensors.take_block("harmonic0.conv", "harmonic0.bn", "stem", 3)
    else:
        tensors.take("conv0", "stem.weight")
    for stage, index in _block_positions(counts):
        block, name = f"group{stage}.block{index}", f"stage{stage + 1}.{index}"
        for number in (0, 1):
            tensors.take_batch_norm(f"{block}.bn{number}", f"{name}.norm{number + 1}")
            if tensors.has_any(f"{block}.harmonic{number}"):
                tensors.take_coefficients(f"{block}.harmonic{number}.conv", f"{name}.conv{number + 1}", 3)
            else:
                tensors.take(f"{block}.conv{number}", f"{name}.conv{number + 1}.weight")
        if f"{block}.convdim" in state:
            tensors.take(f"{block}.convdim", f"{name}.shortcut.weight")
    tensors.take_batch_norm("bn", "norm")
    tensors.take("fc.weight", "head.weight")
    tensors.take("fc.bias", "head.bias")
    _check_wide_resnet_dct(tensors)
    depth, features, classes = 6 * counts[0] + 4, state["fc.weight"].shape[1], len(state["fc.weight"])
    if features % 64:
        raise InputError(f"{path} has width {features / 64:g}: only wide ResNets of integer width are supported")
    name = f"wrn{depth}_{features // 64}"
    arguments: dict[str, Any] = {"architecture": name, "num_classes": classes}
    if not timm.is_model(name):
        arguments |= {"architecture": "wrn", "depth": depth, "width": features // 64}
    if classes in CIFAR:
        mean, std = CIFAR[classes]
        arguments |= {"mean": [value / 255 for value in mean], "std": [value / 255 for value in std]}
    return arguments


def _check_wide_resnet_dct(tensors: _Tensors) -> None:
    """Check the bases that a file records; files of the training code have none.

    ``dct`` is the basis of the first layer if that is the only harmonic layer.
    """
    kept = {len(layer.frequencies) for layer in tensors.layers}
    for key, count in {"dctfull": 9, "dctl3": 6, "dctl2": 3}.items():
        tensors.check_dct(key, 3, count, each_channel=False)
    tensors.check_dct("dct0", 3, 9, each_channel=True)
    tensors.check_dct("dct", 3, min(kept, default=9), each_channel=not kept)


def _pool(arguments: Mapping[str, Any]) -> str:
    """Return the pooling that the user named, or that of the architecture recorded when the file was read before."""
    recorded = str(arguments.get("architecture", ""))
    pool = arguments.get("pool", "max" if recorded and not recorded.endswith("_nomaxpool") else None) or "none"
    if pool not in POOLS:
        raise UsageError(f"pool (={pool!r}) must be one of {', '.join(POOLS)}")
    return str(pool)


def _blocks_per_stage(state: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Return the number of blocks of each stage; if one is missing in between, `_Tensors.get` reports its tensors."""
    blocks = [(int(m[1]), int(m[2])) for key in state if (m := re.match(pattern, key))]
    return tuple(
        1 + max(index for s, index in blocks if s == stage) for stage in sorted({stage for stage, _ in blocks})
    )


def _block_positions(counts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return ((stage, index) for stage, count in enumerate(counts) for index in range(count))


def _frequencies(size: int, count: int) -> tuple[tuple[int, ...], ...] | None:
    """Return the lowest frequencies of whole levels if they are ``count`` in number, else None."""
    levels = (frequencies_below((size, size), number) for number in range(1, level_count((size, size)) + 1))
    return next((frequencies for frequencies in levels if len(frequencies) == count), None)


def _row_by_row_indices(size: int, count: int) -> list[int]:
    """Return, for each frequency in the order of levels, its index in the row-by-row order of the reference.

    >>> _row_by_row_indices(3, 6)
    [0, 1, 3, 2, 4, 5]
    """
    by_level = all_frequencies((size, size))[:count]
    return [sorted(by_level).index(frequency) for frequency in by_level]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _reorder_responses(tensor: Tensor, axis: int, order: list[int]) -> Tensor:
    """Reorder the frequencies of each channel, along an axis of (channels x frequencies) in this order."""
    return tensor.unflatten(axis, (-1, len(order))).index_select(axis + 1, torch.tensor(order)).flatten(axis, axis + 1)
