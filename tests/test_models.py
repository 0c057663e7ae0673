"""The paper's networks: their sizes are those of the paper, timm can build them, wrong arguments are refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn

import harmconvert as hc
import harmconvert.models
from harmconvert.layers import fold_block, to_block
from harmconvert.training import harmonize

from .networks import random_input, seeded


def made(name: str, **arguments: Any) -> nn.Module:
    """Return a network on the meta device, to count its parameters."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def millions(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M"


# Gabor CNN 3-28 is left out: it is not a network of this paper.
TABLE_1 = {
    "WRN-28-10": (lambda net: net, "wrn28_10", "36.5M"),
    "Harm1-WRN-28-10, no BN": (lambda net: harmonize(net, "first", normalize_first=False), "wrn28_10", "36.5M"),
    "Harm1-WRN-28-10": (lambda net: harmonize(net, "first"), "wrn28_10", "36.5M"),
    "Harm-WRN-28-10": (lambda net: harmonize(net, "all"), "wrn28_10", "36.5M"),
    "Harm-WRN-28-10, lambda 3": (lambda net: harmonize(net, "all", lam=3), "wrn28_10", "24.4M"),
    "Harm-WRN-28-10, lambda 2": (lambda net: harmonize(net, "all", lam=2), "wrn28_10", "12.3M"),
    "Harm-WRN-28-10, progressive": (lambda net: harmonize(net, "all", lam="progressive"), "wrn28_10", "15.7M"),
    "WRN-28-8": (lambda net: net, "wrn28_8", "23.4M"),
    "WRN-28-6": (lambda net: net, "wrn28_6", "13.1M"),
}
# ScatResNet-50 and JPEG-ResNet-50 are left out: they are not networks of this paper.
TABLE_2 = {
    "ResNet-50 (no maxpool)": (lambda net: net, "resnet50_nomaxpool", "25.6M"),
    "Harm1-ResNet-50": (lambda net: harmonize(net, "first"), "resnet50_nomaxpool", "25.6M"),
    "Harm-ResNet-50": (lambda net: harmonize(net, "all"), "resnet50_nomaxpool", "25.6M"),
    "Harm-ResNet-50, progressive": (lambda net: harmonize(net, "all", "progressive"), "resnet50_nomaxpool", "19.7M"),
    "ResNet-50 => Harm-ResNet-50": (lambda net: hc.convert(net).model, "resnet50", "25.6M"),
    "ResNet-50 => progressive": (lambda net: hc.convert(net, "progressive").model, "resnet50", "19.7M"),
    "ResNet-50 (maxpool)": (lambda net: net, "resnet50", "25.6M"),
}


@pytest.mark.parametrize(("make", "name", "printed"), TABLE_1.values(), ids=TABLE_1)
def test_parameters_equal_table_1(make: Any, name: str, printed: str) -> None:
    # The table has the sizes for CIFAR-10; 100 classes add 0.06M parameters, which would change some last digits.
    assert millions(make(made(name, num_classes=10, drop_rate=0.3))) == printed


@pytest.mark.parametrize(("make", "name", "printed"), TABLE_2.values(), ids=TABLE_2)
def test_parameters_equal_table_2(make: Any, name: str, printed: str) -> None:
    assert millions(make(made(name))) == printed


@pytest.mark.parametrize(
    ("name", "printed"),
    [("wrn16_8", "11.0M"), ("wrn16_4", "2.7M"), ("wrn22_1", "0.3M"), ("wrn", "36.5M"), ("resnet101_nomaxpool", "44.5M"),
     ("resnet152_nomaxpool", "60.2M")],
)  # fmt: skip
def test_the_other_models_have_the_documented_sizes(name: str, printed: str) -> None:
    network = made(name)
    assert millions(network) == printed
    cfg = network.pretrained_cfg
    assert (cfg["architecture"] if isinstance(cfg, dict) else cfg.architecture) == name


