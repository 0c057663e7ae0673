"""`finetune`, `evaluate` and `train` on the command line: real files, real processes, every exit code."""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harmconvert.cli.finetune import command as finetune_command
from harmconvert.sources import open_source
from harmconvert.storage import read_header
from harmconvert.training import Recipe, write_metrics

from .commands import SAMPLE, converted, ok, run
from .pictures import digit_folders
from .seams import replace_everywhere

# Digits must not be mirrored; the learning rate is small because the batches are small.
DIGITS = ["--hflip", "0", "--crop", "padded", "-b", "10", "--workers", "0"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a truncated and a whole checkpoint, and held-back digits: 40 for training, 20 for testing."""
    folder = tmp_path_factory.mktemp("material")
    digit_folders(folder / "digits" / "train", 4)
    digit_folders(folder / "digits" / "val", 2, first=4)
    converted(folder / "cut.safetensors", "--lambda", "2")
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").symlink_to(material / "digits")
    shutil.copy(material / "cut.safetensors", tmp_path)


def failed(*arguments: str, code: int) -> str:
    """Return the only line of an error message; the command must end with this exit code."""
    result = run(*arguments)
    assert result.exit_code == code, (result.stderr, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("harmconvert: ")]
    assert "Traceback" not in result.stderr
    return line


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


# --- finetune ---


def test_finetune_prints_the_metric_of_every_stage() -> None:
    result = ok("finetune", "cut.safetensors", "--data-dir", "digits", *DIGITS, "--epochs", "2", "--json")
    found = json.loads(result.stdout)
    stages = {stage["name"]: stage["evaluation"] for stage in found["stages"]}
    assert list(stages) == ["uncut", "before", "calibrated", "fine-tuned"]
    assert stages["uncut"]["top1"] == 1
    assert stages["before"]["top1"] < 0.9
    assert stages["calibrated"]["top1"] > stages["before"]["top1"]
    assert stages["fine-tuned"]["agreement"] >= 0.9
    assert "finetune: 2 epochs, momentum, lr 0.001" in result.stderr
    assert "calibrating on 40 training images, without their labels" in result.stderr
    assert "epoch 2/2: loss" in result.stderr
    # The checkpoint records the training, and its metric is the recorded one.
    assert found["output"] == "cut-finetuned.safetensors"
    header = read_header("cut-finetuned.safetensors")
    assert header.history["training"][0]["recipe"]["epochs"] == 2
    assert header.history["calibration"]["inputs"] == 40
    assert header.calibrated == {}
    assert header.plan == read_header("cut.safetensors").plan
    again = ok("evaluate", "cut-finetuned.safetensors", "--data-dir", "digits", "--compare", SAMPLE, "--json")
    assert json.loads(again.stdout)["top1"] == stages["fine-tuned"]["top1"]
    with Path("cut-finetuned.metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["test_top1"]) == stages["fine-tuned"]["top1"]
    assert not list(Path().glob("*.state.pth*"))


def test_existing_files_are_replaced_only_with_force() -> None:
    quick = ["--data-dir", "digits", *DIGITS, "--epochs", "1", "-o", "a.safetensors"]
    Path("a.metrics.csv").write_text("mine")
    for command in (["finetune", "cut.safetensors"], ["train", SAMPLE]):
        assert "a.metrics.csv exists: use --force" in failed(*command, *quick, code=2)
    assert Path("a.metrics.csv").read_text() == "mine"
    ok("train", SAMPLE, *quick, "--force")
    assert Path("a.metrics.csv").read_text() != "mine"


def meanwhile(path: Path, rows: object) -> None:
    """Replace `write_metrics`: another program writes the file that this run is about to write."""
    Path("a.safetensors").write_bytes(b"another's")


def test_a_file_created_during_the_run_is_kept_and_so_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ["--data-dir", "digits", *DIGITS, "--epochs", "1", "--calibration-images", "0", "-o", "a.safetensors"]
    with monkeypatch.context() as busy:
        replace_everywhere(busy, write_metrics, meanwhile)
        message = failed("finetune", "cut.safetensors", *quick, "--distill", code=2)
    assert "use --force" in message
    assert "the state of the run is saved: go on with --resume a.state.pth" in message
    assert Path("a.safetensors").read_bytes() == b"another's"
    resume = [*quick, "--resume", "a.state.pth", "--force"]
    ok("export", "cut.safetensors", "-o", "dense.safetensors")
    dense = tensors("dense.safetensors")
    safetensors.torch.save_file({key: 1.5 * tensor for key, tensor in dense.items()}, "teacher.safetensors")
    message = failed("finetune", "cut.safetensors", *resume, "--distill", "--teacher", "teacher.safetensors", code=2)
    assert "is the state of another run: its teacher was" in message
    ok("finetune", "cut.safetensors", *resume, "--distill")
    assert read_header("a.safetensors").history["training"]


def test_a_resumed_run_uses_the_network_with_which_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def make(dropped=0.0):\n"
        "    return nn.Sequential(nn.Conv2d(1, 10, 3), nn.Dropout(dropped), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    quick = ["train", "mine.py:make", "--trust-code", "--data-dir", "digits", *DIGITS, "--img-size", "28"]
    quick += ["--epochs", "1", "--harmonic", "none", "-o", "a.safetensors", "--mean", "0.13", "--std", "0.31"]
    with monkeypatch.context() as busy:
        replace_everywhere(busy, write_metrics, meanwhile)
        failed(*quick, "--model-kwargs", "dropped=0.9", code=2)
    message = failed(*quick, "--resume", "a.state.pth", "--force", code=2)
    assert "another run: its arguments's dropped was 0.9, here it is None" in message
    ok(*quick, "--model-kwargs", "dropped=0.9", "--resume", "a.state.pth", "--force")


def test_a_finetuned_checkpoint_can_be_exported_and_finetuned_again() -> None:
    quick = ["--data-dir", "digits", *DIGITS, "--epochs", "1", "--calibration-images", "0"]
    result = ok("finetune", "cut.safetensors", *quick, "-o", "a.safetensors")
    assert "calibrated  not known" in result.stdout
    assert "--calibration-images 0" in result.stdout
    result = ok("finetune", "a.safetensors", *quick, "-o", "b.safetensors")
    assert "calibrated" not in result.stdout  # this run starts from the fine-tuned network
    assert len(read_header("b.safetensors").history["training"]) == 2
    ok("export", "b.safetensors", "-o", "dense.safetensors")
    dense, harmonic = open_source(SAMPLE, weights="dense.safetensors").model, open_source("b.safetensors").model
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(dense(x), harmonic(x), atol=1e-4)


@pytest.mark.slow
def test_a_calibrated_checkpoint_is_compared_with_its_plain_cut() -> None:
    ok("convert", SAMPLE, "--lambda", "2", "--calibrate", "digits/train", "-o", "calibrated.safetensors")
    result = ok("finetune", "calibrated.safetensors", "--data-dir", "digits", *DIGITS, "--epochs", "1", "--json")
    stages = {stage["name"]: stage["evaluation"] for stage in json.loads(result.stdout)["stages"]}
    assert list(stages) == ["uncut", "cut", "before", "fine-tuned"], "before: the file as it was given"
    assert stages["cut"]["top1"] < stages["before"]["top1"]
    assert "calibrating on" not in result.stderr
    assert read_header("calibrated-finetuned.safetensors").calibrated == {}


def test_a_rerun_of_an_interrupted_run_explains_how_to_resume() -> None:
    quick = ["--data-dir", "digits", *DIGITS, "--epochs", "1", "-o", "a.safetensors"]
    Path("a.metrics.csv").write_text("epoch,loss\n")
    Path("a.state.pth").write_bytes(b"")
    for command in (["finetune", "cut.safetensors"], ["train", SAMPLE]):
        message = failed(*command, *quick, code=2)
        assert "a.state.pth is the state of an interrupted run: go on with --resume a.state.pth" in message


@pytest.mark.slow
def test_images_without_labels_are_used_with_the_uncut_network_as_teacher() -> None:
    Path("flat").mkdir()
    for number, path in enumerate(sorted(Path("digits").glob("*/*/*.png"))):
        shutil.copy(path, f"flat/{number}.png")
    result = ok("finetune", "cut.safetensors", "--data-dir", "flat", *DIGITS, "--epochs", "1", "--json")
    assert "have no labels, so the uncut network teaches" in result.stderr
    found = json.loads(result.stdout)
    assert found["recipe"]["distill"] == 1
    assert found["recipe"]["freeze_bn"]
    stages = {stage["name"]: stage["evaluation"] for stage in found["stages"]}
    assert stages["fine-tuned"]["top1"] is None
    assert stages["fine-tuned"]["divergence"] < stages["before"]["divergence"]


def test_finetune_replaces_the_classifier_for_other_classes() -> None:
    three = Path("three")
    for split in ("train", "val"):
        for digit in range(3):
            shutil.copytree(f"digits/{split}/{digit}", three / split / str(digit))
    message = failed("finetune", "cut.safetensors", "--data-dir", "three", *DIGITS, code=3)
    assert "the data has 3 classes, the network 10" in message
    assert "--num-classes 3" in message
    run = ["--data-dir", "three", *DIGITS, "--epochs", "2", "--lr", "0.05", "--num-classes", "3"]
    result = ok("finetune", "cut.safetensors", *run, "-o", "three.safetensors", "--json")
    why = json.loads(result.stdout)["stages"][0]["why"]
    assert why.startswith("the uncut network does not have the new classifier")
    assert open_source("three.safetensors").model(torch.zeros(1, 1, 28, 28)).shape == (1, 3)
    # Fine-tune again: the uncut network has ten classes, so there is nothing to compare with.
    result = ok("finetune", "three.safetensors", *run[:-2], "-o", "again.safetensors", "--json")
    assert json.loads(result.stdout)["stages"][0]["why"] == "the uncut network has 10 classes, this one 3"
    message = failed("finetune", "three.safetensors", *run[:-2], "-o", "x.safetensors", "--teacher", SAMPLE, code=2)
    assert f"--teacher {SAMPLE}: the uncut network has 10 classes, this one 3" in message


def test_labels_are_ignored_if_the_uncut_network_is_the_only_teacher() -> None:
    for split in ("train", "val"):
        for digit in range(10):
            shutil.copytree(f"digits/{split}/{digit}", f"twenty/{split}/{digit}")
            shutil.copytree(f"digits/{split}/{digit}", f"twenty/{split}/{digit + 10}")
    run = ["--data-dir", "twenty", *DIGITS, "--epochs", "1", "--distill", "--calibration-images", "0", "--json"]
    found = json.loads(ok("finetune", "cut.safetensors", *run).stdout)
    assert found["stages"][-1]["evaluation"]["top1"] is None
    assert found["stages"][-1]["evaluation"]["agreement"] > found["stages"][1]["evaluation"]["agreement"]


def test_a_network_trained_from_scratch_has_no_uncut_network() -> None:
    quick = ["--data-dir", "digits", *DIGITS, "--epochs", "1"]
    ok("train", SAMPLE, "--recipe", "cifar-wrn", *quick, "-o", "scratch.safetensors")
    found = json.loads(ok("finetune", "scratch.safetensors", *quick, "--json").stdout)
    assert "so there is no uncut network to compare with" in found["stages"][0]["why"]
    message = failed("finetune", "scratch.safetensors", *quick, "--distill", "-o", "x.safetensors", code=2)
    assert "--distill needs the uncut network" in message


@pytest.mark.slow
def test_the_teacher_may_be_a_file_of_weights() -> None:
    ok("export", SAMPLE, "-o", "uncut.safetensors")
    quick = ["--data-dir", "digits", *DIGITS, "--epochs", "1", "--distill", "0.5"]
    result = ok("finetune", "cut.safetensors", *quick, "--teacher", "uncut.safetensors", "--json")
    assert json.loads(result.stdout)["stages"][0]["evaluation"]["top1"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["cut.safetensors"], 2, "no data is named: give --data DATA"),
        ([SAMPLE, "--data-dir", "digits"], 2, "is not a harmonic checkpoint: make one first with: harmconvert convert"),
        (["cut.safetensors", "--data-dir", "digits", "-o", "cut.safetensors"], 2, "cut.safetensors exists"),
        (["cut.safetensors", "--data-dir", "digits", "--resume", "no.pth"], 3, "no.pth does not exist"),
        (["cut.safetensors", "--data-dir", "digits", "--device", "cuda:99"], 2, "--device cuda:99"),
        (["cut.safetensors", "--data-dir", "digits", "--opt", "magic"], 2, "timm does not accept --opt"),
        (["cut.safetensors", "--data-dir", "digits", "--grad-accum-steps", "3"], 2, "that is a multiple of 3"),
    ],
)
def test_finetune_refuses_invalid_options(arguments: list[str], code: int, message: str) -> None:
    quick = ["--workers", "0", "--calibration-images", "0"]
    assert message in failed("finetune", *arguments, *quick, code=code)


def test_a_diverging_loss_is_a_failed_check() -> None:
    run = ["--data-dir", "digits", *DIGITS, "--lr", "1e20", "--calibration-images", "0"]
    assert "is no longer finite in epoch" in failed("finetune", "cut.safetensors", *run, code=1)
    assert not Path("cut-finetuned.safetensors").exists()


def test_broken_images_are_named_and_the_run_continues() -> None:
    shutil.copytree("digits", "spoilt")
    Path("spoilt/train/3/0.png").write_bytes(b"no picture")
    Path("spoilt/val/3/0.png").write_bytes(b"no picture")
    run = ["--data-dir", "spoilt", *DIGITS, "--epochs", "1", "--calibration-images", "0"]
    result = ok("finetune", "cut.safetensors", *run, "--json")
    assert "1 image could not be read; other images replaced them: spoilt/train/3/0.png" in result.stderr.replace(
        os.getcwd() + "/", ""
    )
    assert json.loads(result.stdout)["stages"][0]["evaluation"]["images"] == 19


# --- stopped and resumed, as processes ---


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "harmconvert", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), text=True, stderr=subprocess.PIPE, env=environment(), start_new_session=True
    )


RUN = ["finetune", "cut.safetensors", "--data-dir", "digits", *DIGITS, "--calibration-images", "0", "--save-every", "1"]


def killed_and_resumed(kills: int, epochs: int, chance: random.Random) -> None:
    whole = subprocess.run(
        command(*RUN, "--epochs", str(epochs), "-o", "whole.safetensors"), capture_output=True, env=environment()
    )
    assert whole.returncode == 0
    arguments = [*RUN, "--epochs", str(epochs), "-o", "parts.safetensors"]
    state = Path("parts.state.pth")
    for _ in range(kills):
        resume = ["--resume", str(state)] if state.exists() else []
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = started(*arguments, *resume)
        while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.communicate()
    if not Path("parts.safetensors").exists():
        resume = ["--resume", str(state)] if state.exists() else []
        done = subprocess.run(command(*arguments, *resume), capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    one, other = tensors("whole.safetensors"), tensors("parts.safetensors")
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    stages = [read_header(f"{name}.safetensors").history["training"][0]["stages"] for name in ("whole", "parts")]
    assert [s["evaluation"]["top1"] for s in stages[0][:2]] == [s["evaluation"]["top1"] for s in stages[1][:2]]
    assert not list(Path().glob("*.staging"))


@pytest.mark.slow
def test_sigkill_does_not_lose_a_saved_state() -> None:
    killed_and_resumed(kills=1, epochs=6, chance=random.Random(0))


@pytest.mark.slow
def test_a_run_survives_sigkill_at_random_moments() -> None:
    killed_and_resumed(kills=12, epochs=20, chance=random.Random(1))


@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        pytest.param(signal.SIGINT, 130, "2", marks=pytest.mark.slow),
        (signal.SIGTERM, 143, "0"),
        pytest.param(signal.SIGINT, 130, "0", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "2", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_its_state_is_saved(number: int, code: int, workers: str) -> None:
    """The signal goes to the whole process group, including workers, as from Ctrl-C and schedulers."""
    process = started(*RUN, "--epochs", "500", "--workers", workers)
    while process.poll() is None and not Path("cut-finetuned.state.pth").exists():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stderr.strip().splitlines()[-1].endswith("go on with the same command and --resume cut-finetuned.state.pth")
    assert "Traceback" not in stderr
    assert torch.load("cut-finetuned.state.pth", weights_only=True)["position"]
    if number == signal.SIGTERM or workers != "0":
        return
    again, resume = [*RUN, "--epochs", "500"], ["--resume", "cut-finetuned.state.pth"]
    message = failed(*again, "--lr", "0.5", *resume, code=2)
    assert "started with lr=0.001, not 0.5: leave it out" in message
    message = failed(*again, code=2)
    assert "is the state of an interrupted run: go on with --resume cut-finetuned.state.pth, or start a" in message
    message = failed(*again, "--mean", "0.9", *resume, code=2)
    assert "is the state of another run: its data's preprocessing's mean was [0.1307]" in message
    ok("convert", SAMPLE, "--lambda", "2", "--calibrate", "digits/train", "-o", "other.safetensors")
    message = failed("finetune", "other.safetensors", *again[2:], *resume, code=2)
    assert "is the state of another run: its weights was" in message
    Path("mine.safetensors").write_bytes(b"of another run")
    assert "mine.safetensors exists" in failed(*again, "-o", "mine.safetensors", *resume, code=2)


# --- several processes ---


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch += ["-m", "harmconvert", *arguments]
    return subprocess.run(launch, capture_output=True, text=True, env=environment(), timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_same_result_as_one() -> None:
    """This covers batch norms, calibration, augmentation, a moving average and an incomplete last test batch."""
    run = ["finetune", "cut.safetensors", "--data-dir", "digits", *DIGITS, "--epochs", "2", "--lr", "0.01"]
    run += ["--model-ema-decay", "0.5", "--json"]
    results = {}
    for processes in (1, 2):
        done = torchrun(processes, *run, "-o", f"{processes}.safetensors")
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = json.loads(done.stdout)
    for one, two in zip(results[1]["stages"], results[2]["stages"], strict=True):
        assert one["evaluation"]["images"] == two["evaluation"]["images"] == 20
        assert one["evaluation"]["top1"] == two["evaluation"]["top1"]
        assert one["evaluation"]["loss"] == pytest.approx(two["evaluation"]["loss"], rel=1e-4)
    for one, two in zip(results[1]["epochs"], results[2]["epochs"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["images"] == two["images"] == 40
    a, b = tensors("1.safetensors"), tensors("2.safetensors")
    for key, tensor in a.items():
        assert torch.allclose(tensor.double(), b[key].double(), rtol=1e-3, atol=1e-5), key


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others() -> None:
    """The second process ends itself silently after the first has saved a state."""
    Path("sitecustomize.py").write_text(
        "import os, threading, time\n"
        "def die():\n"
        "    while not os.path.exists('cut-finetuned.state.pth'):\n"
        "        time.sleep(0.01)\n"
        "    os._exit(9)\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
    )
    os.environ["PYTHONPATH"] = os.getcwd()
    try:
        done = torchrun(2, *RUN, "--epochs", "2000")
    finally:
        del os.environ["PYTHONPATH"]
    assert done.returncode != 0
    assert not Path("cut-finetuned.safetensors").exists()
    assert torch.load("cut-finetuned.state.pth", weights_only=True)["position"]["epoch"] < 2000, "it ended early"


@pytest.mark.slow
def test_a_diverging_loss_ends_every_process() -> None:
    run = ["finetune", "cut.safetensors", "--data-dir", "digits", *DIGITS, "--lr", "1e20", "--calibration-images", "0"]
    done = torchrun(2, *run)
    assert done.returncode != 0
    assert done.stderr.count("harmconvert: error: ") == 2
    assert done.stderr.count("is no longer finite in epoch") >= 2


# --- streams ---


def shard(path: str, folder: Path) -> int:
    """Write a tar file of images and labels in webdataset's format; return the number of images."""
    images = sorted(folder.glob("*/*.png"), key=lambda image: image.stem + image.parent.name)
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(images):
            for suffix, content in (("png", image.read_bytes()), ("cls", image.parent.name.encode())):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return len(images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves shards open
def test_a_webdataset_is_streamed() -> None:
    pytest.importorskip("webdataset")
    train, test = shard("train-0.tar", Path("digits/train")), shard("val-0.tar", Path("digits/val"))
    splits = ["--train-split", f"train-0.tar|{train}", "--val-split", f"val-0.tar|{test}"]
    run = ["--dataset", "wds/", "--data-dir", ".", *splits, *DIGITS, "--epochs", "2", "--json"]
    found = json.loads(ok("finetune", "cut.safetensors", *run).stdout)
    stages = {stage["name"]: stage["evaluation"] for stage in found["stages"]}
    assert stages["uncut"]["images"] == 20
    assert stages["uncut"]["top1"] == 1
    assert stages["fine-tuned"]["top1"] > stages["before"]["top1"]
    assert [row["images"] for row in found["epochs"]] == [40, 40]
    gc.collect()  # here, not in another test


@pytest.mark.slow
def test_two_processes_read_every_image_of_a_webdataset_once(tmp_path: Path) -> None:
    """Each process reads its own shards; calibration uses every image once, and both processes use the same images."""
    pytest.importorskip("webdataset")
    for number, each in enumerate((4, 2)):
        digit_folders(tmp_path / f"part{number}", each, first=4 * number)
    counts = [shard(f"part-{number}.tar", tmp_path / f"part{number}") for number in (0, 1)]
    split = f"part-{{0..1}}.tar|{sum(counts)}"
    run = ["convert", SAMPLE, "--lambda", "2", "--calibrate", "wds/", "--data-dir", ".", "--calibration-split", split]
    done = torchrun(2, *run, "--calibration-images", "40", "-o", "streamed.safetensors", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    calibration = json.loads(done.stdout)["calibration"]
    assert calibration["inputs"] == 40
    assert calibration["refit_divergence"] < calibration["plain_divergence"]


# --- evaluate ---


def test_evaluate_prints_the_accuracy_with_its_confidence_interval() -> None:
    result = ok("evaluate", SAMPLE, "--dataset", "sample:mnist5k")
    assert "top-1 99.40% (95 %: 98.70% to 99.72%), 1,000 images" in result.stdout
    assert "top-5 100.00%" in result.stdout
    assert "images/s" in result.stdout
    found = json.loads(
        ok("evaluate", "cut.safetensors", "--data-dir", "digits/val", "--compare", SAMPLE, "--json").stdout
    )
    assert found["images"] == 20
    assert found["agreement"] < 1
    assert found["preprocessing"]["mean"] == [0.1307]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([SAMPLE], 2, "no data is named"),
        ([SAMPLE, "--data-dir", "nowhere"], 2, "there is no folder nowhere"),
        ([SAMPLE, "--dataset", "sample:mnist5k", "--compare", "nothing"], 2, "timm has no model 'nothing'"),
        (["sample:efficientnet_lite0", "--data-dir", "digits"], 3, "the data has 10 classes, the network 1000"),
    ],
)
def test_evaluate_refuses_invalid_options(arguments: list[str], code: int, message: str) -> None:
    assert message in failed("evaluate", *arguments, "--workers", "0", code=code)


def test_both_networks_may_be_made_by_user_code() -> None:
    code = "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(1, 10, 28), nn.Flatten())\n"
    Path("mine.py").write_text(code)
    ok("convert", "mine.py:make", "--input-size", "1,28,28", "-o", "mine.safetensors")
    arguments = [SAMPLE, "--compare", "mine.safetensors", "--data-dir", "digits/val", "--workers", "0"]
    assert "--trust-code" in failed("evaluate", *arguments, code=2)
    assert 0 <= json.loads(ok("evaluate", *arguments, "--trust-code", "--json").stdout)["agreement"] < 1


# --- train ---


def test_every_setting_of_a_recipe_has_an_option() -> None:
    run = ["--data-dir", "digits", *DIGITS, "--epochs", "3", "--sched", "multistep", "--decay-milestones", "2"]
    run += ["--decay-rate", "0.5", "--lr", "0.01", "--padding", "2", "--calibration-images", "0", "--json"]
    found = json.loads(ok("finetune", "cut.safetensors", *run).stdout)
    assert found["recipe"]["padding"] == 2
    rates = [row["lr"] for row in found["epochs"]]
    assert (rates[0], rates[2]) == pytest.approx((0.01, 0.005))
    options = {parameter.name for parameter in finetune_command.params}
    assert {field.name for field in fields(Recipe)} - {"name"} <= options


def test_a_network_with_one_channel_is_trained_at_another_image_size() -> None:
    run = ["--data-dir", "digits", *DIGITS, "--epochs", "1", "--img-size", "20", "--harmonic", "all"]
    ok("train", SAMPLE, "--recipe", "cifar-wrn", *run, "--lambda", "progressive", "-o", "small.safetensors")
    assert not read_header("small.safetensors").plan.whole


@pytest.mark.slow
def test_two_processes_report_all_unreadable_images_and_the_same_accuracy() -> None:
    shutil.copytree("digits/val", "spoilt")
    for digit in (0, 9):
        Path(f"spoilt/{digit}/0.png").write_bytes(b"no picture")
    run = ["evaluate", SAMPLE, "--data-dir", "spoilt", "-b", "10", "--workers", "0", "--json"]
    one, two = ok(*run), torchrun(2, *run)
    found = [json.loads(result.stdout) for result in (one, two)]
    assert sorted(found[1]["unreadable"]) == sorted(found[0]["unreadable"])
    assert len(found[1]["unreadable"]) == 2
    assert found[1]["images"] == 18
    assert "note:" not in two.stderr


@pytest.mark.parametrize("harmonic", ["none", "first", "all"])
def test_train_trains_a_network_from_scratch(harmonic: str) -> None:
    run = ["--recipe", "cifar-wrn", *DIGITS, "--data-dir", "digits", "--epochs", "2", "--harmonic", harmonic]
    result = ok(
        "train", SAMPLE, *run, "--lambda", "3" if harmonic == "all" else "full", "-o", "net.safetensors", "--json"
    )
    found = json.loads(result.stdout)
    assert found["recipe"]["name"] == "cifar-wrn"
    assert found["epochs"][1]["loss"] < found["epochs"][0]["loss"]
    state = tensors("net.safetensors")
    if harmonic == "none":
        assert state.keys() == tensors(_sample_file()).keys()
        source = [SAMPLE, "--checkpoint", "net.safetensors"]
    else:
        assert state["stem.norm.running_var"].shape == (9,)
        assert ("stage3.0.conv1.coefficients" in state) == (harmonic == "all")
        source = ["net.safetensors"]
    if harmonic == "all":
        assert state["stage3.0.conv1.coefficients"].shape == (64, 32, 6)
    again = json.loads(ok("evaluate", *source, "--data-dir", "digits", "--json").stdout)
    assert again["top1"] == found["evaluation"]["top1"]
    assert again["loss"] == pytest.approx(found["evaluation"]["loss"], rel=1e-4)


def _sample_file() -> Path:
    return Path(__file__).resolve().parents[1] / "harmconvert" / "samples" / "resnet_mnist5k.safetensors"


def test_training_with_the_same_seed_gives_the_same_network() -> None:
    run = ["--recipe", "cifar-wrn", *DIGITS, "--data-dir", "digits", "--epochs", "1", "--harmonic", "all"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        ok("train", SAMPLE, *run, "--seed", seed, "-o", f"{name}.safetensors")
    a, b, c = (tensors(f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert not torch.equal(a["head.weight"], c["head.weight"])
