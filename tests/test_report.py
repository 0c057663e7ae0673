"""The report: its data, the page, the comparison, and their display in a browser."""

from __future__ import annotations

import base64
import cProfile
import html
import html.parser
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from harmconvert import save
from harmconvert.calibration import CalibrationSettings
from harmconvert.deploy import Benchmark, Row
from harmconvert.errors import InputError, OutsideError, UsageError
from harmconvert.layers import Times, in_turns
from harmconvert.pipeline import convert
from harmconvert.plan import Plan
from harmconvert.report import (
    LayerBytes,
    LayerRank,
    Report,
    axis,
    comparison_of,
    counted,
    grid,
    page,
    report_of,
    shortened_name,
    write_report,
)
from harmconvert.search import SearchSettings
from harmconvert.sources import open_source
from harmconvert.storage import Header, Source, read_header
from harmconvert.training import recipe_named

from .browser import UNREADABLE, Visit, chromium
from .commands import SAMPLE, converted, fails, ok
from .pictures import digit_folders
from .seams import replace_everywhere

# Most calls of functions to write one page: about three seconds of work.
MOST_CALLS = 10_000_000
SNAPSHOT = Path(__file__).with_name("report_snapshot.json")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def evaluation(top1: float | None, images: int = 1000) -> dict[str, Any]:
    return {
        "images": images, "labelled": images if top1 is not None else 0, "top1": top1, "top5": None, "loss": 0.5,
        "agreement": None if top1 is not None else 0.75, "divergence": None, "images_per_second": 1.0, "unreadable": [],
    }  # fmt: skip


def training(**recipe: Any) -> dict[str, Any]:
    """Return a short record of a training, as finetune writes it."""
    epochs = [{"epoch": n, "loss": 1 / n, "accuracy": 0.9, "test_loss": 0.5, "test_top1": 0.95} for n in (1, 2)]
    stages = [
        {"name": "uncut", "evaluation": evaluation(0.99), "why": None},
        {"name": "before", "evaluation": evaluation(0.5), "why": None},
        {"name": "calibrated", "evaluation": None, "why": "--calibration-images 0"},
        {"name": "fine-tuned", "evaluation": evaluation(0.98), "why": None},
    ]
    return {"recipe": {"name": "finetune", "epochs": 2, "lr": 0.01, **recipe}, "stages": stages, "epochs": epochs}


def made(network: nn.Module, lam: Any = 2, history: dict[str, Any] | None = None, **given: Any) -> Report:
    """Return the report of a conversion, made as by the command line."""
    conversion = convert(network, lam, **given)
    source = Source("sample", "resnet_mnist5k", {}, "ab" * 32, "Apache-2.0")
    header = save(conversion, "net.safetensors", source=source, history=history, force=True)
    example = given.get("example_input")
    return report_of(conversion.model, header, "net", path="net.safetensors", example_input=example)


def timed() -> Benchmark:
    """Return a result of `benchmark` without the factored form."""
    rows = [
        Row("dense", False, "contiguous", 4, 2, 0.03, 0.01, 133.0, None, 0.0),
        Row("dense", False, "channels_last", 4, 2, 0.02, 0.02, 200.0, None, 0.0),
        Row("harmonic", False, "contiguous", 4, 2, 0.0215, 0.031, 186.0, None, 0.0),
    ]
    machine = {
        "device": "cpu",
        "processor": "x86_64",
        "capability": "AVX2",
        "cores": 2,
        "gpu": "none of it",
        "torch": "9",
    }
    return Benchmark(tuple(rows), {}, machine)


def rich_report() -> Report:
    """Return a report with every section: calibration, search, training, latency."""
    network, inputs = small(), torch.randn(64, 1, 16, 16)
    conversion = convert(
        network, budget={"params": 0.6}, calibration=[inputs], example_input=inputs[:1], search=SearchSettings(4),
        settings=CalibrationSettings(seed=3),
    )  # fmt: skip
    history = {"training": [training()]}
    header = save(conversion, "net.safetensors", source=Source("timm", "x", {"a": 1}, "cd" * 32), history=history)
    return report_of(
        conversion.model, header, "net", path="net.safetensors", example_input=inputs[:1],
        latency=timed(),
    )  # fmt: skip


# --- the data ---


def snapshot() -> dict[str, Any]:
    """Return the data of a report without what differs between machines: six digits, no versions, no hashes."""

    def plain(data: Any) -> Any:
        if isinstance(data, float):
            return float(f"{data:.5g}") if abs(data) > 1e-5 else 0.0
        if isinstance(data, dict):
            return {key: plain(value) for key, value in data.items()}
        return [plain(value) for value in data] if isinstance(data, list | tuple) else data

    found = made(small(), 2, {"training": [training()]}, example_input=torch.zeros(1, 1, 16, 16)).to_json()
    return plain({**found, "versions": {}, "sha256": None, "harmconvert": "", "file_bytes": None})


