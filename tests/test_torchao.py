"""The dense and the factored form with PyTorch's own tools: quantisation by torchao, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc

from .networks import random_input, seeded

pytest.importorskip("torchao")

FORMS = ("dense", "factored")
X = random_input((4, 3, 16, 16))


@pytest.fixture(scope="module")
def forms() -> dict[str, nn.Module]:
    """Return the forms of a network with cut frequencies in one layer and a low rank in another."""

    def network() -> nn.Module:
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), *head)

    model = hc.convert(seeded(network), {"2": 2}, rank={"6": 0.5}).model
    return {"dense": hc.fuse(model, X).eval(), "factored": hc.factor(model, X, layers="factored").eval()}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("form", FORMS)
def test_torchao_quantises_the_linear_layers(forms: dict[str, nn.Module], form: str) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantised = copy.deepcopy(forms[form])
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    assert "Int8Tensor" in {type(parameter).__name__ for parameter in quantised.parameters()}
    assert 0 < error(outputs(quantised, X), outputs(forms[form], X)) < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_torchao_quantises_the_exported_program_for_inductor(forms: dict[str, nn.Module], form: str) -> None:
    quantised = exported_in_8_bits(forms[form])
    operators = [str(node.target) for node in quantised.graph.nodes]
    # The convolutions: one in each of two layers; a cut layer in factored form has one for each of three frequencies
    # and one for the mixing.
    assert sum("aten.conv2d" in name for name in operators) == (2 if form == "dense" else 5)
    assert sum("quantize_per_channel" in name for name in operators) >= 3
    assert 0 < error(quantised(X), outputs(forms[form], X)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_takes_each_form_in_every_precision(forms: dict[str, nn.Module], form: str) -> None:
    expected = outputs(forms[form], X)
    assert error(outputs(torch.compile(forms[form], fullgraph=True), X), expected) < 1e-5
    half = torch.compile(copy.deepcopy(forms[form]).bfloat16().eval(), fullgraph=True)
    assert error(outputs(half, X.bfloat16()).float(), expected) < 0.05
    with torch.no_grad():
        assert error(torch.compile(exported_in_8_bits(forms[form]))(X), expected) < 0.05


def exported_in_8_bits(model: nn.Module) -> torch.fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, (X,)).module(), quantiser)
        prepared(X)
        return convert_pt2e(prepared)
