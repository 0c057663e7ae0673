"""Calibration inputs are stored channels_last if this is faster and does not change the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harmconvert.calibration import CalibrationContext, CalibrationSettings, calibration_set, with_best_memory_format
from harmconvert.pipeline import convert

from .networks import random_input, seeded
from .seams import replace_everywhere

X = random_input((8, 3, 10, 12))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(240, 4))


class Views(nn.Module):
    """A network that calls ``view``, as older networks do before their last layer: it fails on channels_last maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(640, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


class Assumes(Views):
    """A network that silently assumes contiguous maps."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(y.as_strided((len(y), 640), (640, 1)))


def channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_are_stored_channels_last_with_the_same_values(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    data = CalibrationContext.of(seeded(small, dtype), x.split(4), CalibrationSettings()).data
    assert [len(batch) for batch in (*data.fit, *data.held)] == [3, 3, 1, 1]
    for batch in (*data.fit, *data.held):
        assert channels_last(batch.input)
        assert torch.equal(batch.input, x[list(batch.examples)])
    assert x.is_contiguous(), "the caller's own are left as they are"


def test_images_in_any_container_are_stored_channels_last() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"map": self.conv(image) * scale[:, None, None, None]}

    scale = torch.arange(1.0, 9.0)
    for batch in ({"image": X, "scale": scale}, ((X, scale), None)):
        ((fit,), (held,)) = (data := with_best_memory_format(seeded(Two), calibration_set([batch]))).fit, data.held
        for part in (fit.input, held.input):
            image, factor = part.values() if isinstance(part, dict) else part
            assert channels_last(image)
            assert factor.dim() == 1


@pytest.mark.parametrize("model", [Views, Assumes])
def test_networks_that_assume_contiguous_maps_get_contiguous_inputs(model: type[nn.Module]) -> None:
    network, data = seeded(model), calibration_set(X.split(4))
    (fallback,) = (unchanged := with_best_memory_format(network, data)).fallbacks
    assert fallback.startswith("inputs are not in channels_last: ")
    assert (unchanged.fit, unchanged.held) == (data.fit, data.held)
    with torch.no_grad():
        before = network(X)
    found = convert(network, 2, include=["*"], example_input=X[:1], calibration=X.split(4))
    assert found.calibration is not None
    assert [layer.decision for layer in found.calibration.layers] == ["refit"]
    assert fallback in found.calibration.fallbacks
    with torch.no_grad():
        assert torch.equal(network(X), before)


def test_a_network_is_not_timed_on_inputs_for_which_the_memory_format_makes_no_difference() -> None:
    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("nothing is to be seen here")

    class Never(nn.Module):
        forward = staticmethod(refuse)

    for x in (X[:, :1], X[:, :, :1, :1], X[:, :, 0], X.contiguous(memory_format=torch.channels_last)):
        data = calibration_set([x])
        assert with_best_memory_format(Never(), data) is data


def test_with_nan_outputs_the_memory_format_stays_unchanged() -> None:
    class Undefined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3)) * torch.nan

    data = calibration_set(X.split(4))
    unchanged = with_best_memory_format(Undefined(), data)
    assert unchanged.fallbacks == ("inputs are not in channels_last: the outputs differ",)
    assert (unchanged.fit, unchanged.held) == (data.fit, data.held)


def test_the_refit_is_the_same_in_both_memory_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(small), torch.cat([X, X.flip(3), X.roll(3, 2)])
    found = convert(model, 3, include=["*"], example_input=x[:1], calibration=x.split(6))
    replace_everywhere(monkeypatch, with_best_memory_format, lambda model, data: data)
    expected = convert(model, 3, include=["*"], example_input=x[:1], calibration=x.split(6))
    for key, tensor in expected.model.state_dict().items():
        assert torch.allclose(found.model.state_dict()[key], tensor, rtol=1e-3, atol=1e-5), key
    assert found.calibration is not None
    assert [layer.decision for layer in found.calibration.layers] == ["refit", "refit"]