def test_the_report_data_equal_the_snapshot() -> None:
    """To update the snapshot after an intended change, run python -m tests.test_report."""
    assert json.loads(json.dumps(snapshot())) == json.loads(SNAPSHOT.read_text())


def test_forms_have_the_time_of_their_faster_memory_format() -> None:
    found = rich_report()
    assert [(form.seconds, form.spread, form.layout) for form in found.forms] == [
        (0.02, 0.02, "channels_last"), (0.0215, 0.031, "contiguous"), (None, None, None),
    ]  # fmt: skip
    assert found.timing == {"batch": 4, "threads": 2, "machine": timed().machine}
    assert found.to_json()["timing"]["batch"] == 4
    assert replace(found, timing=None).to_json()["timing"] is None


def test_the_report_command_measures_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    converted("cut.safetensors", "--lambda", "2")
    assert "latency=1</code> measures it" in page(made(small(), 2))
    fails(2, "--device works only with --figure tradeoff or --latency", "report", "cut.safetensors", "--device", "cpu")
    replace_everywhere(monkeypatch, in_turns, lambda runs, *_, **__: {name: Times((0.2, 0.1, 0.4)) for name in runs})
    ok("report", "cut.safetensors", "--latency", "2", "--device", "cpu", "-o", "a.json")
    found = json.loads(Path("a.json").read_text())
    assert [(form["seconds"], form["spread"]) for form in found["forms"]] == [(0.2, pytest.approx(0.375))] * 3
    assert (found["timing"]["batch"], found["timing"]["machine"]["device"]) == (2, "cpu")
    assert found["timing"]["threads"] == torch.get_num_threads()
    assert found["sha256"], "and all else as without"
    Path("net.py").write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(1, 2, 3))\n")
    save(convert(nn.Sequential(nn.Conv2d(1, 2, 3)), 2), "own.safetensors", source=Source("code", "net.py:net"))
    own = ["report", "own.safetensors", "--trust-code", "--latency", "1", "-o", "b.json"]
    fails(2, "this network does not declare its input size: give --input-size C,H,W", *own)
    ok(*own, "--input-size", "1,8,8")


def test_a_report_from_the_checkpoint_equals_the_report_of_the_conversion() -> None:
    ok("convert", SAMPLE, "--lambda", "2", "-o", "cut.safetensors", "--report", "now.json")
    ok("report", "cut.safetensors", "-o", "later.json")
    assert json.loads(Path("now.json").read_text()) == json.loads(Path("later.json").read_text())
    found = json.loads(Path("now.json").read_text())
    layer = found["layers"][1]
    assert (layer["name"], layer["kept"], layer["total"], layer["levels"]) == ("stage1.0.conv1", 3, 9, 2)
    assert 0.4 < layer["energy"] < 0.6
    assert all(value > 0 for value in layer["spectrum"]), "the uncut kernel's, the cut frequencies with it"
    assert layer["spectrum_uncut"] is True
    assert [form["parameters"] for form in found["forms"]] == [271994, 93818, 93818]
    assert found["forms"][0]["macs"] > found["forms"][2]["macs"]
    assert found["stages"] == []
    assert Plan.load("now.json") == read_header("cut.safetensors").plan, "so that --plan takes a report"


def test_layers_that_share_coefficients_have_the_same_errors() -> None:
    net = nn.Sequential(*(nn.Conv2d(width, 8, 3, padding=1, bias=False) for width in (1, 8, 8, 8)))
    net[2].weight = net[1].weight
    conversion = convert(net, 2, calibration=[torch.randn(16, 1, 8, 8) for _ in range(2)])
    header = save(conversion, "tied.safetensors")
    layers = {layer.name: layer for layer in report_of(conversion.model, header, "tied").layers}
    assert layers["1"].output_error_before is not None
    assert layers["1"].output_error_before == layers["2"].output_error_before != layers["3"].output_error_before
    assert layers["1"].decision == layers["2"].decision


def test_unknown_values_are_none() -> None:
    network = small()
    conversion = convert(network, 2)
    found = report_of(conversion.model, save(conversion.model, "net.safetensors"), "net")
    assert {form.macs for form in found.forms} == {form.seconds for form in found.forms} == {None}
    assert (found.source, found.stages, found.calibration, found.search, found.commands) == (None, (), None, None, ())
    cut = found.cut[0]
    assert (cut.energy, cut.kernel_error, cut.output_error_after) == (None, None, None)
    assert not cut.spectrum_uncut
    assert cut.spectrum is not None
    assert [value == 0 for value in cut.spectrum] == [not kept for kept in cut.keeps]
    text = page(found)
    for words in (
        "The accuracy was not measured",
        "unknown",
        "was not measured",
        "not recorded",
        "Errors are not recorded",
    ):
        assert words in text, words


