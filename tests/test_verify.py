from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from harmconvert.errors import InputError, UsageError
from harmconvert.network import convolutions, fuse, relative_difference, top1_agreement
from harmconvert.pipeline import convert, verify

from .networks import Branches, random_input, seeded

X = random_input((4, 3, 16, 16))
LAYERS = ["stem", "shared", "tied_a", "deep.odd name [x]", "unused"]


def pair(lam: Any = "full", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = seeded(Branches, dtype)
    return model, convert(model, lam, example_input=X.to(dtype)).model


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)]
)
def test_a_whole_basis_passes_in_every_dtype(dtype: torch.dtype, bound: float) -> None:
    model, converted = pair("full", dtype)
    check = verify(model, converted, X)
    assert check.ok, check.verdict
    assert check.as_planned
    assert check.tolerance == bound
    assert check.max_relative_error <= bound
    assert check.top1_agreement == 1.0
    assert check.inputs == 4
    assert (check.float32_error is None) == (dtype == torch.float64)
    assert check.verdict.startswith("verified: outputs differ by")


def test_results_for_layers_cover_every_convolution() -> None:
    check = verify(*pair(), X)
    assert {layer.name: layer.output_error is not None for layer in check.layers} == {
        "stem": True,
        "shared": True,
        "tied_a": True,
        "tied_b": True,
        "deep.odd name [x]": True,
        "unused": False,
    }
    assert all(layer.kernel_error < 1e-6 for layer in check.layers)
    assert all(layer.output_error is None or layer.output_error < 1e-6 for layer in check.layers)


def test_a_truncated_network_matches_its_plan_but_not_the_original() -> None:
    check = verify(*pair(2), X)
    assert not check.ok
    assert check.as_planned
    assert check.problems == ()
    assert check.max_relative_error > 1e-3
    assert check.verdict.startswith("cut as planned in 5 of 6 layers: outputs differ by ")
    assert verify(*pair(2), X, tolerance=10.0).ok
    assert not verify(*pair(2), X, tolerance=1e-3).ok


def test_the_dense_form_passes() -> None:
    model, converted = pair()
    assert verify(model, fuse(converted), X).ok
    assert verify(model, copy.deepcopy(model), X).max_relative_error == 0.0


def test_neither_network_is_changed() -> None:
    model, converted = pair()
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    verify(model, converted, X)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert model.stem.weight.dtype == torch.float32
    assert not converted.training


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lam", ["full", 2])
def test_a_coefficient_wrong_by_a_thousandth_is_detected_and_its_layer_named(name: str, lam: Any) -> None:
    model, converted = pair(lam)
    with torch.no_grad():
        converted.get_submodule(name).coefficients[-1, -1, -1] *= 1.001
    check = verify(model, converted, X)
    assert not check.ok
    assert not check.as_planned
    assert any(p.startswith(f"{name}: 1 of") and "coefficients are not the projection" in p for p in check.problems)
    assert check.verdict.startswith("not the same: ")


def test_a_small_coefficient_is_compared_relative_to_its_own_size() -> None:
    model = seeded(Branches)
    with torch.no_grad():
        model.shared.weight[3] *= 1e-6
    converted = convert(model, 2, example_input=X).model
    assert verify(model, converted, X).as_planned
    with torch.no_grad():
        converted.shared.coefficients[3, 0, 0] *= 1.001
    assert any(p.startswith("shared: 1 of") for p in verify(model, converted, X).problems)


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_of_the_dense_form_wrong_by_a_thousandth_is_detected_and_its_layer_named(name: str) -> None:
    model, converted = pair()
    dense = fuse(converted)
    conv: Any = dense.get_submodule(name)
    with torch.no_grad():
        largest = conv.weight.abs().argmax()
        conv.weight.view(-1)[largest] *= 1.001
    check = verify(model, dense, X)
    assert not check.ok
    assert any(p.startswith(f"{name}: kernel differs by") for p in check.problems)


