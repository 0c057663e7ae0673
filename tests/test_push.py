"""`harmconvert push` against a stand-in of the hub on this machine, and reading back what it published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from torch import nn

import harmconvert as hc
from harmconvert.errors import InputError, OutsideError, UsageError

from .commands import fails, ok
from .hub import TOKEN, Hub, running_hub

# huggingface_hub gives files to its network library in a way that this library no longer wants.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "me/small"
FILES = ["README.md", "config.json", "harmonic.safetensors", "model.safetensors"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A network of timm with random weights, small enough for a second."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


@pytest.fixture(scope="module")
def checkpoint(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("push") / "small.safetensors"
    hc.save(hc.convert(network, 2), path)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that the client of huggingface_hub takes for the real one."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, huggingface_hub.file_download):  # older versions have a copy
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield running


def example() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def card_of(text: str) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card."""
    _, front, body = text.split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(front)
    return loaded, body


def test_what_was_pushed_is_read_back_in_harmonic_form_and_by_timm(
    hub: Hub, checkpoint: Path, network: nn.Module
) -> None:
    pushed = json.loads(ok("push", str(checkpoint), REPOSITORY, "--license", "mit", "--json").stdout)
    assert pushed["place"] == f"{hub.address}/{REPOSITORY}"
    assert sorted(hub.repositories[REPOSITORY]) == sorted(pushed["files"]) == FILES
    assert hub.repositories[REPOSITORY]["harmonic.safetensors"] == checkpoint.read_bytes()
    assert hub.messages == ["Add a network made with harmconvert"]
    assert hub.private == {REPOSITORY: False}

    cut = hc.load(checkpoint).eval()
    opened = hc.open_source(f"hf-hub:{REPOSITORY}")
    assert opened.header is not None
    assert opened.header.plan.policy == "2"
    assert torch.equal(opened.model(example()), cut(example()))
    assert hc.report(f"hf-hub:{REPOSITORY}").report.file_bytes == checkpoint.stat().st_size
    stock = timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).eval()
    torch.testing.assert_close(stock(example()), cut(example()), rtol=1e-4, atol=1e-4)


def test_a_repository_without_a_harmonic_file_is_read_as_timm_does(hub: Hub, checkpoint: Path) -> None:
    hc.push(checkpoint, REPOSITORY, license="mit")
    del hub.repositories[REPOSITORY]["harmonic.safetensors"]
    with pytest.raises(UsageError, match=f"hf-hub:{REPOSITORY} is not a harmonic checkpoint: make one first"):
        hc.report(f"hf-hub:{REPOSITORY}")
    opened = hc.open_source(f"hf-hub:{REPOSITORY}")
    assert opened.header is None
    assert str(opened.source) == f"hf-hub:{REPOSITORY}"


def test_an_existing_repository_gets_a_commit_only_with_force(hub: Hub, checkpoint: Path) -> None:
    ok("push", str(checkpoint), REPOSITORY, "--license", "mit", "--private")
    assert hub.private == {REPOSITORY: True}
    fails(2, f"{REPOSITORY} exists: use --force to add a commit to it", "push", str(checkpoint), REPOSITORY)
    assert len(hub.messages) == 1
    ok("push", str(checkpoint), REPOSITORY, "--license", "mit", "--force")
    assert len(hub.messages) == 2


def test_files_for_timm_of_an_earlier_network_are_removed(hub: Hub, checkpoint: Path) -> None:
    hc.push(checkpoint, REPOSITORY, license="mit")
    hub.repositories[REPOSITORY]["notes.txt"] = b"mine"
    hc.save(hc.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), 2), "own.safetensors", source="own.py:make")
    Path("own.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3))\n")
    hc.push(hc.SourceRequest("own.safetensors", trust_code=True), REPOSITORY, license="mit", force=True)
    assert sorted(hub.repositories[REPOSITORY]) == ["README.md", "harmonic.safetensors", "notes.txt"]


def test_without_a_login_nothing_is_sent(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    fails(4, "you are not logged in to the hub: log in with `hf auth login`", "push", str(checkpoint), REPOSITORY)
    assert hub.log == []


def test_a_wrong_token_is_refused_in_one_line(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OutsideError, match=f"the hub refuses {REPOSITORY} .*: log in with `hf auth login`") as caught:
        hc.push(checkpoint, REPOSITORY, license="mit")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert hub.repositories == {}


def test_a_failing_hub_is_reported(hub: Hub, checkpoint: Path) -> None:
    hub.refuse = 404
    with pytest.raises(OutsideError, match=f"the hub refuses {REPOSITORY} .*: try again"):
        hc.push(checkpoint, REPOSITORY, license="mit")


def test_no_network_is_reported(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens on this port
    with pytest.raises(OutsideError, match=f"{REPOSITORY} cannot be sent: Connect"):
        hc.push(checkpoint, REPOSITORY, license="mit")


def test_a_repository_that_does_not_exist_cannot_be_opened(hub: Hub) -> None:
    with pytest.raises(OutsideError, match="the weights of hf-hub:me/nothing cannot be fetched"):
        hc.open_source("hf-hub:me/nothing")


@pytest.mark.parametrize("name", ["small", "me/small/again", "me/..", "https://huggingface.co/me/small"])
def test_a_name_that_the_hub_does_not_allow_is_refused(hub: Hub, checkpoint: Path, name: str) -> None:
    fails(2, "is not the name of a repository: give USER/REPO", "push", str(checkpoint), name)
    assert hub.log == []


def test_only_harmonic_checkpoints_are_published(hub: Hub, network: nn.Module, checkpoint: Path) -> None:
    hc.export(network, "plain.safetensors")
    fails(3, "plain.safetensors is not a harmonic checkpoint: make one first", "push", "plain.safetensors", REPOSITORY)
    with pytest.raises(InputError, match="does not exist"):
        hc.push("missing.safetensors", REPOSITORY, local="folder", license="mit")
    damaged = bytearray(checkpoint.read_bytes())
    damaged[-1] ^= 1
    Path("damaged.safetensors").write_bytes(damaged)
    fails(3, "is damaged", "push", "damaged.safetensors", REPOSITORY, "--local", "folder", "--license", "mit")


def test_an_unknown_licence_must_be_named(hub: Hub, tmp_path: Path) -> None:
    hc.save(hc.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), 2), "own.safetensors", source="own.py:make")
    Path("own.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3))\n")
    own = ("push", "own.safetensors", REPOSITORY, "--local", "folder", "--trust-code")
    fails(2, "does not record the licence of its weights: name it with --license apache-2.0", *own)
    result = ok(*own, "--license", "Our own terms")
    assert "note: without files for timm: a timm folder needs a timm network" in result.stdout
    assert sorted(os.listdir("folder")) == ["README.md", "harmonic.safetensors"]
    front, body = card_of(Path("folder/README.md").read_text())
    assert front["license"] == "other"
    assert front["license_name"] == "Our own terms"
    assert front["library_name"] == "harmconvert"
    assert "import timm" not in body
    assert 'hc.load(file, model=make(), form="dense")' in body, "others do not have the code of the author"
    assert "--model FILE.py:FUNCTION --data FOLDER" in body