def test_saving_a_conversion_from_python_records_the_same_as_the_command_line() -> None:
    converted("by_command.safetensors", "--lambda", "2")
    conversion = convert(open_source(SAMPLE).model, 2)
    header = save(conversion, "by_python.safetensors", history={"mine": 1})
    told = read_header("by_command.safetensors").history["conversion"]
    assert {**header.history["conversion"], "cost": None} == {**told, "cost": None}, "no example_input, so no MACs"
    assert header.history["mine"] == 1
    assert read_header("by_python.safetensors") == header
    report = report_of(conversion.model, header, "net")
    assert report.layers[1].energy == conversion.layers[1].energy
    assert report.layers[1].spectrum_uncut


def test_only_measured_stages_are_listed() -> None:
    found = made(small(), 2, {"training": [training(), training()]})
    names = ["uncut", "cut", "calibrated", "fine-tuned", "fine-tuned again (2)"]
    assert [stage.name for stage in found.stages] == names
    assert [stage.top1 for stage in found.stages] == [0.99, 0.5, None, 0.98, 0.98]
    assert found.stages[2].why == "--calibration-images 0"
    assert found.stages[0].top1_interval == pytest.approx((0.98169, 0.99456), abs=1e-4)
    found = made(small(), 2, {"held_out": {"uncut": evaluation(0.9), "converted": evaluation(None)}})
    assert [(stage.name, stage.top1, stage.agreement) for stage in found.stages] == [
        ("uncut", 0.9, None), ("cut", None, 0.75),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "history",
    [
        {"training": 3},
        {"training": [{"stages": [{"name": "x"}]}]},
        {"calibration": {"layers": [{}]}},
        {"conversion": {"layers": [1]}},
        {"conversion": {"layers": {"0": {"energy": "much"}}}},
    ],
)
def test_an_invalid_history_is_reported_in_one_line(history: dict[str, Any]) -> None:
    conversion = convert(small(), 2)
    with pytest.raises(InputError, match="net: the history in its header is invalid"):
        report_of(conversion.model, replace(save(conversion, "net.safetensors"), history=history), "net")


