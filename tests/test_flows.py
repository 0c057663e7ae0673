"""Each command is one call in Python: it takes paths, source strings or networks; it returns files and dataclasses."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import harmconvert as hc
from harmconvert.data import DataRequest
from harmconvert.errors import CheckError, InputError, UsageError
from harmconvert.pipeline import Rounding, TrainingProgress
from harmconvert.plan import Plan
from harmconvert.sources import SourceRequest
from harmconvert.storage import read_header

from .pictures import digit_folders

SAMPLE = "sample:resnet_mnist5k"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Recorder(hc.Listener):
    """A listener that records its messages."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.results: list[str] = []
        self.written: list[str] = []
        self.epochs: list[int] = []
        self.steps = 0

    def say(self, message: str, *, urgent: bool = False) -> None:
        self.said.append(message)

    def training(self, epochs: int) -> AbstractContextManager[TrainingProgress]:
        return nullcontext(TrainingProgress(self.step, lambda row: self.epochs.append(row["epoch"])))

    def step(self, told: object) -> None:
        self.steps += 1

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


def test_a_network_in_memory_is_converted_and_stays_unchanged() -> None:
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


def test_a_harmonic_network_is_written_unchanged_unless_a_conversion_is_requested() -> None:
    conversion = hc.convert(hc.open_source(SAMPLE).model, 2)
    kept = hc.convert_to_file(conversion, "kept.safetensors")
    assert kept.conversion is None
    assert kept.header.plan == conversion.plan
    assert set(kept.to_json()) == {"output", "plan", "verification"}
    assert hc.convert_to_file("kept.safetensors", "again.safetensors").conversion is None
    further = hc.convert_to_file(conversion.model, "further.safetensors", 1)
    assert further.conversion is not None
    assert max(layer.kept for layer in further.conversion.layers[1:]) == 1


def test_a_plan_is_read_from_a_plan_file_or_a_checkpoint() -> None:
    network, size = small(), {"input_sizes": [(3, 8, 8)]}
    plan = hc.convert_to_file(network, "cut.safetensors", 2, **size).header.plan
    plan.save("plan.json")
    for number, file in enumerate(("plan.json", Path("cut.safetensors"))):
        assert hc.convert_to_file(network, f"{number}.safetensors", plan=file, **size).header.plan == plan
    assert hc.convert_to_file(network, "p.safetensors", Plan.load("plan.json"), **size).header.plan == plan


@pytest.mark.slow
def test_calibration_images_are_named_or_passed_as_batches() -> None:
    settings, listener = hc.CalibrationSettings(inputs=40), Recorder()
    options = {"settings": settings, "include": ["stage3.2.*"]}
    named = hc.convert_to_file(SAMPLE, "a.safetensors", 2, calibration="sample:mnist5k", listener=listener, **options)
    assert listener.said[0].startswith("calibrating on 40 images of sample:mnist5k, 1x28x28")
    given = hc.convert_to_file(SAMPLE, "b.safetensors", 2, calibration=[torch.randn(40, 1, 28, 28)], **options)
    for done in (named, given):
        assert done.conversion is not None
        assert done.conversion.calibration is not None
        assert done.header.history["calibration"]["inputs"] == 40
    with pytest.raises(UsageError, match=r"calibrate=sample:mnist5k names images, which are one input"):
        hc.convert_to_file(small(), "c.safetensors", calibration="sample:mnist5k", input_sizes=[(3, 8, 8), (3, 8, 8)])