def test_a_folder_gets_the_same_files_and_is_a_source(hub: Hub, checkpoint: Path) -> None:
    assert "wrote folder" in ok("push", str(checkpoint), REPOSITORY, "--local", "folder", "--license", "mit").stdout
    assert sorted(os.listdir("folder")) == FILES
    assert hub.log == []
    ok("convert", "local-dir:folder", "-o", "again.safetensors")
    assert hc.load("again.safetensors").state_dict().keys() == hc.load(checkpoint).state_dict().keys()
    assert json.loads(ok("report", "local-dir:folder", "-o", "report.json", "--json").stdout)["sha256"] is not None
    again = ("push", str(checkpoint), REPOSITORY, "--local", "folder", "--license", "mit")
    fails(2, "folder exists: use --force", *again)
    ok(*again, "--force")
    Path("folder/notes.txt").write_text("mine")
    fails(2, "folder holds other files (notes.txt)", *again, "--force")


@pytest.mark.slow
def test_the_card_says_what_the_file_records(tmp_path: Path) -> None:
    network = hc.open_source("sample:resnet_mnist5k").model
    conversion = hc.convert(network, {"stage3.*": 2}, bits=4)
    evaluation = {"images": 1000, "labelled": 1000, "top1": 0.991, "top1_interval": [0.983, 0.995], "agreement": 0.995,
                  "loss": 0.03, "divergence": 0.002}  # fmt: skip
    stages = [
        {"name": "uncut", "evaluation": {**evaluation, "top1": 0.994}, "why": None},
        {"name": "fine-tuned", "evaluation": evaluation, "why": None},
    ]
    command = {"name": "finetune", "source": "x", "words": ["--data-dir", "/home/me/private/digits/"]}
    run = {"command": command, "recipe": {}, "stages": stages, "epochs": []}
    path = tmp_path / "digits.safetensors"
    hc.save(conversion, path, source="sample:resnet_mnist5k", history={"training": [run]})
    hc.push(path, "me/digits", local=tmp_path / "folder", license="apache-2.0")
    front, body = card_of((tmp_path / "folder" / "README.md").read_text())
    assert front == {
        "library_name": "timm", "license": "apache-2.0", "tags": ["harmconvert", "model-compression"],
    }  # fmt: skip
    for line in (
        "# digits", "| fine-tuned | 1000 | 99.1 % (98.3-99.5) | 99.5 % | 0.002 |", "Measured on a folder `digits`.",
        "| parameters | 271,994 |", 'hc.open_source("hf-hub:me/digits")', "import harmconvert  # timm itself does not",
        "4.00 bits per coded weight", "| keeps 3 of 9, 4",
    ):  # fmt: skip
        assert line in body, (line, body)
    assert "/home/me" not in body


def test_the_card_names_the_original_on_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    from harmconvert.storage import Source, read_header

    header = read_header(checkpoint)
    assert header.source is not None
    source = Source("timm", "test_resnet", header.source.arguments, weights={"tag": "r160_in1k"}, licence="Apache-2.0")
    named = tmp_path / "named.safetensors"
    hc.save(hc.load(checkpoint), named, source=source)
    hc.push(named, REPOSITORY, local=tmp_path / "folder")
    front, body = card_of((tmp_path / "folder" / "README.md").read_text())
    assert front["base_model"] == "timm/test_resnet.r160_in1k"
    assert front["license"] == "apache-2.0"
    assert "The file records no accuracy. Measure it on your images:" in body
    assert "Without harmconvert:" in body


@pytest.mark.slow
def test_another_process_pushes_and_reads_with_the_address_in_its_environment(checkpoint: Path, tmp_path: Path) -> None:
    """The address of a hub is in HF_ENDPOINT, which huggingface_hub reads when it is imported."""
    with running_hub() as running:
        environment = {
            **os.environ, "HF_ENDPOINT": running.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        for words in (
            ["push", str(checkpoint), REPOSITORY, "--license", "mit"],
            ["export", f"hf-hub:{REPOSITORY}", "-o", str(tmp_path / "dense.safetensors")],
        ):
            subprocess.run([sys.executable, "-m", "harmconvert", *words], env=environment, check=True)
        assert (tmp_path / "dense.safetensors").exists()


def test_a_name_must_have_two_parts_in_python_too(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="'small' is not the name of a repository"):
        hc.push(checkpoint, "small")