def test_the_report_lists_commands_that_make_the_checkpoint_again() -> None:
    ok("convert", SAMPLE, "--lambda", "3", "-o", "first.safetensors", "--report", "first.json")
    (line,) = json.loads(Path("first.json").read_text())["commands"]
    assert line == f"harmconvert convert {SAMPLE} --lambda 3 -o again-first.safetensors"
    rerun([line])
    assert read_header("again-first.safetensors") == read_header("first.safetensors")
    one, other = (safetensors.torch.load_file(f"{name}.safetensors") for name in ("again-first", "first"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def rerun(lines: list[str]) -> None:
    """Run each line as printed, in the folder of the files from which the report was made."""
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "harmconvert"
        ok(*words)


OWN = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 10, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_the_printed_commands_of_every_step_can_be_run() -> None:
    Path("net.py").write_text(OWN)
    digit_folders(Path("some digits"), 3)
    ok(
        "convert", "net.py:make", "--lambda", "2", "--input-size", "1,12,12", "--mean", "0.13", "--std", "0.3",
        "--calibrate", "some digits", "--calibration-images", "16", "--seed", "3", "--exclude", "3",
        "--allow-fallback", "-o", "made.safetensors", "--json",
    )  # fmt: skip
    tuning = ["--data-dir", "some digits", "--holdout", "0.4", "--workers", "0", "--scale", "0.7", "1", "--trust-code"]
    ok("finetune", "made.safetensors", *tuning, "-b", "6", "--epochs", "1", "--freeze-bn", "-o", "tuned.safetensors")
    ok("report", "tuned.safetensors", "--trust-code", "-o", "tuned.json")
    found, before = json.loads(Path("tuned.json").read_text()), read_header("tuned.safetensors")
    assert len(found["commands"]) == 2
    assert "--data 'some digits'" in found["commands"][0]
    assert "DATA" not in " ".join(found["commands"])
    weights = safetensors.torch.load_file("tuned.safetensors")
    rerun(found["commands"])
    again = read_header("again-tuned.safetensors")
    assert (again.plan, again.preprocessing) == (before.plan, before.preprocessing)
    assert again.history["training"][0]["recipe"] == before.history["training"][0]["recipe"]
    for key, tensor in safetensors.torch.load_file("again-tuned.safetensors").items():
        assert torch.allclose(tensor, weights[key], atol=1e-5), key


def test_a_plan_without_a_lambda_is_read_from_the_checkpoint() -> None:
    Path("net.py").write_text(OWN)
    own = ["convert", "net.py:make", "--input-size", "1,12,12"]
    ok(*own, "--lambda", "2", "-o", "first.safetensors", "--save-plan", "mine.json")
    ok(*own, "--plan", "mine.json", "-o", "net.safetensors", "--report", "net.json")
    Path("mine.json").unlink()
    (line,) = json.loads(Path("net.json").read_text())["commands"]
    assert line == (
        "harmconvert convert net.py:make --plan net.safetensors --input-size 1,12,12 -o again-net.safetensors"
    )
    rerun([line])
    assert read_header("again-net.safetensors").plan == read_header("net.safetensors").plan
    found = made(small(), 2, include=["3"])
    assert "--plan net.safetensors -o again-net.safetensors" in found.commands[0], "no lambda alone gives that"
    long = made(small(), {f"[{'3' * count}]": 2 for count in range(1, 40)})
    assert "--plan net.safetensors" in long.commands[0], "nobody reads a lambda of hundreds of letters"


def test_steps_that_no_command_can_repeat_are_described() -> None:
    history = {"training": [training(scale=[0.5, 1.0], freeze_bn=True, ema=0.9, decay_milestones=[1, 2], hflip=0.5)]}
    found = made(small(), {"2": 1, "3": 2}, history)
    assert found.commands == (f"harmconvert convert {SAMPLE} --lambda 2=1,3=2 -o again-cut.safetensors",)
    options = "--epochs 2 --lr 0.01 --decay-milestones 1,2 --scale 0.5 1.0 --model-ema-decay 0.9 --freeze-bn"
    assert found.command_notes[0] == (
        "again-cut.safetensors was fine-tuned to again-net.safetensors on images that the file does not name: give "
        f"them to harmconvert finetune with --data, and {options}"
    )
    for recipe, words in (({"lr": 0.01}, "--lr 0.01"), ({"distill": 1.0}, "--distill 1.0")):
        whole = {"training": [training(**recipe_named("finetune", **recipe).to_json())]}  # with every field
        assert made(small(), 2, history=whole).command_notes[0].endswith(f"with --data, and {words}")
    for frozen, word in ((True, "--distill 1.0"), (False, "--no-freeze-bn --distill 1.0")):
        history = {"training": [training(distill=1.0, freeze_bn=frozen)]}
        assert made(small(), 2, history=history).command_notes[0].endswith(f"--lr 0.01 {word}")
    calibrated = made(small(), 2, calibration=[torch.randn(40, 1, 16, 16)], settings=CalibrationSettings(0.1, seed=7))
    assert calibrated.commands == (f"harmconvert convert {SAMPLE} --lambda 2 -o again-net.safetensors",)
    assert "calibrated on 40 inputs that the file does not name" in calibrated.command_notes[0]
    assert "--calibration-images 40 --seed 7 --damping 0.1" in calibrated.command_notes[0]
    assert calibrated.command_notes[0] in html.unescape(page(calibrated))


def test_every_option_that_commands_may_name_exists() -> None:
    from dataclasses import fields

    from harmconvert.cli.finetune import command
    from harmconvert.report import OPTION_NAMES
    from harmconvert.training import Recipe

    known = {option for parameter in command.params for option in parameter.opts}
    for field in fields(Recipe):
        if field.name != "name":
            assert f"--{OPTION_NAMES.get(field.name, field.name).replace('_', '-')}" in known, field.name


def test_a_network_trained_from_scratch_has_blocks_and_no_conversion() -> None:
    digit_folders(Path("digits"), 2)
    data = ["--data-dir", "digits", "--workers", "0", "--holdout", "0.5", "-b", "10", "--epochs", "1", "--hflip", "0"]
    ok("train", SAMPLE, "--recipe", "cifar-wrn", *data, "-o", "t.safetensors")
    ok("report", "t.safetensors", "-o", "t.json")
    found = json.loads(Path("t.json").read_text())
    assert {layer["kind"] for layer in found["layers"]} >= {"HarmonicBlock2d"}
    assert [stage["name"] for stage in found["stages"]] == ["trained"]
    (line,) = found["commands"]
    assert line.startswith(f"harmconvert train {SAMPLE} --data-dir digits --holdout 0.5 --recipe cifar-wrn --epochs 1")
    assert read_header("t.safetensors").preprocessing["input_sizes"] == [[1, 28, 28]]
    ok("report", "t.safetensors", "-o", "t.html")
    assert "was trained in harmonic form" in Path("t.html").read_text()


# --- the page ---


class Outline(html.parser.HTMLParser):
    """A parser that collects the tags of a page with their attributes, and the text of each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_the_page_is_valid_html_and_has_every_section() -> None:
    report = rich_report()
    outline = Outline(page(report))
    assert outline.open == []
    assert outline.text["h2"] == [
        "What next?", "Accuracy after each step",
        "Size and cost of each form", "The network, layer by layer", "Frequencies that the layers use",
        "Errors after the cut and after calibration", "Search under a budget", "Training", "The plan",
        "Source of the network",
    ]  # fmt: skip
    assert outline.text["title"] == ["net: what harmconvert did"]
    classes = [attributes.get("class") for _, attributes in outline.tags]
    assert classes.count("heat") == 2, "one for each kernel size"
    assert classes.count("area") == 5, "two of errors, one of the search, two of training"
    assert sum("data-i" in attributes for _, attributes in outline.tags) == 4, "three layers and the rest"
    assert any("99.00 %" in text for text in outline.text["span"])
    assert "20.0 ms " in outline.text["td"]
    assert "± 2 %" in outline.text["span"]
    assert "not measured" in outline.text["td"], "of the factored form"
    (plan,) = (text for text in outline.text["pre"] if text.startswith("{"))
    assert Plan.from_json(json.loads(plan)) == report.plan
    assert plan.count("\n") < 20, "a line for each layer"
    note = next(text for text in outline.text["p"] if "Latency is" in text)
    assert "of 4 examples" in note
    assert "with 2 threads on x86_64 (AVX2, 2 cores), torch 9" in note
    assert "--latency" not in note


def test_empty_sections_are_left_out() -> None:
    headings = Outline(page(made(small(), "full"))).text["h2"]
    assert headings == [
        "What next?",
        "Size and cost of each form", "The network, layer by layer", "Frequencies that the layers use", "The plan",
        "Source of the network",
    ]  # fmt: skip
    assert "nothing is cut" in page(made(small(), "full"))
    assert "the basis is haar" in page(made(small(), 2, basis="haar"))


def test_the_page_makes_no_request_and_runs_only_its_own_script() -> None:
    text = page(rich_report())
    outline = Outline(text)
    for tag, attributes in outline.tags:
        for key in ("src", "href", "action", "srcset", "data", "poster"):
            assert (attributes.get(key) or "data:").startswith("data:"), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for tag, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; img-src data:; ")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    import hashlib

    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


HOSTILE = (
    "<script>window.hit=1</script>", "</script><script>window.hit=1</script>", "<img src=x onerror=window.hit=1>",
    "\"><svg onload='window.hit=1'>", "{{ 7 * 7 }}", "<!--", "]]>", "&lt;b&gt;", "\u202egpj.exe", "a\x00b\x07\n",
    "n" * 300, "漢字",
)  # fmt: skip


def hostile() -> Report:
    """Return a report in which every text from a file is malicious markup."""
    network = nn.Module()
    network.layers = nn.ModuleDict({name.replace(".", "_"): nn.Conv2d(1, 1, 3) for name in HOSTILE})
    conversion = convert(network, 2)
    history: dict[str, Any] = {**conversion.history(), "training": [training()]}
    history["training"][0]["stages"][2]["why"] = HOSTILE[0]
    plan = replace(conversion.plan, policy=HOSTILE[0], notes={"layers." + HOSTILE[0]: HOSTILE[1]})
    source = Source(HOSTILE[0], HOSTILE[1], {HOSTILE[2]: HOSTILE[3]}, HOSTILE[0], HOSTILE[1])
    header = Header(plan, source, {}, history, {HOSTILE[0]: HOSTILE[2]})
    return report_of(conversion.model, header, HOSTILE[0])


def test_names_from_files_are_escaped() -> None:
    text = page(hostile())
    outline = Outline(text)
    assert outline.open == []
    assert [tag for tag, _ in outline.tags].count("script") == 2, "the data and our own"
    assert {tag for tag, _ in outline.tags}.isdisjoint({"iframe", "b<", "object"})
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in outline.tags)  # type: ignore[union-attr]
    assert "&lt;script&gt;window.hit=1&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert "<" not in data
    assert json.loads(data)["layers"][0].startswith("layers.<script>")


def deep(count: int = 1000) -> Report:
    """Return the report of a network of ``count`` layers, a third of them truncated, some with large kernels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 2, 7 if number % 10 == 0 else 3) for number in range(count)]
    return made(nn.Sequential(*layers), {f"{number}": 1 + number % 5 for number in range(0, count, 3)})