def test_nothing_is_written_if_the_flow_fails(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(InputError, match="digits has 1 image"):
        hc.convert_to_file(network, "a.safetensors", max_drop=1, labelled=DataRequest(data_dir="digits", holdout=0.0))

    def astray(*_: object, **__: object) -> object:
        return check

    check = hc.verify(network, hc.convert(network, 2).model)
    monkeypatch.setattr(sys.modules["harmconvert.pipeline.convert_to_file"], "verify", astray)
    with pytest.raises(CheckError, match="nothing was written"):
        hc.convert_to_file(SourceRequest(SAMPLE), "a.safetensors")
    assert sorted(path.name for path in Path().iterdir()) == ["digits", "there.safetensors"]
    assert Path("there.safetensors").read_bytes() == b"mine"


# --- evaluate ---


@pytest.mark.slow
def test_a_network_is_evaluated_by_its_name_or_in_memory(capfd: pytest.CaptureFixture[str]) -> None:
    listener = Recorder()
    found = hc.evaluate(SAMPLE, "sample:mnist5k", listener=listener)
    assert (found.images, found.top1) == (1000, 0.994)
    assert listener.said == ["preprocessing: 1x28x28, mean 0.1307, std 0.3081, bicubic, crop 1"]
    record = json.loads(json.dumps(found.to_json()))
    assert list(record)[:3] == ["source", "preprocessing", "images"]
    assert record["source"] == SAMPLE
    assert "metric" not in record
    conversion = hc.convert(hc.open_source(SAMPLE).model, 2)
    cut = hc.evaluate(conversion, "sample:mnist5k", compare=SAMPLE)
    assert cut.top1 == hc.evaluate(conversion.model, DataRequest("sample:mnist5k", holdout=0.0)).top1
    assert 0.5 < (cut.agreement or 0) < 1
    assert capfd.readouterr() == ("", "")


def test_a_network_is_evaluated_on_the_users_own_batches() -> None:
    logits = torch.eye(4)
    pairs = [(logits, torch.tensor([0, 1, 2, 0])), (logits[:1], [0])]
    found = hc.evaluate(nn.Identity(), pairs)
    assert (found.images, found.labelled, found.top1) == (5, 5, pytest.approx(4 / 5))
    found = hc.evaluate(nn.Identity(), [logits, logits], compare=nn.Softmax(1))
    assert (found.images, found.labelled, found.top1, found.agreement) == (8, 0, None, 1)


def test_any_network_is_evaluated_with_a_metric() -> None:
    """The result is the mean over examples, independent of the batches."""

    def error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).abs().flatten(1).mean(1)

    inputs, targets = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    whole = hc.evaluate(nn.Identity(), [(inputs, targets)], metric=error)
    parts = hc.evaluate(nn.Identity(), zip(inputs.split(2), targets.split(2), strict=True), metric=error)
    assert whole.metric == pytest.approx((inputs - targets).abs().mean().item())
    assert parts.metric == pytest.approx(whole.metric)
    mean = hc.evaluate(nn.Identity(), [(inputs, targets)], metric=lambda found, wanted: error(found, wanted).mean())
    assert mean.metric == pytest.approx(whole.metric)
    assert (whole.images, whole.top1, whole.to_json()["metric"]) == (5, None, whole.metric)
    several = hc.evaluate(
        nn.Bilinear(2, 3, 1), [((torch.ones(4, 2), torch.ones(4, 3)), torch.ones(4))], metric=error_of
    )
    assert several.images == 4
    named = hc.evaluate(SAMPLE, "sample:mnist5k", metric=lambda logits, labels: (logits.argmax(1) == labels).double())
    assert named.metric == 0.994
    with pytest.raises(InputError, match="no batch to evaluate on"):
        hc.evaluate(nn.Identity(), [], metric=error)


def error_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - targets).abs()


def test_a_network_in_memory_is_evaluated_in_float32_and_stays_unchanged() -> None:
    network = hc.open_source(SAMPLE).model.half()
    assert hc.evaluate(network, "sample:mnist5k").top1 == pytest.approx(0.994, abs=0.002)
    assert network.stem.weight.dtype == torch.float16
    with pytest.raises(UsageError, match="compare_weights are for a source string"):
        hc.evaluate(network, "sample:mnist5k", compare=network, compare_weights="a.safetensors")
    with pytest.raises(UsageError, match="device=xpu"):
        hc.evaluate(network, "sample:mnist5k", device="xpu")


# --- finetune and train ---


