from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import ScaledStdConv2d
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.ops import DeformConv2d

import harmconvert.models  # noqa: F401  registers wrn28_10
from harmconvert.errors import HarmconvertWarning, InputError, UsageError
from harmconvert.kernels import dct_basis, energy_kept, project, reconstruct, relative_error
from harmconvert.layers import HarmonicMixin, to_harmonic
from harmconvert.network import fuse, trace
from harmconvert.pipeline import convert, inspect, verify
from harmconvert.plan import Plan, cut_layer, parameter_count
from harmconvert.search import SearchSettings

from .networks import CONVOLUTIONS, Branches, random_input, seeded

X = random_input((2, 3, 16, 16))


def fingerprint(model: nn.Module) -> Any:
    tensors = {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    return tensors, [(name, id(m), m.training) for name, m in model.named_modules()], torch.get_rng_state()


def unchanged(before: Any, model: nn.Module) -> bool:
    after = fingerprint(model)
    tensors = all(before[0][k][0] == i and torch.equal(before[0][k][1], t) for k, (i, t) in after[0].items())
    return tensors and before[1] == after[1] and torch.equal(before[2], after[2])


@pytest.mark.parametrize("lam", ["full", 3, 2, "progressive", {"*": 1}])
def test_convert_never_changes_its_argument(lam: Any) -> None:
    model = seeded(Branches).train()
    model.norm.eval()
    before = fingerprint(model)
    conversion = convert(model, lam, example_input=X)
    assert unchanged(before, model)
    assert [m.training for m in conversion.model.modules()] == [m.training for m in model.modules()]
    with torch.no_grad():
        for parameter in conversion.model.parameters():
            parameter.zero_()
    assert unchanged(before, model), "no storage may be shared"


def test_a_whole_basis_is_exact_with_shared_tied_and_unusual_layers() -> None:
    model = seeded(Branches, torch.float64)
    converted = convert(model, example_input=X.double()).model
    assert (converted(X.double()) - model(X.double())).abs().max() < 1e-14
    assert converted.shared is converted.alias
    assert converted.tied_a.coefficients is converted.tied_b.coefficients
    assert parameter_count(converted) == parameter_count(model)


def test_fusing_keeps_ties_and_sharing() -> None:
    dense = fuse(convert(seeded(Branches), 2, example_input=X).model)
    assert dense.tied_a.weight is dense.tied_b.weight
    assert dense.shared is dense.alias
    assert not any(isinstance(m, HarmonicMixin) for m in dense.modules())


def test_references_outside_the_module_tree_point_to_the_converted_layers() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.order = [self.conv]  # a plain list does not register its modules

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.order[0](x)

    converted: Any = convert(Listed()).model
    assert converted.order[0] is converted.conv
    assert isinstance(converted.conv, HarmonicMixin)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_network_that_is_a_single_convolution_is_converted(kind: str) -> None:
    make, shape = CONVOLUTIONS[kind]
    conv = seeded(make)
    conversion = convert(conv, example_input=random_input(shape))
    assert isinstance(conversion.model, HarmonicMixin)
    assert [layer.name for layer in conversion.layers] == [""]
    assert type(fuse(conversion.model)) is type(conv)


def test_records_describe_the_conversion_of_each_layer() -> None:
    model = seeded(Branches)
    conversion = convert(model, 2, example_input=X, exclude=["unused"])
    records = {layer.name: layer for layer in conversion.layers}
    assert list(records) == ["stem", "shared", "tied_a", "tied_b", "deep.odd name [x]", "unused"]
    assert records["stem"].why == "whole: it reads the network's input"
    assert (records["stem"].kept, records["stem"].energy) == (9, 1.0)
    assert records["stem"].error < 1e-6
    cut, weight = records["shared"], model.shared.weight
    basis_FK = dct_basis((3, 3), ((0, 0), (0, 1), (1, 0)))
    assert (cut.kept, cut.total, cut.kernel, cut.kind) == (3, 9, (3, 3), "Conv2d")
    assert cut.energy == pytest.approx(energy_kept(weight, basis_FK), abs=1e-6)
    assert cut.error == pytest.approx(
        relative_error(reconstruct(project(weight, basis_FK), basis_FK, (3, 3)), weight), rel=1e-6
    )
    assert records["unused"].skipped
    assert records["unused"].why == "excluded by unused"
    assert records["unused"].energy is None


@pytest.mark.parametrize(("lam", "millions"), [("full", "36.5"), (3, "24.4"), (2, "12.3"), ("progressive", "15.7")])
def test_wrn_28_10_has_the_sizes_published_in_the_paper(lam: Any, millions: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("wrn28_10")
    conversion = convert(model, lam)
    assert f"{parameter_count(conversion.model) / 1e6:.1f}" == millions
    assert conversion.cost.harmonic_parameters == parameter_count(conversion.model)


def test_resnet50_has_the_size_published_in_the_paper() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    conversion = convert(model, "progressive")
    assert f"{parameter_count(conversion.model) / 1e6:.2f}" == "19.66"
    assert conversion.cost.harmonic_parameters == parameter_count(conversion.model)


@pytest.mark.parametrize(
    ("name", "share"),
    [("resnet18", "94%"), ("resnet50", "44%"), ("convnext_tiny", "6.6%"), ("efficientnet_b0", "3.5%")],
)
def test_the_share_of_parameters_in_kernels_larger_than_1x1_is_correct(name: str, share: str) -> None:
    with torch.device("meta"):
        cost = convert(timm.create_model(name)).cost
    assert f"{cost.parameter_share:.{1 if '.' in share else 0}%}" == share


def test_progressive_takes_the_input_size_from_the_networks_own_configuration() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    kept = {layer.name: layer.kept for layer in convert(model, "progressive").layers}
    assert (kept["conv1"], kept["layer1.0.conv1"], kept["layer3.0.conv1"], kept["layer4.1.conv2"]) == (49, 9, 6, 3)


def test_the_advice_for_a_policy_that_cuts_nothing_names_one_that_does() -> None:
    with torch.device("meta"):
        conversion = convert(timm.create_model("efficientnet_b0"), "progressive")
    assert conversion.advice is not None
    assert "cuts nothing in this network" in conversion.advice
    assert "lam='PATTERN=N' or include=PATTERN" in conversion.advice
    assert convert(seeded(Branches), "full").advice is None
    assert convert(seeded(Branches), 2).advice is None


def test_a_plan_gives_the_same_network_as_its_policy() -> None:
    model = seeded(Branches)
    first = convert(model, "progressive", example_input=X)
    again = convert(model, Plan.from_json(first.plan.to_json()))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_converting_the_fused_network_again_changes_nothing() -> None:
    first = convert(seeded(Branches), 2, example_input=X).model
    again = convert(fuse(first), 2, example_input=X).model
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_l1_normalisation_gives_the_same_network() -> None:
    model = seeded(Branches, torch.float64)
    ortho, l1 = (convert(model, 2, normalization=n).model for n in ("ortho", "l1"))
    torch.testing.assert_close(ortho(X.double()), l1(X.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = seeded(Branches, dtype)
    assert {p.dtype for p in convert(model, 2).model.parameters()} == {dtype}


def test_the_input_layer_is_found_by_a_run_or_by_the_order_of_layers() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(4, 4, 3)
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x * 2))  # the input is scaled first

    kept = {layer.name: layer.kept for layer in convert(Backwards(), 2, example_input=X).layers}
    assert kept == {"last": 3, "first": 9}
    kept = {layer.name: layer.kept for layer in convert(Backwards(), 2).layers}
    assert kept == {"last": 9, "first": 3}


def test_inputs_may_be_a_tuple_a_dict_or_a_list() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Any, scale: Any = 1) -> torch.Tensor:
            return self.conv(x[0] if isinstance(x, list) else x) * scale

    for inputs in ((X, 2.0), {"x": X, "scale": 2.0}, [X]):
        assert trace(Two(), inputs).layers["conv"].reads_input


def test_a_layer_behind_attention_does_not_read_the_input() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    assert not any(run.reads_input for run in trace(encoder, torch.rand(1, 5, 16)).layers.values())
    embedded = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16))
    assert not trace(embedded, torch.zeros(1, 5, dtype=torch.long)).layers["1"].reads_input
    assert trace(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), torch.rand(2, 8)).layers["1"].reads_input


