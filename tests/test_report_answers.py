"""The first screen of the page: how much smaller, how much worse, how fast, and what next."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from harmconvert.metrics import Measurement
from harmconvert.report import LayerRank, NextStep, Report, page, write_report
from harmconvert.sources import open_source

from .browser import Visit, chromium
from .commands import SAMPLE, converted, ok
from .test_report import OWN, evaluation, made, rerun, resnet50, rich_report, small, training

QUESTIONS = ["How much smaller?", "How much worse?", "How fast?"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inputs() -> torch.Tensor:
    return torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def calibrated() -> Report:
    return made(small(), 2, calibration=[inputs()], example_input=inputs()[:1])


def tuned(before: float | None = 0.99, after: float | None = 0.98) -> Report:
    record = training()
    record["stages"][0]["evaluation"], record["stages"][3]["evaluation"] = evaluation(before), evaluation(after)
    return made(small(), 2, {"training": [record]})


def timed(dense: float, factored: float | None) -> Report:
    report = made(small(), 2)
    seconds = {"dense": dense, "harmonic": 2 * dense, "factored": factored}
    forms = tuple(replace(form, seconds=seconds[form.name], spread=0.02) for form in report.forms)
    return replace(report, forms=forms, timing={"batch": 4, "threads": 2, "machine": {"device": "cpu"}})


def segmented() -> Report:
    stages = tuned().stages
    values = [Measurement("miou", "mIoU", value, (value - 2, value + 2), "%", True, 40, "street") for value in (80, 78)]
    changed = [replace(stage, measurement=value) for stage, value in zip((stages[0], stages[-1]), values, strict=True)]
    return replace(tuned(), stages=tuple(changed))


KINDS: dict[str, Callable[[], Report]] = {
    "plain cut": lambda: made(small(), 2),
    "nothing cut": lambda: made(small(), "full"),
    "calibrated": calibrated,
    "coded": lambda: made(small(), "full", bits=3),
    "low rank": lambda: replace(made(small(), 2), ranks=(LayerRank("0", 1, 2),)),
    "fine-tuned": tuned,
    "segmentation": segmented,
    "timed": lambda: timed(0.02, 0.01),
    "everything": rich_report,
}


def shown(report: Report) -> dict[str, list[str]]:
    """Return the value and the details of each question on the page."""
    text = unescape(page(report))
    items = re.search(r'<ul class="answers">(.*?)</ul>', text, re.DOTALL)
    assert items is not None
    found = [re.findall(r"<span[^>]*>(.*?)</span>", item) for item in items[1].split("</li>") if "span" in item]
    return {question: rest for question, *rest in found}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_screen_answers_four_questions(kind: str) -> None:
    report = KINDS[kind]()
    found = shown(report)
    assert list(found) == QUESTIONS
    assert all(value and details for value, *details in found.values())
    commands = re.findall(r'<li><span>.*?</span><pre class="lines">(.*?)</pre>', page(report))
    assert 1 <= len(commands) == len(report.next_steps) <= 3
    for step, line in zip(report.next_steps, commands, strict=True):
        assert unescape(re.sub("<.*?>", "", line)) == step.command


def test_smaller_compares_the_bytes_of_the_file_with_the_uncut_tensors() -> None:
    report = made(small(), 2)
    written = replace(report, file_bytes=report.form("dense").bytes // 4)
    value, size, *_ = shown(written)["How much smaller?"]
    assert value == "4.0x smaller"
    assert size.startswith("the file: ")
    assert size.endswith(" are the header")
    report = replace(report, file_bytes=report.form("harmonic").bytes)
    value, *details = shown(report)["How much smaller?"]
    assert value == f"{report.form('dense').bytes / report.form('harmonic').bytes:.1f}x smaller"
    assert details[-1] == f"{report.form('harmonic').parameters} of {report.form('dense').parameters} parameters " + (
        f"({100 * report.share:.1f} %)"
    )
    whole = made(small(), "full")
    assert shown(replace(whole, file_bytes=whole.form("dense").bytes))["How much smaller?"][0] == "same size"
    assert "bits per coded weight" in shown(KINDS["coded"]())["How much smaller?"][-1]
    forms = [replace(form, bytes=110 if form.name == "harmonic" else 100) for form in report.forms]
    assert shown(replace(report, forms=tuple(forms), file_bytes=110))["How much smaller?"][0] == "10.0 % larger"


def test_worse_is_the_difference_to_the_uncut_network_with_its_uncertainty() -> None:
    value, *details = shown(tuned())["How much worse?"]
    assert (value, details[0]) == ("1.00 points worse", "top-1 98.00 %, uncut 99.00 %")
    assert details[2] == "95 % interval: 96.93 % to 98.70 %"
    assert shown(tuned(0.985))["How much worse?"][3].endswith("to 98.70 %, which includes the uncut network's")
    assert shown(tuned(0.97))["How much worse?"][0] == "1.00 points better"
    assert shown(tuned(0.98))["How much worse?"][0] == "no difference"
    assert shown(tuned(None))["How much worse?"][0] == "top-1 98.00 %"
    assert shown(tuned(None, None))["How much worse?"][0] == "same class on 75.0 %"
    value, *details = shown(segmented())["How much worse?"]
    assert value == "mIoU 78.00%"
    assert details == [
        "78.00% (95 %: 76.00% to 80.00%), 40 samples of street",
        "uncut: 80.00% (95 %: 78.00% to 82.00%)",
    ]


def test_without_labels_worse_says_what_calibration_measured_or_that_nothing_is_known() -> None:
    value, *details = shown(calibrated())["How much worse?"]
    assert re.fullmatch(r"same class on [\d.]+ %", value)
    assert details[0] == "of the 16 calibration inputs that were held back"
    assert details[1].startswith("without calibration: ")
    value, *details = shown(made(small(), 2))["How much worse?"]
    assert (value, details[0]) == ("not known", "The accuracy was not measured.")
    assert "Calibration reduces its error" in details[1]
    assert shown(made(small(), "full"))["How much worse?"][0] == "not worse"


@pytest.mark.parametrize(
    ("dense", "factored", "value", "detail"),
    [
        (0.02, 0.01, "2.0x as fast", "factored form: 10.0 ms"),
        (0.01, 0.01009, "same speed", "factored form: 10.1 ms, no faster"),
        (0.01, 0.02, "same speed", "factored form: 20.0 ms, slower"),
        (0.01, None, "same speed", "The factored form was not measured."),
    ],
)
def test_fast_is_a_verdict_about_measured_times(dense: float, factored: float | None, value: str, detail: str) -> None:
    found = shown(timed(dense, factored))["How fast?"]
    assert found[0] == value
    assert detail in found
    assert found[-1] == "median of a batch of 4, on this machine"


def test_without_times_fast_shows_the_multiply_adds_and_says_that_no_time_was_measured() -> None:
    found = shown(made(open_source(SAMPLE).model, 2))["How fast?"]
    assert re.fullmatch(r"\d+ % of the multiply-adds", found[0])
    assert "The time was not measured." in found
    assert shown(made(small(), "full"))["How fast?"] == [
        "same speed", "The dense form has the original's layers.", "The time was not measured.",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_words_of_the_page_are_those_of_the_glossary() -> None:
    for kind in KINDS.values():
        Path("net.safetensors").unlink(missing_ok=True)
        text = re.sub(r"<(style|script).*?</\1>|<.*?>", " ", page(kind()), flags=re.DOTALL)
        for word in ("nats", "as uncut", "positions", "plan 2", "(dense"):
            assert word not in text, word


# --- what next ---


def steps(path: str) -> list[str]:
    ok("report", path, "-o", "now.json", "--force", *(["--trust-code"] if "own" in path else []))
    return [step["command"] for step in json.loads(Path("now.json").read_text())["next_steps"]]


@pytest.mark.slow
def test_what_next_for_a_network_without_a_cut_runs_as_printed() -> None:
    converted("whole.safetensors")
    first, _, last = steps("whole.safetensors")
    assert first == "harmconvert convert whole.safetensors --lambda progressive -o whole-progressive.safetensors"
    rerun([first, last])
    assert Path("whole-dense.safetensors").exists()


def test_what_next_for_code_of_the_user_runs_as_printed() -> None:
    Path("net.py").write_text(OWN)
    Path("a folder").mkdir()
    ok("convert", "net.py:make", "--lambda", "2", "--input-size", "1,12,12", "-o", "a folder/own.safetensors")
    lines = steps("a folder/own.safetensors")
    assert [shlex.split(line)[1] for line in lines] == ["verify", "report", "export"]
    assert all("--trust-code" in line for line in lines)
    rerun(lines)
    timed = json.loads(ok("report", "a folder/own.safetensors", "--trust-code", "--latency", "1", "--json").stdout)
    assert timed["timing"] is not None
    assert all("--latency" not in step["command"] for step in timed["next_steps"]), "the time is known"


def test_a_network_of_unknown_size_is_not_run_next() -> None:
    assert [
        step.command for step in made(small(), 2).next_steps if " verify " in step.command or "latency" in step.command
    ] == []


@pytest.mark.slow
def test_what_next_for_a_plain_cut_and_for_a_calibrated_one_runs_as_printed() -> None:
    converted("cut.safetensors", "--lambda", "2")
    lines = steps("cut.safetensors")
    assert lines[0] == (f"harmconvert convert {SAMPLE} --lambda 2 --data sample:mnist5k -o cut-calibrated.safetensors")
    rerun(lines)
    rerun(steps("cut-calibrated.safetensors"))


def test_a_network_with_hardly_any_kernels_over_1x1_is_coded_next() -> None:
    layers = "nn.Conv2d(1, 1, 3), nn.Conv2d(1, 2000, 1)"
    Path("pointwise.py").write_text(f"from torch import nn\ndef make():\n    return nn.Sequential({layers})\n")
    ok("convert", "pointwise.py:make", "--input-size", "1,4,4", "-o", "own.safetensors")
    first = steps("own.safetensors")[0]
    assert first == "harmconvert convert own.safetensors --bits 4 -o own-4bit.safetensors --trust-code"
    rerun([first])


def test_commands_with_hostile_names_are_quoted_and_escaped() -> None:
    step = NextStep("<b>", "harmconvert export '<i>; rm x'")
    assert "<i>;" not in page(replace(made(small(), 2), next_steps=(step,)))


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize("width", [390, 1440])
def test_the_answers_and_the_next_command_are_on_the_first_screen(browser: Any, width: int) -> None:
    for kind in ("calibrated", "fine-tuned", "timed"):
        write_report(KINDS[kind](), Path("page.html"), force=True)
        with Visit(browser, Path("page.html"), width) as visit:
            lowest = visit.page.evaluate("document.querySelector('.next pre').getBoundingClientRect().bottom")
            assert lowest < 900, "of the window"


@pytest.mark.slow
def test_a_mark_of_a_legend_stays_beside_its_words(browser: Any) -> None:
    write_report(rich_report(), Path("page.html"))
    with Visit(browser, Path("page.html"), 390) as visit:
        apart = """[...document.querySelectorAll('.scale .pair, .key li')].filter((one) => {
          const mark = one.querySelector('i').getBoundingClientRect(), range = document.createRange();
          range.selectNodeContents(one.lastChild);
          const words = range.getBoundingClientRect();
          return words.top > mark.bottom || words.bottom < mark.top;
        }).length"""
        assert visit.page.evaluate("document.querySelectorAll('.scale .pair').length") >= 3
        assert visit.page.evaluate(apart) == 0


def test_the_width_of_a_block_shows_its_parameters_and_its_height_what_is_kept(browser: Any) -> None:
    report = made(small(), 2)
    write_report(report, Path("page.html"))
    with Visit(browser, Path("page.html"), 1440) as visit:
        blocks = "[...document.querySelectorAll('.strip i')]"
        widths = visit.page.evaluate(f"{blocks}.map((one) => one.getBoundingClientRect().width)")
        kept = visit.page.evaluate(f"{blocks}.map((one) => one.style.getPropertyValue('--kept'))")
        assert visit.hover(".strip i:last-child") == "all other layers\n12 parameters"
    sizes = [layer.parameters for layer in report.layers]
    assert widths[1] / widths[2] == pytest.approx(sizes[1] / sizes[2], rel=0.05)  # type: ignore[operator]
    assert kept[1] == f"{100 * report.layers[1].share:.1f}%"


@pytest.mark.slow
def test_the_words_of_the_frequency_map_are_beside_it_on_a_wide_screen(browser: Any) -> None:
    write_report(resnet50(), Path("page.html"))
    for width, beside in ((1440, True), (390, False)):
        with Visit(browser, Path("page.html"), width) as visit:
            left, right = visit.page.evaluate(
                "[document.querySelector('.aside').getBoundingClientRect().left, "
                "document.querySelector('.heat').getBoundingClientRect().right]"
            )
            assert (left > right) is beside