DIGITS = {"crop": "padded", "hflip": 0.0, "batch_size": 10, "epochs": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digit_folders(folder / "train", 2)
    digit_folders(folder / "val", 1, first=2)
    return folder


@pytest.mark.slow
def test_a_checkpoint_is_finetuned(digits: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hc.convert_to_file(SAMPLE, "cut.safetensors", 2)
    listener = Recorder()
    done = hc.finetune("cut.safetensors", digits, "tuned.safetensors", workers=0, listener=listener, **DIGITS)
    assert [stage.name for stage in done.stages] == ["uncut", "before", "calibrated", "fine-tuned"]
    assert listener.said[0].startswith("finetune: 1 epoch, momentum, lr 0.001")
    assert listener.written == [done.output] == ["tuned.safetensors"]
    assert (listener.epochs, listener.steps > 0) == ([1], True)
    assert done.header is not None
    assert done.header.crc32 == read_header("tuned.safetensors").crc32
    (run,) = done.header.history["training"]
    assert "command" not in run
    record = json.loads(json.dumps(done.to_json()))
    assert record["epochs"] == run["epochs"]
    assert sorted(path.name for path in Path().iterdir()) == [
        "cut.safetensors", "tuned.metrics.csv", "tuned.safetensors",
    ]  # fmt: skip
    assert capfd.readouterr() == ("", "")


def test_a_network_in_memory_is_finetuned_and_stays_unchanged(digits: Path) -> None:
    network = hc.open_source(SAMPLE).model
    conversion = hc.convert(network, 2)
    before = {key: tensor.clone() for key, tensor in conversion.model.state_dict().items()}
    options = {"workers": 0, "calibration_images": 0, **DIGITS}
    done = hc.finetune(conversion, digits, teacher=network, distill=0.5, **options)
    assert (done.output, done.header) == (None, None)
    assert done.recipe.distill == 0.5
    assert done.stages[2].why == "calibration_images=0"
    assert [stage.evaluation is not None for stage in done.stages] == [True, True, False, True]
    assert all(torch.equal(tensor, before[key]) for key, tensor in conversion.model.state_dict().items())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in done.model.state_dict().items())
    assert not any(Path().iterdir()), "no state is kept where nothing is written"
    alone = hc.finetune(conversion.model, digits, recipe=hc.Recipe(**DIGITS), workers=0)
    assert alone.stages[0].why is not None
    assert alone.stages[0].why.endswith("name the uncut network with teacher=SOURCE")
    with pytest.raises(UsageError, match=r"distill needs the uncut network: .*; name it with teacher=SOURCE"):
        hc.finetune(conversion.model, digits, distill=1, **options)
    with pytest.raises(UsageError, match="Sequential: the uncut network has 3 classes, this one 10"):
        hc.finetune(conversion.model, digits, teacher=nn.Sequential(nn.Linear(2, 3)), **options)


def test_messages_of_finetune_name_arguments_and_not_options(digits: Path) -> None:
    with pytest.raises(UsageError, match="is not a harmonic checkpoint"):
        hc.finetune(SAMPLE, digits)
    with pytest.raises(UsageError, match="Linear is not a harmonic checkpoint"):
        hc.finetune(nn.Linear(2, 3), digits)
    with pytest.raises(UsageError, match="a recipe has no setting 'learning_rate': use name, epochs, "):
        hc.finetune(hc.convert(hc.open_source(SAMPLE).model, 2), digits, learning_rate=1)
    Path("a.state.pth").write_bytes(b"")
    remedy = r"the state of an interrupted run: go on with resume=a.state.pth, or start a new run with force=True"
    for flow in (hc.finetune, hc.train):
        with pytest.raises(UsageError, match=remedy):
            flow("cut.safetensors", digits, "a.safetensors")


@pytest.mark.parametrize("harmonic", ["none", "all"])
def test_a_network_is_trained_from_scratch(digits: Path, harmonic: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 5, stride=3), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    size = {"input_size": 28, "preprocess": "none"}
    listener = Recorder()
    done = hc.train(
        network, digits, "net.safetensors", harmonic=harmonic, lam=2, preprocessing=size, workers=0, listener=listener,
        **DIGITS,
    )  # fmt: skip
    assert listener.written == ["net.safetensors"]
    assert (len(done.rows), done.evaluation.images, done.recipe.name) == (1, 10, "imagenet-resnet")
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert json.loads(json.dumps(done.to_json()))["output"] == "net.safetensors"
    if harmonic == "all":
        header = read_header("net.safetensors")
        assert header.history["training"][0]["epochs"] == [dict(row) for row in done.rows]
        assert hc.load("net.safetensors", model=network)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    with pytest.raises(InputError, match=r"or build the network with arguments=\{'num_classes': 10\}"):
        hc.train(nn.Linear(4, 7), digits, harmonic="none", preprocessing=size, workers=0, **DIGITS)


# --- export, benchmark, report, figure, compare ---


def test_a_network_is_exported_by_its_name_or_from_memory(capfd: pytest.CaptureFixture[str]) -> None:
    network = hc.open_source(SAMPLE).model
    conversion = hc.convert(network, 2)
    listener = Recorder()
    done = hc.export(conversion, "dense.safetensors", listener=listener)
    assert listener.written == ["dense.safetensors"]
    assert (done.format, done.form, done.dtype, done.source) == ("dense", "dense", "float32", "unknown:WideResNet")
    stock = hc.open_source(SAMPLE, weights="dense.safetensors").model
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(stock(images), conversion.model.eval()(images), atol=1e-4)
    half = hc.export(SAMPLE, "half.safetensors", dtype="float16")
    assert json.loads(json.dumps(half.to_json()))["check"]["difference"] < 0.02
    program = hc.export(small(), "net.pt2", "torch-export", input_sizes=[(3, 8, 8)])
    assert program.check is not None
    with pytest.raises(UsageError, match=r"dense.safetensors exists"):
        hc.export("no_such_network", "dense.safetensors")
    with pytest.raises(UsageError, match=r"this network does not declare its input size: give example_input$"):
        hc.export(small(), "other.pt2", "torch-export")
    assert capfd.readouterr().out == ""


def test_a_network_is_timed_by_its_name_or_in_memory() -> None:
    quick = {"batches": [2], "repeats": 3, "forms": ["dense"], "layouts": ["contiguous"]}
    for network, source in ((SAMPLE, SAMPLE), (small(), "unknown:Sequential")):
        sizes = () if network == SAMPLE else [(3, 8, 8)]
        found = hc.benchmark(network, input_sizes=sizes, **quick)
        assert (found.source, len(found.rows), found.rows[0].batch) == (source, 1, 2)
        assert next(iter(found.to_json())) == "source"
    assert hc.benchmark(small(), torch.randn(1, 3, 9, 9), **quick).rows[0].seconds
    with pytest.raises(UsageError, match=r"this network does not declare its input size: give example_input$"):
        hc.benchmark(small(), **quick)


def test_a_report_is_data_or_a_page() -> None:
    cut = hc.convert_to_file(SAMPLE, "cut.safetensors", 2)
    found = hc.report("cut.safetensors")
    assert found.output is None
    assert found.report.name == "cut"
    assert found.report.sha256 is not None
    listener = Recorder()
    written = hc.report("cut.safetensors", "cut.json", listener=listener)
    assert listener.written == [written.output] == ["cut.json"]
    assert json.loads(Path("cut.json").read_text()) == json.loads(json.dumps(found.report.to_json()))
    again = hc.report(cut.model, file="cut.safetensors")
    assert (again.report.name, again.report.sha256) == ("cut", found.report.sha256)
    timed = hc.report(hc.convert(small(), 2), latency=2, input_sizes=[(3, 8, 8)]).report
    assert timed.timing is not None
    assert timed.timing["batch"] == 2
    for refused in (SAMPLE, nn.Linear(2, 3)):
        with pytest.raises(UsageError, match="is not a harmonic checkpoint"):
            hc.report(refused)
    with pytest.raises(UsageError, match=r"cut.json exists"):
        hc.report("cut.safetensors", "cut.json")


def test_a_figure_is_drawn_with_its_numbers() -> None:
    pytest.importorskip("matplotlib")
    conversion = hc.convert(small(), 2)
    drawn = hc.figure(conversion, "layers", "layers.svg")
    assert (drawn.output, drawn.numbers, len(drawn.rows)) == ("layers.svg", "layers.csv", 2)
    assert Path("layers.svg").read_text().startswith("<?xml")
    assert list(json.loads(json.dumps(drawn.to_json()))) == ["figure", "source", "output", "numbers", "rows"]
    with pytest.raises(UsageError, match="a trade-off needs labelled images for the test: give tested"):
        hc.figure(SAMPLE, "tradeoff")
    with pytest.raises(UsageError, match="unknown figure 'pie': use filters, "):
        hc.figure(SAMPLE, "pie")
    with pytest.raises(UsageError, match="is not a harmonic checkpoint"):
        hc.figure(SAMPLE, "layers")


@pytest.mark.slow
def test_a_trade_off_is_tested_on_images(digits: Path) -> None:
    pytest.importorskip("matplotlib")
    tested = hc.TradeoffSettings(digits, calibration=digits / "train", include=["stage3.2.*"], workers=0)
    listener = Recorder()
    drawn = hc.figure(SAMPLE, "tradeoff", "t.svg", tested=tested, listener=listener)
    assert {row["calibrated"] for row in drawn.rows} == {True, False}
    assert listener.said[0].startswith("preprocessing: 1x28x28")
    assert listener.said[1].startswith("calibrating on 20 images")


def test_checkpoints_are_compared_by_their_names_or_in_memory() -> None:
    network = hc.open_source(SAMPLE).model
    hc.convert_to_file(SAMPLE, "cut.safetensors", 2)
    found = hc.compare("cut.safetensors", hc.convert(network, "progressive"))
    assert [column.name for column in found.columns] == ["cut", "WideResNet"]
    assert found.layers["stage1.0.conv1"] == ((3, 9), (9, 9))
    assert len(hc.compare("cut.safetensors", "cut.safetensors", all_layers=True).layers) == 19
    with pytest.raises(UsageError, match="a comparison needs two checkpoints or more"):
        hc.compare("cut.safetensors")
    with pytest.raises(UsageError, match="is not a harmonic checkpoint"):
        hc.compare("cut.safetensors", SAMPLE)