def test_macs_equal_a_calculation_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(1024, 5)
    )
    run = trace(net, torch.zeros(2, 3, 8, 8))
    first, second, linear = 2 * 64 * 8 * 27, 2 * 64 * 8 * 4 * 4, 2 * 1024 * 5
    assert (run.layers["0"].macs, run.layers["1"].macs) == (first, second)
    assert run.macs == first + second + linear
    cost = convert(net, {"0": 2}, example_input=torch.zeros(2, 3, 8, 8)).cost
    assert cost.dense_macs == run.macs // 2
    # Responses: 3 channels at 64 positions with 15 multiply-adds each; then 3 of the convolution's 9 multiply-adds.
    assert cost.factored_macs == cost.dense_macs - 64 * 8 * 27 + 64 * (3 * 15 + 8 * 9)
    assert cost.merge_macs == 8 * 3 * 3 * 9 + 8 * 4 * 4 * 4
    # Fitted kernels are not separable, so each response needs nine multiply-adds.
    cost = convert(net, {"0": 2}, example_input=torch.zeros(2, 3, 8, 8), basis="klt").cost
    assert cost.factored_macs == cost.dense_macs - 64 * 8 * 27 + 64 * (3 * 27 + 8 * 9)


def test_convert_restores_counters_of_forward_passes() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = x.mean((0, 1))
            return self.norm(self.conv(self.stem(x))).mean((2, 3))

    net = Counts().eval()
    batches = [random_input((16, 1, 8, 8)) for _ in range(2)]
    for given in ({}, {"calibration": batches}, {"calibration": batches, "budget": {"params": 0.7}}):
        found = convert(net, **({"lam": 2} if "budget" not in given else {}), example_input=batches[0], **given)
        inspect(net, batches[0])
        for model in (net, found.model):
            assert model.calls == 0
            assert model.last is None
        assert verify(net, found, batches[0]).as_planned