def calls_of(run: Callable[[], object]) -> int:
    """Return the number of function calls: a measure of work that does not depend on the load of the machine."""
    profile = cProfile.Profile()
    profile.runcall(run)
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("suffix", [".html", ".json"])
@pytest.mark.slow
def test_a_page_of_a_thousand_layers_is_below_two_megabytes_and_needs_linear_work(suffix: str) -> None:
    report = deep()
    few = calls_of(lambda: write_report(deep(100), Path(f"few{suffix}")))
    assert calls_of(lambda: write_report(report, Path(f"deep{suffix}"))) < 12 * few
    assert Path(f"deep{suffix}").stat().st_size < (2e6 if suffix == ".html" else 4e6)


def test_a_missing_jinja_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    converted("cut.safetensors", "--lambda", "2")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OutsideError, match=r"made by jinja2: pip install 'harmconvert\[report\]'"):
        page(made(small()))
    fails(4, "pip install 'harmconvert[report]'", "report", "cut.safetensors")
    # The error is reported before the work, not after it.
    fails(4, "pip install 'harmconvert[report]'", "convert", SAMPLE, "-o", "b.safetensors", "--report", "b.html")
    ok("report", "cut.safetensors", "-o", "cut.json")


# --- colours, images and axes ---


def test_colours_are_those_of_viridis() -> None:
    for step in range(101):
        exact = [255 * part for part in matplotlib.colormaps["viridis"](step / 100)[:3]]
        assert grid.colour(step / 100) == pytest.approx(exact, abs=7)