def test_two_swapped_layers_are_detected_and_named() -> None:
    model, converted = pair()
    converted.shared.coefficients, converted.tied_a.coefficients = (
        converted.tied_a.coefficients,
        converted.shared.coefficients,
    )
    check = verify(model, converted, X)
    assert not check.ok
    assert {p.split(":")[0] for p in check.problems} == {"shared", "tied_a"}


@pytest.mark.parametrize(
    ("attribute", "value"), [("stride", (2, 2)), ("padding", (0, 0)), ("dilation", (2, 2)), ("padding_mode", "reflect")]
)
def test_a_wrong_attribute_is_detected_and_named(attribute: str, value: Any) -> None:
    model, converted = pair()
    setattr(converted.shared, attribute, value)
    check = verify(model, converted, X)
    assert not check.ok
    assert any(p.startswith(f"shared: {attribute} is {value}") for p in check.problems)


@pytest.mark.parametrize(
    "key", ["norm.running_mean", "norm.running_var", "norm.weight", "point.weight", "point.bias", "stem.bias"]
)
def test_one_changed_bit_in_another_tensor_is_detected_and_named(key: str) -> None:
    model, converted = pair()
    tensor = converted.state_dict()[key]
    tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))
    check = verify(model, converted, X)
    assert not check.ok
    assert f"{key}: differs from the original's" in check.problems


def test_a_missing_layer_is_detected_and_named() -> None:
    model, converted = pair()
    del converted.unused
    check = verify(model, converted, X)
    assert not check.ok
    assert "unused: only in the original" in check.problems


def test_a_completely_different_network_is_reported() -> None:
    small, large = timm.create_model("resnet18"), timm.create_model("resnet34")
    assert any("only in the converted network" in p for p in verify(small, large, torch.zeros(1, 3, 64, 64)).problems)


def test_nan_outputs_do_not_pass() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean((2, 3)) / 0.0

    model = seeded(Broken)
    converted = convert(model).model
    check = verify(model, converted, X)
    assert not check.ok
    assert check.notes == ("the outputs hold no finite value on these inputs: they cannot be compared",)


class Bumped(nn.Module):
    """Two classes with equal logits; a constant is added to the second in one precision or in all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self._bump, self._only = nn.Conv2d(3, 4, 3), 0.0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.conv(x).mean((1, 2, 3))[:, None].repeat(1, 2)
        bump = self._bump if self._only in (None, x.dtype) else 0.0
        return torch.stack([logits[:, 0], logits[:, 1] + bump], 1)


@pytest.mark.parametrize("only", [torch.float32, torch.float64])
def test_the_verdict_uses_the_worse_of_two_precisions(only: torch.dtype) -> None:
    model = seeded(Bumped)
    converted: Any = convert(model).model
    converted._bump, converted._only = 1.0, only
    check = verify(model, converted, X)
    assert min(check.float64_error, check.float32_error) < 1e-6
    assert check.max_relative_error == max(check.float64_error, check.float32_error) > 0.1
    assert not check.ok
    assert not verify(model, converted, X, tolerance=0.01).ok


def test_a_different_top_1_class_does_not_pass_even_if_the_outputs_are_close() -> None:
    model: Any = seeded(Bumped, torch.float64)
    model._bump = -4e-15
    converted: Any = convert(model).model
    assert verify(model, converted, X).ok
    converted._bump = 4e-15
    check = verify(model, converted, X)
    assert check.max_relative_error < check.tolerance
    assert check.problems == ()
    assert check.top1_agreement == 0.0
    assert not check.ok


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.5, -INF], [1.0, -INF], 0.5),
        ([1.0, INF], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, INF], INF),
        ([1.0, -INF], [1.0, INF], INF),
        ([1.0, 0.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, 2.0], NAN),
        ([NAN, INF], [NAN, INF], NAN),
    ],
)
def test_values_that_are_not_finite_must_be_equal(found: list[float], expected: list[float], difference: float) -> None:
    told = relative_difference(torch.tensor(found), torch.tensor(expected))
    assert told == pytest.approx(difference, nan_ok=True)


def test_a_network_that_only_runs_in_float32_is_noted() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.float()).mean((2, 3))

    model = seeded(Single)
    check = verify(model, convert(model).model, X)
    assert check.ok
    assert check.float64_error is None
    assert check.notes[0].startswith("not compared in float64: the original network does not run")


def test_default_inputs_have_the_size_that_the_network_declares() -> None:
    model = timm.create_model("resnet10t")
    assert verify(model, convert(model).model).inputs == 2
    with pytest.raises(UsageError, match=r"no input size is known for this network: give inputs$"):
        verify(*pair())


def test_inputs_that_do_not_fit_are_reported() -> None:
    with pytest.raises(UsageError, match="the original network does not run on these inputs"):
        verify(*pair(), torch.zeros(1, 7, 8, 8))


def test_a_verification_is_converted_to_json() -> None:
    import json

    check = verify(*pair(2), X)
    data = json.loads(json.dumps(check.to_json()))
    assert data["ok"] is False
    assert len(data["layers"]) == len([c for c in convolutions(pair()[0]).values() if c.kernel_size != (1, 1)])


class Decides(nn.Module):
    """A network whose outputs are not floating-point numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 3), kind

    def forward(self, x: torch.Tensor) -> Any:
        features = self.conv(x)
        return {"int": features.argmax(1), "complex": features * 1j, "numpy": features.detach().numpy()}[self.kind]