def test_dropout_is_between_the_convolutions() -> None:
    assert {m.p for m in made("wrn16_4", drop_rate=0.3).modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_wide_resnets_of_any_size_are_built() -> None:
    assert len(made("wrn", depth=40, width=2).stage1) == 6
    with pytest.raises(ValueError, match=r"depth \(=20\) must be 6 n \+ 4"):
        made("wrn", depth=20)


def test_without_max_pooling_the_stem_has_a_stride_of_4() -> None:
    plain, network = timm.create_model("resnet50"), timm.create_model("resnet50_nomaxpool")
    assert (network.conv1.stride, type(network.maxpool)) == ((4, 4), nn.Identity)
    assert network.layer2[0].conv2.stride == (2, 2), "the stride is on the 3x3"
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [type(m).__name__ for m in (made("resnet50_nomaxpool", pool="avg").maxpool,)] == ["AvgPool2d"]
    with torch.no_grad():
        maps = timm.create_model("resnet50_nomaxpool", features_only=True).eval()(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [16, 16, 8, 4, 2]
    assert timm.create_model("resnet50_nomaxpool", features_only=True).feature_info.reduction() == [4, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"pool": "max"}, r"pool \(='max'\) must be None or 'avg'"), ({"stem_type": "deep"}, "leave stem_type out")],
)
def test_invalid_arguments_of_a_resnet_without_max_pooling_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("resnet50_nomaxpool", **arguments)


@pytest.mark.parametrize("name", ["resnet50_nomaxpool", "wrn16_4"])
def test_pretrained_weights_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="no pretrained weights are published"):
        timm.create_model(name, pretrained=True)


def test_progressive_follows_the_maps_of_a_stem_of_stride_4() -> None:
    kept = {p.name: len(p.frequencies) for p in hc.convert(made("resnet50_nomaxpool"), "progressive").plan.layers}
    assert [kept[f"layer{stage}.1.conv2"] for stage in (1, 2, 3, 4)] == [9, 9, 6, 3]
    assert kept["conv1"] == 49


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("wrn", depth=10, width=1),
        lambda: timm.create_model("wrn", depth=16, width=2),
        lambda: timm.create_model("resnet10t", stem_type=""),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten()),
    ],
    ids=["width 1", "width 2", "ResNet", "Sequential"],
)
def test_the_dense_form_of_a_normalising_first_layer_has_the_keys_of_the_plain_network(make: Any) -> None:
    plain = seeded(make)
    network = harmonize(plain, "first")
    block = next(m for m in network.modules() if type(m).__name__ == "HarmonicBlock2d")
    block.norm.running_mean.copy_(torch.randn(block.norm.num_features, generator=torch.Generator().manual_seed(1)))
    assert fold_block(block).bias is not None
    dense = hc.fuse(network)
    assert list(dense.state_dict()) == list(plain.state_dict())
    x = random_input((2, 3, 32, 32))
    torch.testing.assert_close(dense(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_bias_that_no_batch_norm_can_absorb_stays() -> None:
    network = nn.Sequential(to_block(nn.Conv2d(3, 4, 3, bias=False)), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    assert hc.fuse(network)[0].bias is not None


IMPORTS = {
    "timm after": "import harmconvert, timm",
    "timm before": "import timm, harmconvert",
    "models first": "import harmconvert.models, timm",
    "timm from the inside": "import harmconvert; harmconvert.convert; import timm",
    "a part of timm": "import harmconvert; from timm.models import create_model; import timm",
}


EVERY_DAY = ("a part of timm",)  # each case starts a process that imports torch; the others are marked slow


@pytest.mark.parametrize(
    "imports",
    [pytest.param(IMPORTS[name], id=name, marks=[] if name in EVERY_DAY else [pytest.mark.slow]) for name in IMPORTS],
)
def test_a_bare_import_registers_the_networks(imports: str) -> None:
    code = f"{imports}; assert timm.create_model('wrn16_4', num_classes=5).head.out_features == 5"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_importing_the_package_imports_neither_torch_nor_timm() -> None:
    code = "import sys, harmconvert; assert not {'torch', 'timm', 'torchvision', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; from harmconvert.cli import main; main(['--help'], standalone_mode=False)"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.slow
def test_timm_keeps_its_own_loader_and_models_are_registered_once() -> None:
    code = (
        "import sys, harmconvert, timm, importlib.resources as r;"
        "assert 'registration' not in type(timm.__loader__).__module__;"
        "assert timm.__spec__.loader is timm.__loader__; assert (r.files('timm') / '__init__.py').is_file();"
        "assert not any('TimmFinder' in type(f).__name__ for f in sys.meta_path)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_without_timm_its_import_fails_as_usual_and_may_succeed_later() -> None:
    code = (
        "import sys, harmconvert\n"
        "found, sys.path[:] = list(sys.path), [p for p in sys.path if 'site-packages' not in p]\n"
        "for _ in range(2):\n"
        "    try:\n        import timm\n    except ModuleNotFoundError as error:\n        assert error.name == 'timm'\n"
        "    else:\n        raise AssertionError\n"
        "sys.path[:] = found\n"
        "import timm; assert timm.is_model('wrn16_4')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_models_are_registered() -> None:
    assert harmconvert.models
    assert timm.is_model("resnet50_nomaxpool")