def test_images_have_one_pixel_for_each_cell() -> None:
    data = grid.png([bytes([0, 200]), bytes([100, grid.NOTHING])])
    with Image.open(BytesIO(data)) as image:
        pixels = image.convert("RGBA")
        assert pixels.size == (2, 2)
        assert pixels.getpixel((0, 0)) == (*grid.colour(0), 255)
        assert pixels.getpixel((1, 0)) == (*grid.colour(1), 255)
        assert pixels.getpixel((0, 1)) == (*grid.colour(0.5), 255)
        assert pixels.getpixel((1, 1))[3] == 0  # type: ignore[index]


def test_axes_end_at_round_numbers_around_their_values() -> None:
    assert axis("", [0.13, 0.87], zero=True).ticks == (0, 0.25, 0.5, 0.75, 1)
    assert axis("", [3.0, 3.0]).low < 3.0 <= axis("", [3.0, 3.0]).high
    assert axis("", []).high > axis("", []).low
    log = axis("", [1e-30, 0.002, 5.0], log=True)
    assert (log.log, log.low, log.high) == (True, 1e-3, 10)
    assert log.place(0.0) == log.place(1e-30) == 0
    assert log.place(10.0) == 100
    assert [word for _, word in log.words()] == ["0.001", "0.01", "0.1", "1", "10"]
    assert not axis("", [0.0, 0.0], log=True).log
    assert [word for _, word in axis("", [0.07, 0.11]).words()] == ["0.07", "0.08", "0.09", "0.10", "0.11"]
    assert counted("", 1).ticks == (1,)
    assert counted("", 19).ticks[0] == 1
    assert len(counted("", 1000).ticks) <= 8
    assert max(counted("", 1000).ticks) <= 1000


def test_long_names_are_shortened_in_the_middle() -> None:
    assert shortened_name("") == "(root)"
    assert shortened_name("layer4.2.conv2") == "layer4.2.conv2"
    assert len(shortened_name("a" * 300)) == 24
    assert shortened_name("stage1." + "x" * 50 + ".conv2").endswith(".conv2")


# --- the command ---


def test_the_report_is_written_beside_the_checkpoint_and_replaces_no_file() -> None:
    converted("cut.safetensors", "--lambda", "2")
    assert ok("report", "cut.safetensors").stdout.startswith("wrote cut-report.html\n")
    fails(2, "cut-report.html exists: use --force", "report", "cut.safetensors")
    found = json.loads(ok("report", "cut.safetensors", "--force", "--json").stdout)
    ok("report", "cut.safetensors", "-o", "a.json")
    assert found.pop("output") == "cut-report.html"
    assert found == json.loads(Path("a.json").read_text()), "the same data"
    Path("mine.html").write_text("mine")
    fails(2, "mine.html exists", "convert", SAMPLE, "-o", "b.safetensors", "--report", "mine.html")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["report", SAMPLE],
            2,
            "the page needs a harmonic checkpoint, and sample:resnet_mnist5k is",
        ),
        (["report", "cut.safetensors", "-o", "a.pdf"], 2, "a.pdf should end in .html or .json"),
        (["report", "cut.safetensors", "--kernel-size", "3"], 2, "--kernel-size works only with --figure filters"),
        (["report", "cut.safetensors", "--include", "x"], 2, "--include works only with --figure tradeoff"),
        (["report", "cut.safetensors", "--figure", "filters", "--input-size", "1,9,9"], 2, "only without --figure"),
        (["report", "cut.safetensors", "--figure", "layers", "--latency", "1"], 2, "--latency works only without"),
        (["report", "cut.safetensors", "-q", "-v"], 2, "--quiet and --verbose contradict each other"),
        (["compare", "cut.safetensors"], 2, "a comparison needs two checkpoints or more"),
        (
            ["compare", "cut.safetensors", SAMPLE],
            2,
            "sample:resnet_mnist5k is not a harmonic checkpoint: make one first",
        ),
        (["compare", "cut.safetensors", "none.safetensors"], 3, "no such file: none.safetensors does not exist"),
    ],
)
def test_report_and_compare_refuse_invalid_arguments(arguments: list[str], code: int, message: str) -> None:
    converted("cut.safetensors", "--lambda", "2")
    fails(code, message, *arguments)


