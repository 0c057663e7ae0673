"""What a command does is one call in Python: paths, source strings and networks in, files and dataclasses out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import harmconvert as hc
from harmconvert.data.datasets import DataRequest
from harmconvert.errors import CheckError, InputError, UsageError
from harmconvert.pipeline.convert_to_file import Rounding
from harmconvert.plan.plan import Plan
from harmconvert.sources.request import SourceRequest
from harmconvert.storage.checkpoint import read_header

SAMPLE = "sample:resnet_mnist5k"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Recorder(hc.Listener):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.results: list[str] = []
        self.written: list[str] = []

    def say(self, message: str, *, urgent: bool = False) -> None:
        self.said.append(message)

    def result(self, result: object) -> None:
        self.results.append(type(result).__name__)

    def wrote(self, path: str | Path) -> None:
        self.written.append(str(path))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())


# --- convert_to_file ---


def test_a_source_is_converted_verified_and_written(capfd: pytest.CaptureFixture[str]) -> None:
    listener = Recorder()
    done = hc.convert_to_file(SAMPLE, "cut.safetensors", 2, dtype="float16", listener=listener)
    assert listener.said == ["verifying"]
    assert listener.results == ["Conversion", "Verification", "Rounding"]
    assert listener.written == [done.output] == ["cut.safetensors"]
    assert done.verification.as_planned
    assert isinstance(done.rounding, Rounding)
    assert done.rounding.dtype == "float16"
    header = read_header("cut.safetensors")
    assert header.plan == done.header.plan
    assert "command" not in header.history, "no command ran"
    record = json.loads(json.dumps(done.to_json()))
    assert (record["output"], record["verification"]["as_planned"]) == ("cut.safetensors", True)
    assert capfd.readouterr() == ("", ""), "the library prints nothing"


def test_a_network_of_ones_own_is_converted_and_stays_as_it_was() -> None:
    network = small()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    done = hc.convert_to_file(
        network, "own.safetensors", 2, input_sizes=[(3, 8, 8)], preprocessing={"preprocess": "none"}
    )
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert not hasattr(network, "pretrained_cfg")
    assert done.header.preprocessing is not None
    assert done.header.preprocessing["input_sizes"] == [[3, 8, 8]]
    assert done.header.source is None
    assert hc.verify(network, hc.load("own.safetensors", model=network), torch.randn(2, 3, 8, 8)).as_planned
    again = hc.convert_to_file(network, "example.safetensors", 2, example_input=torch.randn(2, 3, 9, 9))
    assert again.verification.inputs == 2


def test_what_is_harmonic_already_is_written_as_it_is_unless_something_is_asked_for() -> None:
    conversion = hc.convert(hc.open_source(SAMPLE).model, 2)
    kept = hc.convert_to_file(conversion, "kept.safetensors")
    assert kept.conversion is None
    assert kept.header.plan == conversion.plan
    assert set(kept.to_json()) == {"output", "plan", "verification"}
    assert hc.convert_to_file("kept.safetensors", "again.safetensors").conversion is None
    further = hc.convert_to_file(conversion.model, "further.safetensors", 1)
    assert further.conversion is not None
    assert max(layer.kept for layer in further.conversion.layers[1:]) == 1


def test_a_plan_is_followed_from_any_file_that_holds_one() -> None:
    cut = hc.convert_to_file(SAMPLE, "cut.safetensors", "progressive")
    cut.header.plan.save("plan.json")
    for number, plan in enumerate(("plan.json", Path("cut.safetensors"))):
        assert hc.convert_to_file(SAMPLE, f"{number}.safetensors", plan=plan).header.plan == cut.header.plan
    assert hc.convert_to_file(SAMPLE, "p.safetensors", Plan.load("plan.json")).header.plan == cut.header.plan


def test_images_to_calibrate_on_are_named_or_given() -> None:
    settings = hc.CalibrationSettings(inputs=40)
    listener = Recorder()
    named = hc.convert_to_file(
        SAMPLE, "a.safetensors", 2, calibration="sample:mnist5k", settings=settings, listener=listener
    )
    assert listener.said[0].startswith("calibrating on 40 images of sample:mnist5k, 1x28x28")
    given = hc.convert_to_file(SAMPLE, "b.safetensors", 2, calibration=[torch.randn(40, 1, 28, 28)], settings=settings)
    for done in (named, given):
        assert done.conversion is not None
        assert done.conversion.calibration is not None
        assert done.header.history["calibration"]["inputs"] == 40
    with pytest.raises(UsageError, match=r"calibrate=sample:mnist5k feeds one image"):
        hc.convert_to_file(small(), "c.safetensors", calibration="sample:mnist5k", input_sizes=[(3, 8, 8), (3, 8, 8)])


def test_nothing_is_written_where_the_flow_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("there.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"there.safetensors exists"):
        hc.convert_to_file("no_such_network", "there.safetensors")
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        hc.convert_to_file(SAMPLE, "a.safetensors", dtype="int8")
    with pytest.raises(UsageError, match="both say what to keep"):
        hc.convert_to_file(SAMPLE, "a.safetensors", 2, budget="params=50%")
    network = hc.open_source(SAMPLE).model
    Path("digits/0").mkdir(parents=True)
    Image.new("L", (28, 28)).save("digits/0/a.png")
    with pytest.raises(InputError, match="labelled=digits holds 1 image"):
        hc.convert_to_file(network, "a.safetensors", max_drop=1, labelled=DataRequest(data_dir="digits", holdout=0.0))

    def astray(*_: object, **__: object) -> object:
        return check

    check = hc.verify(network, hc.convert(network, 2).model)
    monkeypatch.setattr("harmconvert.pipeline.convert_to_file.verify", astray)
    with pytest.raises(CheckError, match="nothing was written"):
        hc.convert_to_file(SourceRequest(SAMPLE), "a.safetensors")
    assert sorted(path.name for path in Path().iterdir()) == ["digits", "there.safetensors"]
    assert Path("there.safetensors").read_bytes() == b"mine"