def test_a_deformable_convolution_is_named() -> None:
    class Deforms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bent = nn.Conv2d(3, 4, 3), DeformConv2d(4, 4, 3)

    skips = {layer.name: layer.why for layer in convert(Deforms()).layers if layer.skipped}
    assert skips == {"bent": "its kernel reads at positions that depend on the input"}


def test_skipped_convolutions_are_not_counted_as_1x1() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), weight_norm(nn.Conv2d(4, 4, 3)))
    assert inspect(net).one_by_one == 1


def test_a_layer_without_a_factored_form_saves_no_macs() -> None:
    net = nn.Sequential(ScaledStdConv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 3))
    cost = convert(net, {"*": 2}, example_input=torch.zeros(2, 3, 8, 8)).cost
    assert cost.factored_macs == cost.dense_macs
    search = SearchSettings(axes=("space",))
    with pytest.raises(UsageError, match="cannot be met"):
        convert(net, budget={"macs": 0.9}, include=["*"], example_input=torch.zeros(2, 3, 8, 8), search=search)
    ranked = convert(net, rank={"*": 1}, example_input=torch.zeros(2, 3, 8, 8)).cost
    one = convert(net, rank={"1": 1}, example_input=torch.zeros(2, 3, 8, 8)).cost
    assert ranked.factored_macs == one.factored_macs, "a standardised weight of low rank is not two layers"


def test_calls_of_a_shared_layer_add_up() -> None:
    run = trace(seeded(Branches), X).layers["shared"]
    assert (run.calls, run.order, run.output_size) == (2, 1, (8, 8))
    assert run.macs == 2 * (2 * 64 * 8 * 8 * 9)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "this Linear has no convolution over 1x1 to convert (it has none)"),
        (nn.Conv2d(3, 3, 1), "this Conv2d has no convolution over 1x1 to convert (it has none)"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))), "0: its weight is parametrized"),
        (
            timm.layers.BlurPool2d(3),
            "this BlurPool2d has no convolution over 1x1 to convert (: its blur filter is fixed",
        ),
        (timm.layers.CondConv2d(3, 3, 3, num_experts=2), "its kernels are computed anew for each input"),
    ],
)
def test_a_network_without_convertible_layers_raises_input_error(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError) as caught:
        convert(model)
    assert message in str(caught.value)


def test_the_message_for_nan_weights_names_the_layer() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        model = seeded(Branches)
        with torch.no_grad():
            model.point.weight[0, 0] = value
        with pytest.raises(InputError, match=r"point\.weight holds NaN or infinite values"):
            convert(model)
    model = seeded(Branches)
    model.norm.running_var[1] = float("nan")
    with pytest.raises(InputError, match=r"norm\.running_var holds NaN"):
        convert(model)