@pytest.mark.slow
def test_quiet_prints_nothing_and_verbose_prints_seconds() -> None:
    result = ok("convert", SAMPLE, "--lambda", "2", "-o", "a.safetensors", "--quiet")
    assert result.stdout == result.stderr == ""
    assert json.loads(ok("convert", SAMPLE, "-o", "b.safetensors", "-q", "--json").stdout)["output"] == "b.safetensors"
    fails(1, "harmconvert: check failed: cut as planned", "verify", SAMPLE, "a.safetensors", "--quiet")
    lines = ok("convert", SAMPLE, "-o", "c.safetensors", "-v").stderr.splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in lines)
    assert any("stage3.2.conv2" in line for line in lines)


@pytest.mark.slow
def test_fine_tuning_writes_its_report() -> None:
    converted("cut.safetensors", "--lambda", "2")
    digit_folders(Path("digits") / "train", 4)
    digit_folders(Path("digits") / "val", 2, first=4)
    how = ["--hflip", "0", "--crop", "padded", "-b", "10", "--workers", "0", "--epochs", "1"]
    found = ok("finetune", "cut.safetensors", "--data-dir", "digits", *how, "--report", "a.json", "-o", "b.safetensors")
    assert "wrote a.json" in found.stdout.splitlines()
    report = json.loads(Path("a.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["uncut", "cut", "calibrated", "fine-tuned"]
    assert report["layers"][1]["energy"] > 0, "what convert recorded is still there"
    assert report["layers"][1]["output_error_after"] > 0
    assert [run["epochs"][0]["epoch"] for run in report["training"]] == [1]
    assert report["sha256"] is not None


# --- side by side ---


def test_a_comparison_shows_where_checkpoints_differ() -> None:
    converted("a.safetensors", "--lambda", "2")
    converted("b.safetensors", "--lambda", "progressive")
    text = ok("compare", "a.safetensors", "b.safetensors").stdout
    assert re.search(r"^parameters +93.82k \(34.5%\) +119.93k \(44.1%\)$", text, re.MULTILINE)
    assert re.search(r"^stage1.0.conv1 +3/9 +9/9$", text, re.MULTILINE)
    assert "stage3.0.conv1" not in text, "both keep three"
    assert re.search(
        r"^stage3.0.conv1 +3/9 +3/9$",
        ok("compare", "a.safetensors", "b.safetensors", "--all-layers").stdout,
        re.MULTILINE,
    )
    found = json.loads(ok("compare", "a.safetensors", "b.safetensors", "--json").stdout)
    assert [one["share"] for one in found["checkpoints"]] == pytest.approx([93818 / 271994, 119930 / 271994])
    assert found["layers"]["stage2.0.conv1"] == [[3, 9], [6, 9]]
    assert found["notes"] == []


def test_a_comparison_lists_what_cannot_be_compared() -> None:
    one = made(small(), 2, {"training": [training()]})
    other = replace(one, source=Source("timm", "other", {}, "00" * 32), layers=one.layers[:1])
    found = comparison_of([one, other])
    assert found.notes == ("these checkpoints are of different networks",)
    assert found.layers["2"][1] is None
    assert (found.columns[0].top1, found.columns[0].stage) == (0.98, "fine-tuned")
    source = one.source
    assert source is not None
    found = comparison_of([one, replace(one, source=replace(source, sha256="00" * 32))])
    assert found.notes == ("these checkpoints were converted from different weights of the same network",)
    few = replace(one.stages[-1], images=10)
    assert comparison_of([one, replace(one, stages=(few,))]).notes == (
        "the accuracies were measured on different numbers of images",
    )
    with pytest.raises(UsageError, match="two checkpoints or more"):
        comparison_of([one])


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def resnet50() -> Report:
    torch.manual_seed(0)
    return made(timm.create_model("resnet50").eval(), "progressive")


def bytes_of_many(count: int) -> tuple[LayerBytes, ...]:
    """Return layers of every appearance: coded with and without other tensors, not coded at all."""
    layers = [LayerBytes(f"block{n}.conv", 1000 * (n % 3), 300 * (n % 3), 40 * (n % 2) + 4 * (n % 3 == 0))
              for n in range(count)]  # fmt: skip
    return tuple(layers)


def coded(layers: int) -> Report:
    """Return the report of a coded network; ``layers``: the number of layers whose bytes it shows."""
    return replace(made(small(), "full", bits=3), coding=bytes_of_many(layers))


def ranked(layers: int) -> Report:
    """Return a report with this number of layers of low rank; the spectrum of every fifth one is not recorded."""
    spectra = [tuple((1 - step / 16) ** (1 + n % 9) for step in range(17)) if n % 5 else None for n in range(layers)]
    ranks = tuple(LayerRank(f"block{n}.conv", 1 + n % 7, 8, spectrum) for n, spectrum in enumerate(spectra))
    return replace(made(small(), "full"), ranks=ranks)


def sample() -> Report:
    return made(open_source(SAMPLE).model, 2, {"training": [training()]})


SHOWN: dict[str, Callable[[], Report]] = {
    "sample": sample, "everything": rich_report, "ResNet-50": resnet50, "1000 layers": deep, "hostile": hostile,
    "coded": lambda: coded(5), "coded, 300 layers": lambda: coded(300),
    "ranked": lambda: ranked(3), "ranked, 300 layers": lambda: ranked(300),
}  # fmt: skip


SLOW = {"ResNet-50", "coded", "ranked", *(name for name in SHOWN if name.endswith(" layers"))}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SHOWN])
def test_pages_are_readable_in_a_browser(browser: Any, name: str) -> None:
    report = SHOWN[name]()
    path = Path("page.html")
    assert calls_of(lambda: write_report(report, path)) < MOST_CALLS
    assert path.stat().st_size < 2e6
    for width, scheme in ((360, "light"), (1440, "dark")):
        with Visit(browser, path, width, scheme) as visit:
            assert visit.complaints == []
            assert visit.requests == [
                path.resolve().as_uri(),
                *(url for url in visit.requests if url.startswith("data:")),
            ]
            visit.page.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
            assert visit.page.evaluate(UNREADABLE) == []
            assert visit.page.evaluate("window.hit") is None
            tip = visit.hover(".strip i:nth-child(2)")
            assert tip.startswith((report.layers[1].name + "\n")[:20])
            assert "frequencies" in tip
            tip = visit.hover(
                ".heat", 0.01, 0.5 / sum(layer.kernel == report.layers[0].kernel for layer in report.layers)
            )
            assert "frequency (0, 0)" in tip
            assert "% of the layer's largest" in tip
            if report.training or report.search:
                x, y, text = visit.page.evaluate(
                    "JSON.parse(document.getElementById('data').textContent).charts.loss[0]"
                )
                assert visit.hover("[data-chart=loss]", x / 100, y / 100) == text
                assert visit.page.locator(".ring").count() == 1
            if report.coding:
                text = visit.hover("[data-chart=bytes]", 0.5 / len(report.coding), 0.99)
                assert text == "block0.conv\nnot coded: 4 bytes", "bars are found at any height"
            if report.ranks:
                text = visit.hover("[data-chart=ranks]", 0.5 / len(report.ranks), 0.01)
                assert text == "block0.conv\nkeeps rank 1 of 8 (12%)\nspectrum not recorded"
            visit.page.mouse.move(1, 1)
            assert visit.hover("h1") == ""
            assert visit.page.locator(".ring, .cell, .on").count() == 0
            assert visit.complaints == []