@pytest.mark.parametrize(("kind", "passes"), [("int", True), ("complex", True), ("numpy", False)])
def test_outputs_of_other_types_are_compared_or_reported(kind: str, passes: bool) -> None:
    model = seeded(lambda: Decides(kind), torch.float64)
    assert verify(model, convert(model).model, X).ok is passes
    cut = verify(model, convert(model, {"*": 1}).model, X)
    assert not cut.ok


def test_outputs_with_enums_and_cycles_are_compared_once() -> None:
    import enum

    class Colour(enum.Enum):
        RED = 1

    class Talks(Decides):
        def forward(self, x: torch.Tensor) -> Any:
            answer: dict[str, Any] = {"logits": self.conv(x).mean((2, 3)), "colour": Colour.RED}
            return answer | {"self": answer}

    model = seeded(lambda: Talks("int"))
    assert verify(model, convert(model).model, X).ok


def test_a_forward_pass_that_changes_its_input_is_compared_on_equal_inputs() -> None:
    class Normalises(Decides):
        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x.sub_(0.5)).mean((2, 3))

    model, inputs = seeded(lambda: Normalises("int")), X.clone()
    converted = convert(model, example_input=inputs).model
    assert verify(model, converted, inputs).ok
    assert torch.equal(inputs, X)


@pytest.mark.parametrize("size", [3, 64])
def test_a_fused_float64_network_equals_the_original(size: int) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv1d(3, 16, size)), torch.float64)
    check = verify(model, fuse(convert(model).model), random_input((2, 3, 80), torch.float64))
    assert check.ok, check.verdict


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-40), (torch.float16, 1e-5), (torch.float64, 1e-310)])
def test_the_low_precision_of_subnormal_weights_is_tolerated(dtype: torch.dtype, scale: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(scale)
    model = model.to(dtype)
    assert model[0].weight.abs().max() > 0
    dense = fuse(convert(model).model)
    assert verify(model, dense, X).problems == ()
    with torch.no_grad():
        dense[0].weight[1] = 0
    assert len(verify(model, dense, X).problems) == 1


def test_verifying_in_training_mode_does_not_change_spectral_norms() -> None:
    norm = nn.utils.parametrizations.spectral_norm
    model: Any = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), norm(nn.Conv2d(4, 4, 3)))).train()
    left = model[1].parametrizations.weight[0]._u
    left.copy_(nn.functional.normalize(torch.ones_like(left), dim=0))  # not converged, as during training
    converted = convert(model).model
    before = [{key: t.clone() for key, t in m.state_dict().items()} for m in (model, converted)]
    check = verify(model, converted, X)
    assert check.ok, check.verdict
    for old, network in zip(before, (model, converted), strict=True):
        assert all(torch.equal(old[key], tensor) for key, tensor in network.state_dict().items())
        assert all(module.training for module in network.modules())


