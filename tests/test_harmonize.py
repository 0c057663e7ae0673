"""Harm1-X and Harm-X of any network: blocks replace layers, are stored in checkpoints, and fold into convolutions."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import harmconvert as hc
import harmconvert.models
from harmconvert.errors import InputError, UsageError
from harmconvert.layers import HarmonicBlock2d, HarmonicMixin, fold_block, to_block
from harmconvert.storage import BlockRecord, Source, read_header
from harmconvert.training import harmonize

from .networks import random_input, seeded

WRN = Source("timm", "wrn22_1", {"in_chans": 1, "img_size": 28})


def wrn() -> nn.Module:
    return seeded(lambda: timm.create_model("wrn22_1", in_chans=1, img_size=28))


def with_statistics(block: HarmonicBlock2d) -> HarmonicBlock2d:
    """Give a block's batch norm some statistics."""
    if isinstance(block.norm, nn.BatchNorm2d):
        generator = torch.Generator().manual_seed(3)
        block.norm.running_mean.copy_(torch.randn(block.norm.num_features, generator=generator))
        block.norm.running_var.copy_(torch.rand(block.norm.num_features, generator=generator) + 0.1)
    return block.eval()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(3, 8, 7, stride=(2, 1), padding=(3, 2), bias=False),
        nn.Conv2d(6, 4, (3, 5), dilation=(1, 2), groups=2),
    ],
    ids=["plain", "strided", "grouped"],
)
def test_a_block_folds_exactly_into_one_convolution(conv: nn.Conv2d, normalize: bool) -> None:
    block = with_statistics(to_block(conv, normalize).double())
    folded = fold_block(block)
    assert type(folded) is nn.Conv2d
    x = random_input((2, conv.in_channels, 13, 12), torch.float64)
    assert torch.allclose(folded(x), block(x), rtol=1e-12, atol=1e-12)


def test_without_normalisation_a_block_is_the_convolution_that_it_replaced() -> None:
    conv = seeded(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.float64)
    x = random_input((2, 4, 9, 9), torch.float64)
    assert torch.allclose(to_block(conv, normalize=False)(x), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1), nn.Conv2d(3, 4, 3, padding="same")],
)
def test_convolutions_that_no_block_can_replace_are_refused(conv: nn.Module) -> None:
    with pytest.raises(UsageError, match="a block can only replace a plain Conv2d that is padded with zeros"):
        to_block(conv)


def test_the_first_layer_normalises_and_the_others_are_merged() -> None:
    network = harmonize(wrn(), "all", "progressive")
    kinds = {
        name: type(m).__name__ for name, m in network.named_modules() if isinstance(m, HarmonicBlock2d | HarmonicMixin)
    }
    assert kinds.pop("stem") == "HarmonicBlock2d"
    assert set(kinds.values()) == {"HarmonicConv2d"}
    assert len(kinds) == 18
    assert network.stem.norm.num_features == 9
    assert len(network.stage3[0].conv1.frequencies) == 3
    # The number of parameters equals that of the truncated plain network, because the block's norm has none.
    count = sum(p.numel() for p in network.parameters())
    assert count == sum(p.numel() for p in hc.convert(wrn(), "progressive").model.parameters())


def test_harm1_changes_only_the_first_layer_and_not_its_argument() -> None:
    plain = wrn()
    network = harmonize(plain, "first")
    assert isinstance(network.stem, HarmonicBlock2d)
    assert type(plain.stem) is nn.Conv2d
    assert not any(isinstance(m, HarmonicMixin) for m in network.modules())
    assert torch.equal(network.stage1[0].conv1.weight, plain.stage1[0].conv1.weight)


def test_without_normalisation_the_first_layer_is_a_merged_layer() -> None:
    network = harmonize(wrn(), "all", normalize_first=False)
    assert isinstance(network.stem, HarmonicMixin)
    assert isinstance(harmonize(wrn(), "first", normalize_first=False).stem, HarmonicMixin)


@pytest.mark.parametrize("which", ["first", "all"])
def test_checkpoints_store_blocks(tmp_path: Path, which: str) -> None:
    network = harmonize(wrn(), which, 3 if which == "all" else "full")
    with_statistics(network.stem)
    hc.save(network, tmp_path / "net.safetensors", source=WRN)
    assert read_header(tmp_path / "net.safetensors").blocks == {"stem": BlockRecord(normalize=True, kernel_size=(3, 3))}
    x = random_input((2, 1, 28, 28))
    loaded = hc.load(tmp_path / "net.safetensors").eval()
    dense = hc.load(tmp_path / "net.safetensors", form="dense").eval()
    assert torch.equal(loaded(x), network(x))
    assert torch.allclose(dense(x), network(x), rtol=1e-4, atol=1e-5)
    assert type(dense.stem) is nn.Conv2d


