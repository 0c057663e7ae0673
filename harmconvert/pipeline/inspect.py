"""inspect(): compute what a conversion could gain, without converting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs import packed_entry, stored_bytes
from ..errors import UsageError
from ..network.checks import check_network, check_weights
from ..network.layers import LayerInfo, all_layers, convolutions, stored_names
from ..network.state import tensors_of
from ..network.tracing import find_layers, trace_if_possible
from ..network.values import default_input
from ..plan import Bits, BitsSetting, Cost, RankSetting, Skip, energies_kept, make_plan, network_cost
from ..plan.precision import MOST_BITS, VECTOR_BITS, rounded_vectors

LAMBDAS = (1, 2, 3, 4)
# The shares of the full rank of which an inspection shows the cost.
RANKS = (0.5, 0.25)


@dataclass(frozen=True)
class LayerInspection:
    """A convolution over 1x1: the parameters of its kernel, its output size, and the energy that lambdas keep.

    The lambdas are `LAMBDAS`, scaled with the kernel. ``energy`` is None if the weights have no values.
    """

    name: str
    kind: str
    kernel: tuple[int, ...]
    parameters: int
    output_size: tuple[int, ...] | None
    energy: tuple[float, ...] | None


@dataclass(frozen=True)
class Inspection:
    """The layers of a network, and its cost after a conversion.

    ``policies`` maps each lambda to a cost, ``ranks`` each share of the full rank. ``one_by_one`` is the number of 1x1
    convolutions. ``codable_parameters``: number of weights that can be coded with fewer bits. ``other_bytes``: bytes of
    all other tensors in a file with coded weights, where vectors are packed.
    """

    layers: tuple[LayerInspection, ...]
    skipped: tuple[Skip, ...]
    parameters: int
    policies: dict[str, Cost]
    one_by_one: int
    codable_parameters: int = 0
    other_bytes: int = 0
    ranks: dict[str, Cost] = field(default_factory=dict)

    def coded_bytes(self, bits: float) -> int:
        """Return the bytes of the tensors in a file with this number of bits per coded weight."""
        return round(self.codable_parameters * bits / 8) + self.other_bytes

    @property
    def parameter_share(self) -> float:
        """Share of the network's parameters in convolutions over 1x1: an upper limit for what a cut can remove."""
        return self.policies["full"].parameter_share

    @property
    def mac_share(self) -> float | None:
        """Share of the network's MACs in convolutions over 1x1; None if the network was not run."""
        return self.policies["full"].mac_share

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        return asdict(self) | {"parameter_share": self.parameter_share, "mac_share": self.mac_share}


def inspect(model: nn.Module, example_input: Any = None, *, energies: bool = True) -> Inspection:
    """Compute what a conversion of ``model`` could gain; ``model`` is not changed.

    >>> inspect(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))).policies["2"].harmonic_parameters
    424

    Args:
        example_input: as for `convert`; without it and a size in ``pretrained_cfg``, there are no MACs and no cost of
            ``progressive``.
        energies: False leaves the energies out, for example for random weights.

    Raises:
        UsageError: the network does not accept the input, or is wrapped.
    """
    check_network(model)
    if energies:
        check_weights(model)
    policy_to_trace = "full" if example_input is None and default_input(model) is None else "any"
    run = trace_if_possible(model, policy_to_trace, example_input)
    found_layers = find_layers(model, run)
    plan = make_plan(found_layers, "full")
    policies = {}
    for policy in ("full", 3, "progressive", 2, 1):
        try:
            policies[str(policy)] = network_cost(model, make_plan(found_layers, policy), run)
        except UsageError:
            continue  # progressive needs feature map sizes
    ranks = {
        f"{share:g}": network_cost(model, make_plan(found_layers, "full", rank=RankSetting.of(share)), run)
        for share in RANKS
    }
    convs, size = convolutions(model), {layer.name: layer.output_size for layer in found_layers}
    layers = []
    for layer in plan.layers:
        weight = cast(Tensor, convs[layer.name].weight)
        energy = None
        if energies and not weight.is_meta and weight.is_floating_point():
            energy = energies_kept(weight, LAMBDAS)
        kind = type(convs[layer.name]).__name__
        layers.append(LayerInspection(layer.name, kind, layer.kernel_size, weight.numel(), size[layer.name], energy))
    ones = len(convs) - len(plan.layers) - sum(skip.name in convs for skip in plan.skipped)
    coded = _codable(model, found_layers)
    total, own = policies["full"].bytes, sum(stored_bytes(parameter) for parameter in coded) + _saved_by_packing(model)
    return Inspection(
        tuple(layers), plan.skipped, policies["full"].parameters, policies, ones,
        sum(parameter.numel() for parameter in coded), total - own, ranks,
    )  # fmt: skip


def _saved_by_packing(model: nn.Module) -> int:
    """Return how many bytes less the vectors need in a file with coded weights; 0 if the network has no values."""
    tensors = tensors_of(model, keep_vars=True)
    rounded = rounded_vectors(model, VECTOR_BITS[0])
    unique = {id(tensors[key]): (key, vector) for key, vector in rounded.items()}
    entries = [(vector, packed_entry(key, vector)) for key, vector in unique.values()]
    return sum(stored_bytes(vector) - stored_bytes(vector, entry) for vector, entry in entries if entry)


def _codable(model: nn.Module, found_layers: Sequence[LayerInfo]) -> list[Tensor]:
    """Return the weights that a conversion with bits would code; tied ones once."""
    modules = all_layers(model)
    plan = make_plan(found_layers, "full", bits=BitsSetting.of(MOST_BITS))
    named = plan.on(Bits.axis)
    weights = [modules[name]._parameters.get(stored) for name in named for stored in stored_names(modules[name])]
    unique = {id(weight): weight for weight in weights if weight is not None and not is_lazy(weight)}
    return [weight for weight in unique.values() if weight.is_floating_point()]
