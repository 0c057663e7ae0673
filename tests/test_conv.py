from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrizations, prune

from harmconvert.errors import UsageError
from harmconvert.kernels import Basis, all_frequencies, dct_basis, frequencies_below, merge, project, reconstruct
from harmconvert.layers import HarmonicMixin, coefficients_to_channels_last, harmonic_class, to_dense, to_harmonic

from . import oracle
from .networks import CONVOLUTIONS, random_input, seeded
from .seams import replace_everywhere

every_convolution = pytest.mark.parametrize("kind", CONVOLUTIONS)


def case(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    make, shape = CONVOLUTIONS[kind]
    return seeded(make, dtype), random_input(shape, dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@every_convolution
def test_a_whole_basis_computes_the_same_output(kind: str) -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        conv, x = case(kind, dtype)
        assert relative(to_harmonic(conv)(x), conv(x)) < bound


@every_convolution
def test_a_truncated_convolution_equals_the_projected_kernel(kind: str) -> None:
    conv, x = case(kind, torch.float64)
    size = tuple(conv.weight.shape[2:])
    kept = all_frequencies(size)[: max(1, len(all_frequencies(size)) // 2)]
    harmonic = to_harmonic(conv, kept)
    expected = copy.deepcopy(conv)
    with torch.no_grad():
        expected.weight.copy_(reconstruct(project(conv.weight, dct_basis(size, kept)), dct_basis(size, kept), size))
    assert harmonic.coefficients.shape == (*conv.weight.shape[:2], len(kept))
    assert relative(harmonic(x), expected(x)) < 1e-13
    assert relative(harmonic(x), conv(x)) > 1e-3, "the cut should show"


@every_convolution
def test_converting_back_to_dense_restores_the_original(kind: str) -> None:
    conv, _ = case(kind)
    again = to_dense(to_harmonic(conv))
    assert type(again) is type(conv)
    assert list(again.state_dict()) == list(conv.state_dict())
    ulp = torch.finfo(torch.float32).eps * conv.weight.abs().flatten(1).amax(1)
    assert ((again.weight - conv.weight).abs().flatten(1).amax(1) <= 2 * ulp).all()
    assert set(again.__dict__) == set(conv.__dict__)
    assert repr(again) == repr(conv)


@every_convolution
def test_every_attribute_is_copied(kind: str) -> None:
    conv, _ = case(kind)
    conv.train()
    conv.weight.requires_grad_(False)
    harmonic = to_harmonic(conv)
    assert isinstance(harmonic, type(conv))
    assert harmonic.training
    assert not harmonic.coefficients.requires_grad
    for name in ("stride", "padding", "padding_mode", "dilation", "groups", "kernel_size", "output_padding"):
        assert getattr(harmonic, name) == getattr(conv, name)
    assert (harmonic.bias is None) == (conv.bias is None)
    if conv.bias is not None:
        assert torch.equal(harmonic.bias, conv.bias)
        assert harmonic.bias is not conv.bias
    keys = [key.replace("weight", "coefficients") for key in conv.state_dict()]
    assert list(harmonic.state_dict()) == keys


@every_convolution
def test_harmonic_convolutions_can_be_copied_and_pickled(kind: str) -> None:
    conv, x = case(kind)
    harmonic = to_harmonic(conv)
    saved = io.BytesIO()
    torch.save(harmonic, saved)
    saved.seek(0)
    twins = [copy.deepcopy(harmonic), pickle.loads(pickle.dumps(harmonic)), torch.load(saved, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(harmonic)
        assert torch.equal(twin(x), harmonic(x))
        with torch.no_grad():
            twin.coefficients.zero_()
    assert harmonic(x).abs().sum() > 0, "copies must not share parameters"


@every_convolution
def test_gradients_reach_the_coefficients(kind: str) -> None:
    conv, x = case(kind, torch.float64)
    harmonic = to_harmonic(conv)
    (harmonic(x) ** 2).sum().backward()
    (conv(x) ** 2).sum().backward()
    # The basis is orthonormal, so the coefficients' gradient is the projection of the kernel's gradient.
    torch.testing.assert_close(
        harmonic.coefficients.grad, project(conv.weight.grad, dct_basis(conv.weight.shape[2:])), rtol=1e-9, atol=1e-9
    )


@every_convolution
def test_torch_compile_and_export_need_no_graph_break(kind: str) -> None:
    conv, x = case(kind)
    harmonic = to_harmonic(conv)
    expected = harmonic(x)
    torch._dynamo.reset()
    compiled = torch.compile(harmonic, fullgraph=True, backend="eager")
    assert relative(compiled(x), expected) < 1e-6
    if "Same" not in kind:  # torch cannot export the plain layers with same padding either
        assert relative(torch.export.export(harmonic, (x,)).module()(x), expected) < 1e-6


def test_the_harmonic_convolution_equals_eq_2_in_loops() -> None:
    conv, x = seeded(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2, bias=False), torch.float64), None
    x = random_input((2, 2, 7, 7), torch.float64)
    kept = frequencies_below((3, 3), 3)
    harmonic: Any = to_harmonic(conv, kept)
    expected = oracle.harmonic_layer(x.numpy(), harmonic.coefficients.detach().numpy(), (3, 3), kept, 2, 1, 2)
    np.testing.assert_allclose(harmonic(x).detach().numpy(), expected, atol=1e-12)


def test_the_kernel_is_merged_once_in_each_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    merges = []
    replace_everywhere(monkeypatch, merge, lambda *tensors: merges.append(1) or merge(*tensors))
    conv, x = case("ScaledStdConv2dSame")  # reads its weight more than once
    harmonic = to_harmonic(conv)
    harmonic(x)
    assert len(merges) == 1
    assert harmonic._merged is None, "nothing outlives the forward"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_merge_stays_in_float32(dtype: torch.dtype) -> None:
    conv, x = case("plain")
    harmonic = to_harmonic(conv)
    with torch.autocast("cpu", dtype=dtype):
        assert harmonic(x).dtype == dtype
        assert harmonic.weight.dtype == torch.float32
        # Before autocast rounds it, the kernel equals the original's within rounding, so the outputs nearly agree.
        assert relative(harmonic(x).float(), conv(x).float()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_of_half_precision_are_merged_in_float32(dtype: torch.dtype) -> None:
    harmonic = to_harmonic(case("16x16 patches", dtype)[0])
    exact = reconstruct(harmonic.coefficients.detach().double(), harmonic.kernels, (16, 16))
    # A merge in half precision would sum 256 rounded terms, with errors of many units in the last place.
    wrong = (harmonic.weight.detach() != exact.to(dtype)).double().mean()
    assert wrong < 0.01


def test_the_kernel_follows_the_inputs_memory_format() -> None:
    conv, x = case("grouped")
    harmonic = to_harmonic(conv)
    formats = []
    real = nn.functional.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "conv2d", lambda x, w, *a: formats.append(w.stride()) or real(x, w, *a))
        harmonic(x.to(memory_format=torch.channels_last))
        harmonic(x)
    assert formats == [(18, 1, 6, 2), (18, 9, 3, 1)]


def test_the_basis_survives_casting_and_moving() -> None:
    conv, _ = case("plain")
    harmonic: Any = to_harmonic(conv)
    basis = harmonic.basis.clone()
    assert "basis" not in harmonic.state_dict()
    half = copy.deepcopy(harmonic).half()
    assert (half.coefficients.dtype, half.basis.dtype) == (torch.float16, torch.float32)
    assert torch.equal(half.float().basis, basis)
    assert copy.deepcopy(harmonic).double().basis.dtype == torch.float64
    emptied = copy.deepcopy(harmonic).to("meta").to_empty(device="cpu")
    assert torch.equal(emptied.basis, basis)


def test_a_network_cast_to_float64_keeps_float64_accuracy() -> None:
    conv, _ = case("plain")
    harmonic = to_harmonic(conv).double()
    kernel = reconstruct(harmonic.coefficients.detach(), dct_basis((3, 3)), (3, 3))
    torch.testing.assert_close(harmonic.weight.detach(), kernel, rtol=0, atol=1e-15)


def test_symbolic_tracing_sees_one_call_for_the_merge() -> None:
    conv, x = case("plain")
    harmonic = nn.Sequential(to_harmonic(conv))
    traced = torch.fx.symbolic_trace(harmonic)
    assert torch.equal(traced(x), harmonic(x))


def test_hooks_and_attributes_of_parameters_are_copied() -> None:
    conv, x = case("plain")
    calls: list[int] = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    conv.weight.decay = False
    harmonic: Any = to_harmonic(conv)
    harmonic(x)
    assert calls == [1]
    assert harmonic.coefficients.decay is False


def test_distributed_data_parallel_sees_the_coefficients(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        conv, x = case("plain")
        harmonic: Any = to_harmonic(conv)
        wrapped = nn.parallel.DistributedDataParallel(harmonic)
        wrapped(x).sum().backward()
        assert harmonic.coefficients.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_reset_parameters_initialises_new_coefficients() -> None:
    conv, _ = case("grouped")
    harmonic: Any = to_harmonic(conv, [(0, 0)])
    before = harmonic.coefficients.detach().clone()
    torch.manual_seed(1)
    harmonic.reset_parameters()
    assert not torch.equal(harmonic.coefficients, before)
    assert harmonic.weight.abs().max() <= 3 / (18**0.5), "the scale of torch's own draw"


def test_the_harmonic_class_is_created_once_and_printed() -> None:
    assert harmonic_class(nn.Conv2d) is harmonic_class(nn.Conv2d)
    text = repr(to_harmonic(nn.Conv2d(3, 8, 3, stride=2), frequencies_below((3, 3), 2)))
    assert text == "HarmonicConv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), frequencies=3/9)"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda c: parametrizations.weight_norm(c), "its weight is parametrized"),
        (lambda c: prune.l1_unstructured(c, "weight", 0.5), "computed from other tensors"),
        (lambda c: c.to(torch.float8_e4m3fn), "its weight is float8_e4m3fn"),
        (lambda c: to_harmonic(c), "is harmonic already"),
    ],
)
def test_the_message_for_an_unsupported_convolution_says_why(prepare: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        to_harmonic(prepare(nn.Conv2d(3, 4, 3)))


def test_a_lazy_convolution_must_run_before_it_is_converted() -> None:
    with pytest.raises(UsageError, match="not initialised yet: run the network once"):
        to_harmonic(nn.LazyConv2d(4, 3))


def test_only_convolutions_are_converted() -> None:
    with pytest.raises(UsageError, match="Linear is not a convolution"):
        to_harmonic(nn.Linear(3, 3))
    with pytest.raises(UsageError, match="Conv2d is not a harmonic convolution"):
        to_dense(nn.Conv2d(3, 3, 3))


def test_a_harmonic_convolution_is_an_instance_of_its_original_class() -> None:
    harmonic = to_harmonic(nn.Conv2d(3, 4, 3))
    assert isinstance(harmonic, nn.Conv2d)
    assert isinstance(harmonic, HarmonicMixin)


def test_assigned_coefficients_use_a_basis_on_their_device_and_in_their_dtype() -> None:
    """A basis on another device or in another precision would silently give a wrong kernel."""
    conv, x = case("plain", torch.float64)
    state = to_harmonic(conv).state_dict()
    with torch.device("meta"):
        harmonic = to_harmonic(nn.Conv2d(3, 8, 3))
    harmonic.load_state_dict(state, assign=True)
    assert relative(harmonic(x), conv(x)) < 1e-13
    single: Any = to_harmonic(nn.Conv2d(3, 8, 3).double().float())
    single.coefficients = nn.Parameter(state["coefficients"])
    single.bias = nn.Parameter(state["bias"])
    assert relative(single(x), conv(x)) < 1e-13


def test_a_module_compiled_in_place_is_converted_without_its_compiled_code() -> None:
    conv, x = case("plain")
    conv.compile(backend="eager")
    conv(x)
    harmonic: Any = to_harmonic(conv, [(0, 0)])
    assert relative(harmonic(x), conv(x)) > 1e-3
    harmonic.compile(backend="eager")
    harmonic(x)
    twin = copy.deepcopy(harmonic)
    with torch.no_grad():
        twin.coefficients.zero_()
        twin.bias.zero_()
    assert twin(x).abs().max() == 0


def test_a_convolution_with_an_attribute_that_the_harmonic_form_needs_is_refused() -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.register_buffer("basis", torch.zeros(1))
    with pytest.raises(UsageError, match="it has an attribute 'basis' of its own"):
        to_harmonic(conv)


def test_the_input_argument_may_have_another_name() -> None:
    conv, x = case("Conv2dSame")
    assert relative(to_harmonic(conv)(x=x), conv(x=x)) < 2e-6


@pytest.mark.parametrize(("kept", "size"), [(1, (3, 3)), (3, (3, 3)), (9, (3, 3)), (15, (3, 5)), (4, (2, 7))])
def test_coefficients_for_channels_last_make_the_same_kernel_in_that_memory_format(
    kept: int, size: tuple[int, int]
) -> None:
    conv = seeded(lambda: nn.Conv2d(6, 5, size, padding=1), torch.float64)
    plain = to_harmonic(conv, all_frequencies(size)[:kept])
    laid_out = copy.deepcopy(plain)
    coefficients_to_channels_last(laid_out)
    assert torch.equal(laid_out.coefficients, plain.coefficients)
    assert laid_out.coefficients.shape == (5, 6, kept)
    x = random_input((2, 6, 7, 7), torch.float64).to(memory_format=torch.channels_last)
    kernels = []
    for network in (plain, laid_out):
        network.register_forward_hook(lambda m, args, out: kernels.append(m._merge(args[0])))
        network(x).square().sum().backward()
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert torch.allclose(kernels[0], kernels[1], rtol=1e-12, atol=1e-14)
    assert torch.allclose(plain.coefficients.grad, laid_out.coefficients.grad, rtol=1e-12)
    assert torch.allclose(laid_out(x), laid_out(x.contiguous()), rtol=1e-12)


# --- bases that are fitted to the layer ---


def fitted(dtype: torch.dtype = torch.float32, kept: int = 4) -> Any:
    conv = seeded(lambda: nn.Conv2d(6, 5, 3, padding=1), dtype)
    return to_harmonic(conv, all_frequencies((3, 3))[:kept], Basis("klt"))


def test_only_a_fitted_basis_is_part_of_the_state_dict() -> None:
    assert fitted().state_dict()["fitted_basis"].shape == (4, 9)
    assert "fitted_basis" not in to_harmonic(nn.Conv2d(6, 5, 3), None, Basis("haar")).state_dict()
    assert "fitted_basis" not in to_dense(fitted()).__dict__["_buffers"]


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, copy.deepcopy])
def test_a_fitted_basis_keeps_its_precision_after_casting(move: Any) -> None:
    harmonic = fitted()
    before = harmonic.fitted_basis.clone()
    moved = move(harmonic)
    assert moved.fitted_basis.dtype == torch.float64
    assert torch.equal(moved.fitted_basis, before)
    assert moved.basis.dtype == torch.promote_types(moved.coefficients.dtype, torch.float32)


def test_a_fitted_basis_is_loaded_with_the_coefficients() -> None:
    harmonic, other = fitted(), fitted(kept=4)
    with torch.no_grad():
        other.fitted_basis.zero_()
        other._set_basis()
    other.load_state_dict(harmonic.state_dict())
    x = random_input((1, 6, 7, 7))
    assert torch.equal(other(x), harmonic(x))
    with torch.device("meta"):
        empty = fitted()
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(harmonic.state_dict())
    assert torch.equal(empty(x), harmonic(x))


def test_a_base_class_with_an_attribute_that_the_harmonic_form_needs_is_refused() -> None:
    class Base(nn.Conv2d):
        @property
        def kernels(self) -> int:
            return 2

    class Other(nn.Conv2d):
        def _merge(self, input: torch.Tensor) -> torch.Tensor:
            return input

    for base, name in ((Base, "kernels"), (Other, "_merge")):
        heir = type("Heir", (base,), {})
        with pytest.raises(UsageError, match=f"has an attribute '{name}' of its own"):
            to_harmonic(heir(3, 4, 3))