@pytest.mark.slow
def test_the_page_has_light_and_dark_colours_and_prints_every_section(browser: Any) -> None:
    write_report(rich_report(), Path("page.html"))
    seen = set()
    for scheme in ("light", "dark"):
        with Visit(browser, Path("page.html"), 800, scheme) as visit:
            seen.add(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))
            visit.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
            assert visit.page.evaluate("[...document.querySelectorAll('details')].every((one) => one.open)")
            visit.page.emulate_media(media="print")
            assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            assert visit.page.pdf(format="A4").startswith(b"%PDF")
    assert len(seen) == 2


@pytest.mark.slow
def test_the_browser_test_detects_words_that_are_cut_off(browser: Any) -> None:
    write_report(made(small()), Path("page.html"))
    with Visit(browser, Path("page.html"), 360) as visit:
        assert visit.page.evaluate(UNREADABLE) == []
        visit.page.evaluate("document.querySelector('h1').style = 'overflow:hidden; width:9px; white-space:nowrap'")
        assert visit.page.evaluate(UNREADABLE) == ["net"]
    with Visit(browser, Path("page.html"), 360) as visit:
        visit.page.evaluate("document.querySelectorAll('.names span').forEach((one) => { one.style.top = '50%'; })")
        assert set(visit.page.evaluate(UNREADABLE)) == {"labels over one another in names"}


if __name__ == "__main__":
    import os
    import tempfile

    os.chdir(tempfile.mkdtemp())
    SNAPSHOT.write_text(json.dumps(snapshot(), indent=1) + "\n")
