"""HarmonicBlock2d: it equals eq. 3 in loops, its gradients are correct, and both of its stages agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harmconvert.errors import UsageError
from harmconvert.layers import SEPARABLE_FROM, HarmonicBlock2d, fold_block

from . import oracle
from .networks import random_input

GEOMETRIES: list[tuple[Any, dict[str, Any]]] = [
    (3, {"stride": 2, "padding": 1}),
    (3, {"lam": 3, "padding": 2, "dilation": 2}),
    (3, {"lam": 2}),
    (3, {"lam": 1, "padding": 1}),
    ((2, 5), {"padding": (0, 2), "lam": 2}),
    (7, {"stride": 4, "padding": 3}),
    ((7, 1), {"padding": (3, 0), "normalization": "l1"}),
]


def block_of(kernel_size: Any, stage: str, normalize: bool = True, **more: Any) -> HarmonicBlock2d:
    torch.manual_seed(0)
    return HarmonicBlock2d(2, 3, kernel_size, bias=False, stage=stage, normalize=normalize, **more).double()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("stage", ["dense", "separable"])
@pytest.mark.parametrize(("size", "geometry"), [case for case in GEOMETRIES if "normalization" not in case[1]])
def test_the_block_equals_equation_3_in_loops(size: Any, geometry: dict[str, Any], stage: str, normalize: bool) -> None:
    block = block_of(size, stage, normalize, **geometry).train()
    x = random_input((3, 2, 9, 9), torch.float64)
    weights_OIF = block.mix.weight.detach().numpy().reshape(3, 2, -1)
    eps = block.norm.eps if normalize else None
    stride, padding, dilation = (geometry.get(key, default) for key, default in LOOPS.items())
    if isinstance(padding, tuple):  # the oracle pads all sides equally
        x_padded = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        expected = oracle.harmonic_layer(
            x_padded.numpy(), weights_OIF, block.kernel_size, block.frequencies, stride, 0, dilation, eps
        )
    else:
        expected = oracle.harmonic_layer(
            x.numpy(), weights_OIF, block.kernel_size, block.frequencies, stride, padding, dilation, eps
        )
    np.testing.assert_allclose(block(x).detach().numpy(), expected, atol=1e-11)


LOOPS = {"stride": 1, "padding": 0, "dilation": 1}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("stage", ["dense", "separable"])
@pytest.mark.parametrize(("size", "geometry"), GEOMETRIES[:5])
def test_gradients_are_those_of_finite_differences(
    size: Any, geometry: dict[str, Any], stage: str, normalize: bool
) -> None:
    block = block_of(size, stage, normalize, **geometry).train()
    x = random_input((2, 2, 7, 7), torch.float64).requires_grad_()
    weight = block.mix.weight.detach().clone().requires_grad_()

    def output(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return torch.func.functional_call(block, {"mix.weight": weight}, (x,))

    assert torch.autograd.gradcheck(output, (x, weight), atol=1e-6)


@pytest.mark.parametrize(("size", "geometry"), GEOMETRIES)
def test_both_stages_are_the_same_block(size: Any, geometry: dict[str, Any]) -> None:
    dense, separable = (block_of(size, stage, **geometry).train() for stage in ("dense", "separable"))
    x = random_input((3, 2, 12, 12), torch.float64)
    torch.testing.assert_close(separable(x), dense(x), rtol=1e-11, atol=1e-12)
    assert list(separable.state_dict()) == list(dense.state_dict())
    for block in (dense.eval(), separable.eval()):
        torch.testing.assert_close(fold_block(block)(x), block(x), rtol=1e-12, atol=1e-12)
    half = separable.half().to(torch.float32)
    assert half.row_basis.dtype == torch.float32
    torch.testing.assert_close(
        half.row_basis.double() @ half.row_basis.double().T,
        torch.diag((half.row_basis.double() ** 2).sum(1)),
        rtol=0,
        atol=1e-6,
    )


def test_with_gradients_auto_chooses_the_stage_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for stage in ("_dense_responses", "_separable_responses"):
        plain = getattr(HarmonicBlock2d, stage)
        monkeypatch.setattr(HarmonicBlock2d, stage, lambda self, x, s=stage, f=plain: taken.append(s) or f(self, x))
    small, large = HarmonicBlock2d(3, 4, 3), HarmonicBlock2d(3, 4, 7)
    assert 9 < SEPARABLE_FROM <= 49
    x = torch.zeros(2, 3, 9, 9)
    small(x), large(x)
    with torch.no_grad():
        large(x)
    assert taken == ["_dense_responses", "_separable_responses", "_dense_responses"]


def test_a_stage_chosen_by_measurement_is_kept() -> None:
    block = HarmonicBlock2d(3, 4, 5)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    chosen = block.choose_stage(torch.randn(2, 3, 8, 8), repeats=2)
    assert chosen == block.stage
    assert chosen in ("dense", "separable")
    assert all(torch.equal(value, block.state_dict()[key]) for key, value in state.items())
    with pytest.raises(UsageError, match=r"stage \(='quick'\) must be one of auto, dense, separable"):
        HarmonicBlock2d(3, 4, 5, stage="quick")


def test_the_block_has_as_many_weights_as_the_convolution_that_it_replaces() -> None:
    block, conv = HarmonicBlock2d(6, 9, 3, groups=3), nn.Conv2d(6, 9, 3, groups=3)
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in conv.parameters())
    assert block(torch.zeros(1, 6, 5, 5)).shape == conv(torch.zeros(1, 6, 5, 5)).shape
    assert block.norm.affine is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": 0}, "must be 'full' or an integer of at least 1"),
        ({"lam": "half"}, "lam"),
        ({"groups": 4}, "groups"),
    ],
)
def test_block_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HarmonicBlock2d(6, 9, 3, **arguments)
