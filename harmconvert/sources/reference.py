"""Checkpoints of the reference implementation (github.com/matej-ulicny/harmonic-networks), read as networks of ours.

Two kinds: state dicts of its ImageNet ResNets, and the flat dicts of tensors of its CIFAR wide residual networks. Both
multiply coefficients with L1-normalised DCT kernels as `normalization="l1"` does, but list frequencies row by row where
the house order is by level. Depth, width, classes, which layers are harmonic and what each keeps are read off the names
and shapes; nothing is run.
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
from ..errors import HarmconvertError, InputError, UsageError, first_line, shortened
from ..kernels.basis import Basis, all_frequencies, dct_basis, frequencies_below, level_count
from ..network.state import tensors_of
from ..plan import LayerPlan, Plan, cut_layer
from ..storage.checkpoint import BlockRecord, Header, Source, harmonic_like, in_form
from ..storage.weights import load_state, read_weights

POOLS = ("none", "avg", "max")
RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
# Mean and deviation of the images, in units of 255, that its training code takes from each data set.
CIFAR = {
    10: ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    100: ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}
DCT_TOLERANCE = 1e-6  # its DCT kernels are computed in float32; the largest values are 1/9

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def open_reference(path: str, arguments: Mapping[str, Any], form: str) -> tuple[nn.Module, Source, Header | None]:
    """The network that a checkpoint of the reference implementation holds, and what a file of ours would say of it.

    Args:
        path: the file, as its ``imagenet/main.py`` (.pth, .pth.tar) or ``cifar/main.py`` (.pt7) wrote it; other
            programs' .safetensors of the same tensors will do.
        arguments: ``pool``: what follows the stem of a ResNet, which the tensors do not tell: ``"none"`` (a stem of
            stride 4, its default), ``"avg"`` or ``"max"`` (stride 2). Those recorded in a `Source` are understood.
        form: ``"harmonic"`` or ``"dense"``.

    Returns:
        The network, its source, and its header; None for a header where the network is a plain one (``wrn``).

    Raises:
        InputError: unreadable, no such checkpoint, or of a network that has no counterpart here.
        UsageError: an unknown argument.
    """
    state = read_weights(path)
    try:
        return _opened(path, state, arguments, form)
    except HarmconvertError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        raise InputError(f"{path}: the shapes of its tensors do not go together: {first_line(error)}") from error


def _opened(
    path: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any], form: str
) -> tuple[nn.Module, Source, Header | None]:
    tensors = _Tensors(path, state)
    if any(re.match(r"layer\d+\.\d+\.", key) for key in state):
        made_with = _read_resnet(tensors, _pool(arguments))
    elif any(re.match(r"group\d+\.block\d+\.", key) for key in state):
        made_with = _read_wide_resnet(tensors)
    else:
        raise InputError(
            f"{path} is no ResNet and no wide ResNet of the reference implementation (there are: "
            f"{shortened(list(state), 3)}): name its network and give the weights with --checkpoint {path}"
        )
    tensors.check_all_taken()
    source = Source("reference", path, dict(made_with), tensors_sha256(state))
    plain = timm.create_model(made_with.pop("architecture"), **made_with)
    # Older files lack the batch norms' counters, which count for nothing here.
    counters = {key: value for key, value in tensors_of(plain).items() if key.endswith("num_batches_tracked")}
    plan = Plan(tuple(tensors.layers))
    # What it is now is where a fine-tuning starts: there never was an uncut network to calibrate it to.
    header = Header(plan, source, history={"training": [{"by": "the reference implementation"}]}, blocks=tensors.blocks)
    harmonic = harmonic_like(plain, plan, path, tensors.blocks)
    load_state(harmonic, counters | tensors.taken, path)
    model = in_form(harmonic, form)
    return model, source, header if tensors.layers or tensors.blocks else None


@dataclass
class _Tensors:
    """The tensors of a file while they are renamed: what was taken, and which layers were seen to be harmonic."""

    path: str
    state: Mapping[str, Tensor]
    taken: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerPlan] = field(default_factory=list)
    blocks: dict[str, BlockRecord] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def take(self, theirs: str, ours: str, order: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Take a tensor under our name; it has to be there."""
        self.taken[ours] = order(self.get(theirs)).contiguous()
        self.seen.add(theirs)

    def get(self, theirs: str) -> Tensor:
        """A tensor that has to be there."""
        if theirs not in self.state:
            raise InputError(f"{self.path} lacks {theirs}: it is cut off or of another network; get the file again")
        return self.state[theirs]

    def has_any(self, prefix: str) -> bool:
        """Whether there are tensors below a name."""
        return any(key.startswith(f"{prefix}.") for key in self.state)

    def take_batch_norm(self, theirs: str, ours: str) -> None:
        for key in BATCH_NORM:
            self.take(f"{theirs}.{key}", f"{ours}.{key}")
        self._take_counter(theirs, ours)

    def take_coefficients(self, theirs: str, ours: str, size: int) -> None:
        """The weight (O, I, F, 1, 1) of a merged layer, as coefficients (O, I, F) in the house order."""
        weight = self.get(theirs)
        frequencies = _frequencies(size, weight.shape[2] if weight.dim() == 5 else 0)
        if frequencies is None:
            raise InputError(
                f"{self.path}: {theirs} has shape {tuple(weight.shape)}, which is not (out, in, frequencies, 1, 1) "
                f"with whole levels of a {size}x{size} DCT"
            )
        order = _order(size, len(frequencies))
        self.take(theirs, f"{ours}.coefficients", lambda weight: weight.flatten(2)[:, :, order])
        self.layers.append(cut_layer(ours, (size, size), frequencies, Basis("dct", "l1")))

    def take_block(self, weight: str, norm: str, ours: str, size: int) -> None:
        """The first layer: weight (O, I x F, 1, 1) and, where it normalises, statistics (I x F) of the responses."""
        whole = size * size
        shape = self.get(weight).shape
        if len(shape) != 4 or shape[1] != 3 * whole:
            raise InputError(
                f"{self.path}: {weight} has shape {tuple(shape)}, not (out, {3 * whole}, 1, 1): only whole "
                f"{size}x{size} DCTs of three channels are read"
            )
        reorder = partial(_reorder_responses, order=_order(size, whole))
        self.take(weight, f"{ours}.mix.weight", partial(reorder, axis=1))
        normalize = self.has_any(norm)
        for key in ("running_mean", "running_var") if normalize else ():
            self.take(f"{norm}.{key}", f"{ours}.norm.{key}", partial(reorder, axis=0))
        if normalize:
            self.taken[f"{ours}.norm.num_batches_tracked"] = torch.tensor(0)
            self._take_counter(norm, f"{ours}.norm")
        self.blocks[ours] = BlockRecord(normalize, "l1")

    def check_dct(self, key: str, size: int, count: int, each_channel: bool) -> None:
        """Refuse a recorded basis that is another than the L1-normalised DCT of so many frequencies.

        ``each_channel``: shape (I x F, 1, K, K), else (I or 1, F, K, K).
        """
        if key not in self.state:
            return
        self.seen.add(key)
        found = self.state[key]
        frequencies = _frequencies(size, count)
        rows = found.flatten() if each_channel else found.flatten(1)
        if frequencies is None or found.shape[-2:] != (size, size) or rows.shape[-1] % (count * size * size):
            raise InputError(f"{self.path}: {key} has shape {tuple(found.shape)}, no {size}x{size} DCT of its layer's")
        basis_FK = dct_basis((size, size), frequencies, "l1")[_inverse(_order(size, count))]
        error = (found.double().view(-1, *basis_FK.shape) - basis_FK).abs().max().item()
        if not error <= DCT_TOLERANCE:
            raise InputError(
                f"{self.path}: {key} is not the L1-normalised DCT from the zero frequency on (it differs by "
                f"{error:.1e}): networks with another basis are not read"
            )

    def check_all_taken(self) -> None:
        """Refuse a file with tensors that nothing asked for."""
        if rest := [key for key in self.state if key not in self.seen]:
            raise InputError(
                f"{self.path} has tensors that no such network of the reference implementation has: {shortened(rest)}"
            )

    def _take_counter(self, theirs: str, ours: str) -> None:
        if f"{theirs}.num_batches_tracked" in self.state:
            self.take(f"{theirs}.num_batches_tracked", f"{ours}.num_batches_tracked")


