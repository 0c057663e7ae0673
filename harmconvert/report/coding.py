"""The bits and bytes of each layer of a coded checkpoint, as facts and as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs import Entry, entry_in_file, stored_bytes
from ..network.state import tensors_of
from .charts import Chart, Series, axis, counted
from .facts import LayerBytes, total_bytes
from .text import byte_unit, layer_name


def layer_bytes(model: nn.Module, coded: Mapping[str, Entry]) -> tuple[LayerBytes, ...]:
    """Return the bytes of each layer in a file, in the order of the network; empty if no weight is coded.

    Layers are the modules that have a coded weight, or another tensor with several axes, such as an embedding. The
    tensors of other modules, such as norms, count for the layer before them; those before the first layer count for the
    first one. Tied tensors count once, for their first layer.

    Args:
        model: the network in harmonic form. coded: the entries of its coded tensors.
    """
    if not coded:
        return ()
    unique: dict[int, tuple[str, str, Tensor]] = {}
    for key, tensor in tensors_of(model, keep_vars=True).items():
        unique.setdefault(id(tensor), (key.rpartition(".")[0], key, tensor))
    tensors = [one for one in unique.values() if not is_lazy(one[2])]
    names = dict.fromkeys(owner for owner, key, tensor in tensors if key in coded or tensor.dim() > 1)
    layers = {name: LayerBytes(name, 0, 0, 0) for name in names}
    name = next(iter(names))
    for owner, key, tensor in tensors:
        name = owner if owner in names else name
        layer, size = layers[name], stored_bytes(tensor, entry_in_file(key, tensor, coded))
        if key in coded:
            weights, coded_bytes = layer.weights + tensor.numel(), layer.coded_bytes + size
            layers[name] = replace(layer, weights=weights, coded_bytes=coded_bytes)
        else:
            layers[name] = replace(layer, plain_bytes=layer.plain_bytes + size)
    return tuple(layers.values())


def bits_charts(layers: Sequence[LayerBytes]) -> list[Chart]:
    """Return charts of the bits per coded weight and of the bytes of each layer; empty if no weight is coded."""
    average = total_bytes(layers).bits
    if average is None:
        return []
    x = counted("layer, in the order of the network", len(layers))
    texts = [layer_text(layer) for layer in layers]
    numbered = list(enumerate(zip(layers, texts, strict=True), 1))
    bits = tuple((n, layer.bits, text) for n, (layer, text) in numbered if layer.bits is not None)
    y = axis("bits per coded weight", (value for _, value, _ in bits), zero=True)
    off_scale = tuple((n, y.high, text) for n, (layer, text) in numbered if layer.bits is None)
    series = [
        Series("coded", "bars", "a", bits),
        Series("not coded, above the axis", "bars", "grey", off_scale),
        Series(f"average {average:.2f}", "line", "b", ((x.low, average, ""), (x.high, average, ""))),
    ]
    sizes = [layer.coded_bytes + layer.plain_bytes for layer in layers]
    size, unit = byte_unit(max(sizes))
    # The bars of all tensors are behind the bars of the coded tensors: the part that is not coded is visible.
    whole = tuple((n, sizes[n - 1] / size, text) for n, (_, text) in numbered)
    coded = tuple((n, layer.coded_bytes / size, "") for n, (layer, _) in numbered if layer.coded_bytes)
    in_file = (Series("not coded", "bars", "grey", whole), Series("coded", "bars", "a", coded))
    return [
        Chart("bits", "Bits per coded weight of each layer", x, y, tuple(one for one in series if one.points)),
        Chart(
            "bytes", "Bytes of each layer", x, axis(f"{unit} in the file", (y for _, y, _ in whole), zero=True), in_file
        ),
    ]


def layer_text(layer: LayerBytes) -> str:
    """Describe the bits and bytes of a layer in a few lines."""
    lines = [layer_name(layer.name)]
    if layer.bits is not None:
        lines.append(f"{layer.weights:,} weights of {layer.bits:.3g} bits: {layer.coded_bytes:,} bytes")
    return "\n".join([*lines, f"not coded: {layer.plain_bytes:,} bytes"])