def test_complex_buffers_keep_their_imaginary_parts() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("phase", torch.tensor(1j))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.conv(x) * self.phase).imag  # without imaginary parts, the output would be zero

    model = Turned().eval()
    check = verify(model, convert(model).model, X)
    assert check.ok, check.verdict
    other = convert(model).model
    with torch.no_grad():
        other.conv.coefficients[0, 0, 0] += 0.1
    assert verify(model, other, X).max_relative_error > 1e-3


def test_networks_without_values_are_not_compared() -> None:
    with torch.device("meta"):
        model = Branches()
    with pytest.raises(InputError, match=r"stem\.weight has no values to compare \(meta device\)"):
        verify(model, convert(model).model, X)


def test_classes_with_equal_logits_in_the_dtype_count_as_tied() -> None:
    eps = torch.finfo(torch.float32).eps
    ours = torch.tensor([[1.0, 1.0 - eps / 2, 0.5], [0.0, 0.0, 0.0], [1.0, 0.9, 0.0]])
    theirs = torch.tensor([[1.0 - eps, 1.0, 0.5], [0.0, 0.0, 1e-30], [0.9, 1.0, 0.0]])
    assert top1_agreement([(ours, theirs)], eps) == pytest.approx(2 / 3)
    assert top1_agreement([(ours[:1], theirs[:1])]) == 0.0
    flat = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with torch.no_grad():
        flat[0].bias.fill_(1.0)
        flat[0].weight.mul_(1e-9)
    check = verify(flat, convert(flat).model, X)
    assert check.ok, check.verdict


def test_outputs_without_finite_values_prove_nothing_and_the_verdict_says_so() -> None:
    model, converted = pair()
    check = verify(model, converted, X * torch.inf)
    assert not check.ok
    assert check.verdict.startswith("not verified: the outputs hold no finite value on these inputs")


def test_a_converted_layer_that_does_not_run_is_named() -> None:
    class Own(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(input, self._parameters["weight"], self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Own(4, 4, 3)).eval()
    with pytest.raises(UsageError, match=r"layer 1 of the converted network does not run in .*: KeyError: 'weight'"):
        verify(model, convert(model).model, X)


class Deployed(nn.Module):
    """A layer that adds two kernels when it enters eval mode, and then computes with their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 8, 3, bias=False)
        self.last = nn.Conv2d(8, 4, 1)
        self.kernel: torch.Tensor | None = None

    def deploy(self) -> Any:
        self.kernel = (self.one.weight + self.two.weight).detach()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is not None:
            return self.last(nn.functional.conv2d(x, self.kernel)).flatten(1)
        return self.last(self.one(x) + self.two(x)).flatten(1)


def test_a_cut_that_changes_no_output_does_not_pass() -> None:
    model: Any = seeded(Deployed)
    plan = {"*": 2}
    assert verify(model, convert(model, plan).model, X).as_planned  # here the network uses its layers
    model.deploy()
    check = verify(model, convert(model, plan).model, X)
    assert not check.ok
    assert not check.as_planned
    assert check.max_relative_error == 0
    assert "the outputs are exactly the same although 2 kernels are cut" in check.verdict
    assert "cut, but not called on these inputs: one, two" in check.notes
    assert verify(model, convert(model, "full").model, X).ok  # nothing is cut, so nothing may change


def test_a_cut_without_effect_on_the_inputs_matches_its_plan_but_is_not_verified() -> None:
    class Finder(nn.Module):
        """A network that returns the positions of large values; here it finds none."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            scores = self.two(self.one(x).relu()).sigmoid()
            return [scores[scores > 2]]

    model = seeded(Finder)
    check = verify(model, convert(model, {"*": 2}).model, X)
    assert (check.ok, check.as_planned) == (False, True)
    assert any("these inputs do not show the effect of the cut" in note for note in check.notes)
    assert verify(model, convert(model, "full").model, X).ok


def test_a_layer_that_does_not_use_its_weight_is_named() -> None:
    class Ready(nn.Conv2d):
        ready: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.ready = self.weight.detach().clone() if self.ready is None else self.ready
            return nn.functional.conv2d(x, self.ready, self.bias)

    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Ready(4, 4, 3), nn.Conv2d(4, 4, 3)))
    with torch.no_grad():
        model(X)
    check = verify(model, convert(model, {"*": 2}).model, X)  # without an example input, convert cannot detect this
    assert check.problems == ("1: its kernel is cut and its output is exactly the same: it does not use its weight",)


