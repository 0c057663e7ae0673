"""Derivatives of every order and kind of the factored form equal those of the harmonic form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from harmconvert.layers import FactoredMixin
from harmconvert.network import factor
from harmconvert.pipeline import convert

from .networks import random_input, seeded

X = random_input((2, 3, 10, 10))


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 5, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(45, 1)
    )


def _values(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in network.named_parameters()}


def gradient_penalty(network: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    return [x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]


def third_order(network: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    value = network(x).square().sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.square().sum()
    return list(torch.autograd.grad(value, x))


def hessian_vector_product(network: nn.Module) -> list[Tensor]:
    return [torch.autograd.functional.hvp(lambda x: network(x).square().sum(), X, torch.ones_like(X))[1]]


def gradients_of_parameters(network: nn.Module) -> list[Tensor]:
    return list(grad(lambda p: functional_call(network, p, (X,)).sum())(_values(network)).values())


def gradients_of_each_example(network: nn.Module) -> list[Tensor]:
    one = grad(lambda p, x: functional_call(network, p, (x[None],)).sum())
    return list(vmap(one, (None, 0))(_values(network), X).values())


def jacobian(network: nn.Module) -> list[Tensor]:
    return [jacrev(network)(X)]


def several_batches_at_once(network: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [vmap(network)(torch.stack([X, 2 * X]))]


def forward_mode_of_func(network: nn.Module) -> list[Tensor]:
    return list(jvp(network, (X,), (torch.ones_like(X),)))


def dual_numbers_without_gradients(network: nn.Module) -> list[Tensor]:
    with forward_ad.dual_level(), torch.no_grad():
        return list(forward_ad.unpack_dual(network(forward_ad.make_dual(X, torch.ones_like(X)))))


def recomputed(network: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    checkpoint(network, x, use_reentrant=False).sum().backward()
    return [x.grad, *(p.grad for p in network.parameters())]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of torch itself, in forward mode
@pytest.mark.parametrize(
    "derivative",
    [
        gradient_penalty, third_order, hessian_vector_product, gradients_of_parameters, gradients_of_each_example,
        jacobian, several_batches_at_once, forward_mode_of_func, dual_numbers_without_gradients, recomputed,
    ],
)  # fmt: skip
def test_derivatives_equal_those_of_the_harmonic_form(derivative: Callable[[nn.Module], list[Tensor]]) -> None:
    harmonic = convert(seeded(_network), {"*": 2}).model
    factored = factor(harmonic, layers="factored")
    assert sum(isinstance(module, FactoredMixin) for module in factored) == 2
    expected, found = derivative(harmonic), derivative(factored)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_temporarily_replaced_parameters_are_used_in_each_call() -> None:
    """Freed values may give their address to the next ones, so an address does not identify values."""
    harmonic = convert(seeded(_network), {"*": 2}).model
    factored = factor(harmonic, layers="factored")
    with torch.no_grad():
        for scale in range(1, 5):
            swapped = {key: scale * value for key, value in _values(factored).items()}
            found = functional_call(factored, swapped, (X,))
            assert torch.allclose(found, functional_call(harmonic, swapped, (X,)), rtol=1e-4)
            del swapped