def test_integer_weights_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].weight = nn.Parameter(torch.ones(4, 3, 3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="layer 0 has int8 weights: convert the network before it is quantised"):
        convert(model)


def test_quantised_networks_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.nn.quantized.Conv2d(3, 4, 3)
    with pytest.raises(InputError, match="it is quantised"):
        convert(nn.Sequential(quantised))


def test_the_message_for_a_wrapped_network_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"wrapped in DataParallel: pass model\.module"):
        convert(nn.DataParallel(Branches()))
    with pytest.raises(UsageError, match=r"wrapped in OptimizedModule: pass model\._orig_mod"):
        convert(torch.compile(Branches()))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module, not dict"):
        convert({})  # type: ignore[arg-type]


def test_the_message_for_a_wrong_example_input_says_how_to_pass_another() -> None:
    with pytest.raises(UsageError, match=r"does not run on an example input of shape \(2, 5, 8, 8\): RuntimeError"):
        convert(seeded(Branches), "progressive", example_input=torch.zeros(2, 5, 8, 8))


def test_a_tensor_with_a_gradient_graph_is_copied_without_it() -> None:
    model: Any = seeded(Branches)
    model.cache = model.stem.weight * 2
    with pytest.warns(HarmconvertWarning, match=r"refuses cache \(it has a gradient history\)"):
        converted: Any = convert(model).model
    assert torch.equal(converted.cache, model.cache)
    assert converted.cache.is_leaf
    assert not model.cache.is_leaf