def test_a_checkpoint_with_a_block_that_the_network_lacks_is_refused(tmp_path: Path) -> None:
    network = harmonize(wrn(), "first")
    hc.save(network, tmp_path / "net.safetensors", source=WRN)
    with pytest.raises(InputError, match="it has no such convolution: stem"):
        hc.load(tmp_path / "net.safetensors", model=nn.Sequential(nn.Conv2d(1, 16, 3)))


def test_the_root_may_be_the_first_layer() -> None:
    assert isinstance(harmonize(nn.Conv2d(1, 2, 3), "first"), HarmonicBlock2d)
    assert type(hc.fuse(harmonize(nn.Conv2d(1, 2, 3), "first"))) is nn.Conv2d


def test_a_block_can_be_trained() -> None:
    network = harmonize(wrn(), "first").train()
    before: Tensor = network.stem.norm.running_var.clone()
    network(random_input((4, 1, 28, 28))).sum().backward()
    assert network.stem.mix.weight.grad.abs().sum() > 0
    assert not torch.equal(network.stem.norm.running_var, before)


def test_networks_that_cannot_be_harmonized_are_refused() -> None:
    with pytest.raises(UsageError, match=r"which \(='last'\) must be one of first, all"):
        harmonize(wrn(), "last")
    with pytest.raises(InputError, match="no convolution with a kernel larger than 1x1 reads the input"):
        harmonize(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_the_models_of_the_paper_are_registered_with_timm() -> None:
    assert harmconvert.models
    assert timm.is_model("wrn28_10")


# --- how the weights start ---


def drawn(**more: object) -> nn.Module:
    plain = nn.Sequential(nn.Conv2d(3, 256, 7, bias=True), nn.Conv2d(256, 128, 3), nn.Linear(4, 4))
    torch.manual_seed(5)
    return harmonize(plain, "all", 2, **more)


def test_weights_are_initialised_as_in_the_code_of_the_paper() -> None:
    """The distribution is N(0, 2 / fan-out). The fan-out is O for a 1x1 convolution, and O x F for coefficients."""
    network = drawn()
    block, merged = network[0], network[1]
    assert block.mix.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert merged.coefficients.std().item() == pytest.approx((2 / (128 * 3)) ** 0.5, rel=0.02)
    assert block.mix.weight.mean().abs() < 1e-3
    assert block.mix.bias.abs().max() == merged.bias.abs().max() == 0
    again = drawn()
    assert torch.equal(again[0].mix.weight, block.mix.weight), "the same from the same seed"


def test_the_whole_basis_is_initialised_as_by_kaiming_normal() -> None:
    torch.manual_seed(0)
    (merged,) = harmonize(nn.Sequential(nn.Conv2d(64, 64, 3)), "all", normalize_first=False)
    kernel = torch.empty(64, 64, 3, 3)
    nn.init.kaiming_normal_(kernel, mode="fan_out")
    assert merged.weight.std().item() == pytest.approx(kernel.std().item(), rel=0.02)


def test_a_pretrained_network_keeps_its_kernels_and_is_not_normalised() -> None:
    plain = wrn().double()
    x = random_input((2, 1, 28, 28), torch.float64)
    network = harmonize(plain, "all", pretrained=True)
    assert not any(isinstance(module, HarmonicBlock2d) for module in network.modules())
    assert torch.allclose(network.eval()(x), plain.eval()(x), rtol=1e-11, atol=1e-11)
    first = harmonize(plain, "first", pretrained=True)
    assert [name for name, m in first.named_modules() if isinstance(m, HarmonicMixin)] == ["stem"]
    klt = harmonize(plain, "all", 2, pretrained=True, basis="klt")
    assert klt.stage3[0].conv1.fitted_basis is not None


def test_harmonize_does_not_change_other_layers() -> None:
    plain = wrn()
    network = harmonize(plain, "all")
    kept = {key: tensor for key, tensor in network.state_dict().items() if key in plain.state_dict()}
    assert any("norm" in key or "bn" in key for key in kept)
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in kept.items())