class Streaming(nn.Conv1d):
    """A convolution that keeps the end of its input for the next call."""

    end: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x.new_zeros(*x.shape[:2], 4) if self.end is None else self.end
        x = torch.cat([before, x], 2)
        self.end = x[..., -4:]
        return super().forward(x)


def test_layers_that_keep_state_over_calls_are_compared_without_a_trace() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Streaming(2, 8, 5), Streaming(8, 3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [self.two(self.one(part).relu()) for part in x.chunk(2, 2)]
            self.one.end = self.two.end = None
            return torch.cat(parts, 2)

    model: Any = seeded(Clip)
    converted: Any = convert(model, "full").model
    x = random_input((2, 2, 40))
    check = verify(model, converted, x)
    assert check.ok, check.verdict
    assert {layer.name for layer in check.layers if (layer.output_error or 0) < 1e-6} == {"one", "two"}
    assert converted.one.end is None


def _count(module: Any, _: Any) -> None:
    module.runs += 1


def test_hooks_that_record_values_record_nothing_during_verification() -> None:
    model: Any = seeded(Branches)
    seen: list[Any] = []
    model.stem.register_forward_hook(lambda *_: seen.append(1))
    model.register_buffer("runs", torch.zeros(1))
    model.register_forward_pre_hook(_count)
    converted: Any = convert(model, 2, example_input=X).model
    assert verify(model, converted, X).as_planned
    assert seen == []
    assert model.runs == converted.runs == 0


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore:TypedStorage:UserWarning")
def test_quantised_layers_are_compared_by_their_values() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    codes = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    model.register_buffer("codes", codes)
    converted: Any = convert(model, "full").model
    assert verify(model, converted, X).ok
    converted.codes = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    assert "codes: differs from the original's" in verify(model, converted, X).problems


def test_on_random_inputs_the_verdict_has_no_top1() -> None:
    model, cut = pair(2)
    assert "same top-1 on 4 of 4 inputs" in verify(model, cut, X).verdict
    verdict = verify(model, cut, X, random_inputs=True).verdict
    assert verdict.endswith("of the largest on 4 random inputs")
    sample = timm.create_model("test_resnet.r160_in1k", pretrained=False).eval()
    assert "2 random inputs" in verify(sample, convert(sample, "full").model).verdict


@pytest.mark.parametrize("lam", ["full", 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_network_that_was_fused_and_converted_again_matches_its_plan(dtype: torch.dtype, lam: Any) -> None:
    harmonic = convert(seeded(Branches, dtype), 2, example_input=X.to(dtype)).model
    again = convert(fuse(harmonic), lam, example_input=X.to(dtype)).model
    check = verify(harmonic, again, X)
    assert check.ok, check.verdict
    assert check.as_planned


def test_the_example_input_has_the_same_name_as_in_convert() -> None:
    model, cut = pair(2)
    assert verify(model, cut, example_input=X) == verify(model, cut, inputs=X) == verify(model, cut, X)
    with pytest.raises(UsageError, match="example_input and inputs are two names of one argument"):
        verify(model, cut, X, inputs=X)