def _read_resnet(tensors: _Tensors, pool: str) -> dict[str, Any]:
    """Architecture and arguments of a ResNet: ``harm1`` at the root, ``harm2`` in its bottlenecks, where harmonic."""
    state, path = tensors.state, tensors.path
    counts = _counts(state, r"layer(\d+)\.(\d+)\.")
    if "layer1.0.conv3.weight" not in state:
        raise InputError(
            f"{path} holds a ResNet of basic blocks (18 or 34 layers), which the reference implementation cannot run: "
            "its blocks take no other number of channels than they give; only 50, 101 and 152 layers are read"
        )
    if counts not in RESNETS:
        raise InputError(f"{path} has {'-'.join(map(str, counts))} blocks: only ResNets of 50, 101 and 152 are read")
    if not any(".harm" in f".{key}" for key in state):
        raise InputError(
            f"{path} holds a plain ResNet, no layer of it is harmonic: open it as {RESNETS[counts]}_nomaxpool, or "
            f"{RESNETS[counts]} where it pools maxima, with --checkpoint {path}"
        )
    if tensors.has_any("harm1"):
        tensors.take_block("harm1.weight", "harm1.bn", "conv1", 7)
        tensors.check_dct("harm1.dct", 7, 49, each_channel=True)
    else:
        tensors.take("conv1.weight", "conv1.weight")
    tensors.take_batch_norm("bn1", "bn1")
    for stage, index in _places(counts):
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
    # torchvision's configuration of the pooling one: that is what the reference implementation was trained with.
    name = f"{RESNETS[counts]}.tv_in1k" if pool == "max" else f"{RESNETS[counts]}_nomaxpool"
    arguments: dict[str, Any] = {"architecture": name, "num_classes": len(state["fc.weight"])}
    return arguments | ({"pool": "avg"} if pool == "avg" else {})