def _old_weight_norm(conv: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this class is deprecated
        return nn.utils.weight_norm(conv)  # type: ignore[no-any-return]


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm of the old kind": _old_weight_norm,
    "spectral norm of the old kind": nn.utils.spectral_norm,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
}


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a run with gradients"])
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_a_layer_whose_weight_is_computed_is_skipped_and_the_rest_is_converted(make: Any, ran: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), make(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    if ran:
        model(torch.randn(2, 3, 12, 12))
    conversion = convert(model, 2)
    assert [(layer.name, layer.kept) for layer in conversion.layers] == [("0", 9), ("2", 0), ("4", 3)]
    assert verify(model, conversion.model, torch.randn(2, 3, 12, 12)).as_planned


class Delegating:
    """A class whose ``__getattr__`` recurses forever on an instance without attributes, as copying creates one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, key: str) -> Any:
        return getattr(self.inner, key)


class Refusing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.error


UNCOPYABLE: dict[str, Callable[[], Any]] = {
    "a lock": threading.Lock,
    "an open file": lambda: sys.__stderr__,
    "a generator": lambda: (i for i in range(3)),
    "a delegating object": lambda: Delegating([]),
    "what raises PicklingError": lambda: Refusing(pickle.PicklingError("no")),
    "what raises AssertionError": lambda: Refusing(AssertionError("no")),
    "a dict that holds a lock": lambda: {"deep": [threading.Lock()]},
}


@pytest.mark.parametrize("make", UNCOPYABLE.values(), ids=UNCOPYABLE)
def test_a_layer_with_an_attribute_that_cannot_be_copied_is_skipped_and_named(make: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].handle = make()
    conversion = convert(model, 2)
    assert [layer.kept for layer in conversion.layers] == [9, 0, 3]
    assert "its member 'handle' cannot be copied" in (conversion.layers[1].why or "")
    assert verify(model, conversion.model, torch.randn(2, 3, 12, 12)).as_planned


def test_an_attribute_of_the_network_that_cannot_be_copied_is_shared_and_named() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    model.lock = threading.Lock()
    with pytest.warns(HarmconvertWarning, match=r"refuses lock \(TypeError: cannot pickle"):
        converted: Any = convert(model, 2).model
    assert converted.lock is model.lock


def test_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(UsageError, match="this network is TorchScript"):
        convert(script)


def test_a_weight_that_another_module_uses_is_not_converted() -> None:
    model: Any = seeded(Branches)
    model.reader = nn.ParameterList([model.shared.weight])
    conversion = convert(model, 2)
    assert {s.name: s.why for s in conversion.plan.skipped} == {"shared": "its weight is also used by reader.0"}


def test_a_network_on_the_meta_device_is_converted_without_values() -> None:
    with torch.device("meta"):
        conversion = convert(Branches(), 2)
    assert conversion.layers[1].kept == 3
    assert conversion.layers[1].energy is None


def test_harmonic_networks_are_not_converted_twice() -> None:
    with pytest.raises(InputError, match="is harmonic already"):
        convert(nn.Sequential(to_harmonic(nn.Conv2d(3, 3, 3))))


def test_training_a_converted_network_lowers_its_loss() -> None:
    model = convert(seeded(Branches), 2, example_input=X).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    target = torch.tensor([0, 3])
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(X), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_whole_network_copies_are_independent() -> None:
    model = convert(seeded(Branches), 2, example_input=X).model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.shared.coefficients.zero_()
    assert model.shared.coefficients.abs().sum() > 0
    assert twin.alias is twin.shared


@pytest.mark.parametrize(
    ("value", "dtype", "normalization", "remedy"),
    [
        (40000.0, torch.float16, "ortho", r"float16's range: convert a float32 copy \(model\.float\(\)\)"),
        (9000.0, torch.float16, "l1", "float16's range"),
        (3e38, torch.bfloat16, "ortho", r"bfloat16's range: convert a float64 copy \(model\.double\(\)\)"),
        (3e38, torch.float32, "ortho", r"float32's range: convert a float64 copy \(model\.double\(\)\)"),
        (1e308, torch.float64, "ortho", "float64's range: scale its weights down"),
    ],
)
def test_coefficients_out_of_range_are_refused(value: float, dtype: Any, normalization: str, remedy: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(dtype)
    nn.init.constant_(model[1].weight, value)
    with pytest.raises(InputError, match=f"layer 1: its coefficients are out of {remedy}"):
        convert(model, normalization=normalization)


def test_a_projection_beyond_the_range_of_the_dtype_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3).half())
    kept = ((0, 1), (1, 0), (1, 1))
    coefficients = torch.tensor([[[-50000.0, 50500.0, 50500.0, 50500.0]]])
    kernel = reconstruct(coefficients, dct_basis((3, 3), ((0, 0), *kept)), (3, 3))
    with torch.no_grad():
        model[0].weight.copy_(kernel)
    assert fuse(convert(model).model)[0].weight.isfinite().all()
    with pytest.raises(InputError, match="layer 0: its merged kernels are out of float16's range"):
        convert(model, Plan((cut_layer("0", (3, 3), kept),)))


def test_converting_in_training_mode_does_not_change_spectral_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))).train()
    before = fingerprint(model)
    conversion = convert(model, 2)
    assert unchanged(before, model)
    assert [skip.name for skip in conversion.plan.skipped] == ["1"]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(4, 3, 5, 5), r"its weight has shape (4, 3, 5, 5), which is not that of its kernel_size (3, 3)"),
        (torch.ones(0, 3, 3, 3), r"its weight is empty: it has shape (0, 3, 3, 3)"),
        (torch.ones(4, 3, 3, 3, dtype=torch.complex64), "its weight is complex64: only real kernels are converted"),
    ],
)
def test_weights_without_a_kernel_are_skipped_with_the_reason(weight: torch.Tensor, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    model[1].weight = nn.Parameter(weight)
    assert {skip.name: skip.why for skip in convert(model).plan.skipped} == {"1": reason}


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 12, 12)], ids=["no input", "an example input"])
def test_lazy_layers_are_skipped_and_stay_lazy(example: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    conversion = convert(model, example_input=example)
    assert [layer.kept for layer in conversion.layers] == [9, 0]
    assert "not initialised yet: run the network once" in (conversion.layers[1].why or "")
    assert isinstance(model[1], nn.LazyConv2d)
    assert isinstance(conversion.model[1], nn.LazyConv2d)
    assert verify(model, conversion.model, torch.randn(2, 3, 12, 12)).ok


@pytest.mark.parametrize(("depth", "message"), [(300, "too deeply to be copied"), (3000, "too deeply to be visited")])
def test_a_network_too_deep_for_the_stack_is_reported(depth: int, message: str) -> None:
    model: nn.Module = nn.Conv2d(3, 3, 3)
    for _ in range(depth):
        model = nn.Sequential(model)
    with pytest.raises(InputError, match=f"the modules of this Sequential are nested {message}"):
        convert(model)