def _check_resnet_dct(tensors: _Tensors, block: str) -> None:
    count = tensors.state[f"{block}.harm2.weight"].shape[2]
    if count == 8 and f"{block}.harm2.dct" not in tensors.state:
        raise InputError(
            f"{tensors.path} lacks {block}.harm2.dct, without which 8 frequencies may be all but the highest or all "
            "but the zero one: get a file that has it"
        )
    tensors.check_dct(f"{block}.harm2.dct", 3, count, each_channel=False)


def _read_wide_resnet(tensors: _Tensors) -> dict[str, Any]:
    """Architecture and arguments of a wide ResNet for CIFAR.

    Its networks for STL have the very same tensors and a first layer of stride 2: nothing tells one from the other.
    """
    state, path = tensors.state, tensors.path
    counts = _counts(state, r"group(\d+)\.block(\d+)\.")
    if len(counts) != 3 or len(set(counts)) != 1:
        raise InputError(f"{path} has {'-'.join(map(str, counts))} blocks: a wide ResNet has three groups of as many")
    if tensors.has_any("harmonic0"):
        tensors.take_block("harmonic0.conv", "harmonic0.bn", "stem", 3)
    else:
        tensors.take("conv0", "stem.weight")
    for stage, index in _places(counts):
        theirs, ours = f"group{stage}.block{index}", f"stage{stage + 1}.{index}"
        for number in (0, 1):
            tensors.take_batch_norm(f"{theirs}.bn{number}", f"{ours}.norm{number + 1}")
            if tensors.has_any(f"{theirs}.harmonic{number}"):
                tensors.take_coefficients(f"{theirs}.harmonic{number}.conv", f"{ours}.conv{number + 1}", 3)
            else:
                tensors.take(f"{theirs}.conv{number}", f"{ours}.conv{number + 1}.weight")
        if f"{theirs}.convdim" in state:
            tensors.take(f"{theirs}.convdim", f"{ours}.shortcut.weight")
    tensors.take_batch_norm("bn", "norm")
    tensors.take("fc.weight", "head.weight")
    tensors.take("fc.bias", "head.bias")
    _check_wide_resnet_dct(tensors)
    depth, features, classes = 6 * counts[0] + 4, state["fc.weight"].shape[1], len(state["fc.weight"])
    if features % 64:
        raise InputError(f"{path} has width {features / 64:g}: only wide ResNets of a whole width are read")
    name = f"wrn{depth}_{features // 64}"
    arguments: dict[str, Any] = {"architecture": name, "num_classes": classes}
    if not timm.is_model(name):
        arguments |= {"architecture": "wrn", "depth": depth, "width": features // 64}
    if classes in CIFAR:
        mean, std = CIFAR[classes]
        arguments |= {"mean": [value / 255 for value in mean], "std": [value / 255 for value in std]}
    return arguments


def _check_wide_resnet_dct(tensors: _Tensors) -> None:
    """Its training code leaves them out of its files; ``dct`` is the root's where that is the only harmonic layer."""
    kept = {len(layer.frequencies) for layer in tensors.layers}
    for key, count in {"dctfull": 9, "dctl3": 6, "dctl2": 3}.items():
        tensors.check_dct(key, 3, count, each_channel=False)
    tensors.check_dct("dct0", 3, 9, each_channel=True)
    tensors.check_dct("dct", 3, min(kept, default=9), each_channel=not kept)


def _pool(arguments: Mapping[str, Any]) -> str:
    """What the user says of the pooling, or what the recorded architecture of a file read before says of it."""
    recorded = str(arguments.get("architecture", ""))
    pool = arguments.get("pool", "max" if recorded and not recorded.endswith("_nomaxpool") else None) or "none"
    if pool not in POOLS:
        raise UsageError(f"pool (={pool!r}) must be one of {', '.join(POOLS)}")
    return str(pool)


def _counts(state: Mapping[str, Tensor], pattern: str) -> tuple[int, ...]:
    """Blocks of each stage, in order; a hole in the numbers shows as a tensor that is missing."""
    found = [(int(m[1]), int(m[2])) for key in state if (m := re.match(pattern, key))]
    return tuple(1 + max(index for s, index in found if s == stage) for stage in sorted({stage for stage, _ in found}))


def _places(counts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return ((stage, index) for stage, count in enumerate(counts) for index in range(count))


def _frequencies(size: int, count: int) -> tuple[tuple[int, ...], ...] | None:
    """The frequencies of whole levels that are so many, or None."""
    levels = (frequencies_below((size, size), number) for number in range(1, level_count((size, size)) + 1))
    return next((frequencies for frequencies in levels if len(frequencies) == count), None)


def _order(size: int, count: int) -> list[int]:
    """Where each frequency, in the house order, stands in the reference implementation's, which is row by row.

    >>> _order(3, 6)
    [0, 1, 3, 2, 4, 5]
    """
    ours = all_frequencies((size, size))[:count]
    return [sorted(ours).index(frequency) for frequency in ours]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _reorder_responses(tensor: Tensor, axis: int, order: list[int]) -> Tensor:
    """Responses lie channel by channel, each with all its frequencies: put those in another order."""
    return tensor.unflatten(axis, (-1, len(order))).index_select(axis + 1, torch.tensor(order)).flatten(axis, axis + 1)
