"""Training that is killed, interrupted or resumed from a corrupt state gives equal bits or an error message."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harmconvert.training import read_record

from ..pictures import digit_folders
from .children import Fault, child, command, ended, said
from .tally import Counter, size

pytestmark = pytest.mark.slow  # each test trains a network

SAMPLE = "sample:resnet_mnist5k"
STATE, OUT = "out.state.pth", "out.safetensors"
# Everything with a state: a schedule, the random numbers of mixup, a moving average, augmentation.
RUN = [
    *("finetune", "../cut.safetensors", "--data-dir", "../digits", "--hflip", "0", "--crop", "padded", "-b", "5"),
    *("--workers", "0", "--calibration-images", "0", "--epochs", "3", "--sched", "cosine", "--mixup", "0.3"),
    *("--model-ema-decay", "0.9", "--lr", "0.01", "-o", OUT),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    digit_folders(folder / "digits" / "train", 3)
    digit_folders(folder / "digits" / "val", 1, first=3)
    for lam in ("2", "3"):
        name = "cut.safetensors" if lam == "2" else "other.safetensors"
        assert ended(child(command, folder, "convert", SAMPLE, "--lambda", lam, "-o", name)) == 0, said(folder)
    return folder


@pytest.fixture(scope="module")
def whole(material: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the uninterrupted run."""
    folder = fresh(material, "whole")
    assert ended(child(command, folder, *RUN)) == 0, said(folder)
    return safetensors.torch.load_file(folder / OUT)


def fresh(material: Path, name: str) -> Path:
    folder = material / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def resume(folder: Path) -> list[str]:
    return ["--resume", STATE] if (folder / STATE).exists() else []


def finished(folder: Path, whole: dict[str, torch.Tensor], every: list[str]) -> str | None:
    """Resume a run to its end; return a complaint if the weights differ or files are left over."""
    allowed = {OUT, "out.metrics.csv"}
    if (folder / OUT).exists():  # the run was killed after its output and before the removal of its state
        allowed |= {STATE, f"{STATE}.previous", "out.state.pth.linking", f".{STATE}.lock"}
        allowed |= {path.name for path in folder.glob(f".{OUT}.*.staging")}
    else:
        code = ended(child(command, folder, *RUN, *every, *resume(folder)))
        if code != 0:
            return f"exit code {code}: {said(folder)[-300:]}"
    found = safetensors.torch.load_file(folder / OUT)
    differing = [key for key in whole if not torch.equal(found[key], whole[key])]
    left = set(os.listdir(folder)) - allowed
    return f"other weights: {differing[:3]}" if differing else f"left {left}" if left else None


@pytest.mark.slow
def test_a_run_killed_at_any_step_of_saving_is_resumed_bit_for_bit(
    material: Path, whole: dict[str, torch.Tensor], tally: Counter
) -> None:
    """The run is killed at each access to the file system in turn and then resumed."""
    count = tally("training", "SIGKILL before a step of saving, then --resume: bit-equal")
    for step in range(*size((3, 60, 20), (1, 140, 1))):
        folder, every = fresh(material, "saving"), ["--save-every", "1"]
        ended(child(command, folder, *RUN, *every, fault=Fault(kill_at_step=step)))
        count.trial(finished(folder, whole, every))


@pytest.mark.slow
def test_a_run_killed_several_times_is_resumed_bit_for_bit(
    material: Path, whole: dict[str, torch.Tensor], tally: Counter
) -> None:
    count = tally("training", "SIGKILL at random moments, several in one run, then --resume: bit-equal")
    chance = random.Random(0)
    start = time.monotonic()
    ended(child(command, fresh(material, "clock"), *RUN))
    seconds = time.monotonic() - start
    for _ in range(size(2, 60)):
        folder, every = fresh(material, "again"), ["--save-every", str(chance.choice((1, 2, 3)))]
        for _ in range(chance.randint(1, 3)):
            if (folder / OUT).exists():
                break
            process = child(command, folder, *RUN, *every, *resume(folder))
            process.join(chance.uniform(0.2, 1.0) * seconds)
            process.kill()
            ended(process)
        count.trial(finished(folder, whole, every))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_an_interrupted_run_is_resumed_bit_for_bit(
    material: Path, whole: dict[str, torch.Tensor], tally: Counter, number: signal.Signals, code: int
) -> None:
    count = tally("training", f"{number.name} at random moments, then --resume: bit-equal")
    chance = random.Random(number)
    for _ in range(size(2, 40)):
        folder = fresh(material, "interrupted")
        process = child(command, folder, *RUN, "--save-every", "2")
        while process.exitcode is None and not (folder / STATE).exists():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        process.is_alive() and os.kill(process.pid or 0, number)
        found = ended(process)
        words = f"--resume {STATE}" in said(folder) or found == 0
        complaint = None if found in (0, code) and words else f"exit code {found}: {said(folder)[-300:]}"
        count.trial(complaint or finished(folder, whole, ["--save-every", "2"]))


@pytest.fixture
def stopped(material: Path) -> Path:
    """Return a folder with the state of a killed run and the state before it."""
    folder = fresh(material, "stopped")
    for step in range(20, 80):
        if {STATE, f"{STATE}.previous"} <= set(os.listdir(folder)) and not (folder / OUT).exists():
            break
        folder = fresh(material, "stopped")
        ended(child(command, folder, *RUN, "--save-every", "2", fault=Fault(kill_at_step=step)))
    assert read_record(folder / STATE)
    return folder


@pytest.mark.slow
def test_corrupt_states_are_detected_and_the_state_before_is_used(
    material: Path, stopped: Path, whole: dict[str, torch.Tensor], tally: Counter
) -> None:
    count = tally("training", "newest state cut off or changed by a byte: told, and resumed from the one before")
    good = (stopped / STATE).read_bytes()
    chance = random.Random(0)
    spoilt = [
        b"",
        b"nonsense",
        good[: len(good) // 2],
        good[:-1],
        good[1:],
        b"PK\x03\x04" + b"\0" * 99,
        bytes(len(good)),
    ]
    for _ in range(size(3, 150)):
        content = bytearray(good)
        content[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        spoilt.append(bytes(content))
    for content in spoilt:
        folder = material / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stopped, folder)
        (folder / STATE).write_bytes(content)
        complaint = finished(folder, whole, ["--save-every", "2"])
        told = "warning: " in said(folder) and "resuming from the previous state" in said(folder)
        # A changed byte in the padding between records has no effect.
        count.trial(complaint or (None if told or same_state(stopped / STATE, content) else "not a word"))


def same_state(path: Path, content: bytes) -> bool:
    spoilt = path.with_name("spoilt.pth")
    spoilt.write_bytes(content)
    try:
        one, other = (torch.load(p, weights_only=True)["model"] for p in (path, spoilt))
        return all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    except Exception:
        return False
    finally:
        spoilt.unlink()


def test_two_corrupt_states_are_refused(stopped: Path, tally: Counter) -> None:
    count = tally("training", "both states spoilt: refused, nothing overwritten")
    for name in (STATE, f"{STATE}.previous"):
        (stopped / name).write_bytes((stopped / name).read_bytes()[:1000])
    before = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    code = ended(child(command, stopped, *RUN, "--resume", STATE))
    same = before == {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    count.trial(None if code == 3 and same else f"exit code {code}: {said(stopped)[-300:]}", lost=not same)


def test_the_state_of_another_run_is_refused(material: Path, stopped: Path, tally: Counter) -> None:
    """With other settings, plan, weights or data it is another run, which must not resume this state."""
    count = tally("training", "--resume with other settings, plan, weights or data: refused")
    digit_folders(material / "more" / "train", 2)
    digit_folders(material / "more" / "val", 1, first=3)
    changes = {
        "lr": ["--lr", "0.02"],
        "mixup": ["--mixup", "0.1"],
        "epochs": ["--epochs", "4"],
        "batch": ["-b", "4"],
        "mean": ["--mean", "0.7"],
        "data": ["--data-dir", "../more"],
        "seed": ["--seed", "3"],
        "optimiser": ["--opt", "adamw"],
    }
    for what, change in changes.items():
        code = ended(child(command, stopped, *RUN, *change, "--resume", STATE))
        count.trial(None if code == 2 else f"{what}: exit code {code}: {said(stopped)[-300:]}")
    other = [argument.replace("cut", "other") for argument in RUN]
    code = ended(child(command, stopped, *other, "--resume", STATE))
    count.trial(None if code == 2 else f"plan: exit code {code}: {said(stopped)[-300:]}")
    read_record(stopped / STATE)


def test_a_run_on_a_full_disk_is_resumed_bit_for_bit(
    material: Path, whole: dict[str, torch.Tensor], tally: Counter
) -> None:
    """States do not fit on the disk, then they do: the run continues from the last one that was written."""
    count = tally("training", "no space left for a state, then --resume: bit-equal")
    for limit in size((1000,), (0, 1000, 20_000, 300_000)):
        folder, every = fresh(material, "full"), ["--save-every", "2"]
        code = ended(child(command, folder, *RUN, *every, fault=Fault(largest_file=limit)))
        count.trial(None if code == 4 else f"{limit} bytes: exit code {code}")
        count.trial(finished(folder, whole, every))


def test_weights_that_are_not_finite_are_never_saved(material: Path, tally: Counter) -> None:
    count = tally("training", "a loss that is no number: stopped, exit code 1, nothing of it kept")
    for lr in size(("1e20",), ("1e20", "1e30", "1e10", "1e38")):
        folder = fresh(material, "nan")
        code = ended(child(command, folder, *RUN, "--lr", lr, "--save-every", "1"))
        finite = not (folder / OUT).exists()
        if (folder / STATE).exists():
            state = torch.load(folder / STATE, weights_only=True)["model"]
            finite &= all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())
        words = re.search(r"finite in epoch \d", said(folder))
        count.trial(None if code == 1 and finite and words else f"lr {lr}: exit code {code}: {said(folder)[-300:]}")


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "harmconvert"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_is_resumed(material: Path, tally: Counter) -> None:
    """The other process ends, too; two processes resume the saved state bit for bit."""
    count = tally("training", "SIGKILL to one of two processes at a random moment, then --resume: bit-equal")
    folder, shared = fresh(material, "ranks"), [*RUN, "-b", "6"]  # each process has three images
    process = torchrun(folder, *shared)
    assert process.communicate(timeout=300)[0] is None
    assert process.returncode == 0
    wanted = safetensors.torch.load_file(folder / OUT)
    chance = random.Random(0)
    for turn in range(size(1, 8)):
        folder = fresh(material, "ranks")
        process = torchrun(folder, *shared, "--save-every", "1")
        while process.poll() is None and not (folder / STATE).exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        workers = children_of(process.pid)
        if len(workers) == 2:
            os.kill(workers[turn % 2], signal.SIGKILL)
        process.communicate(timeout=300)
        finished_at_once = (folder / OUT).exists()
        complaint = None if finished_at_once or process.returncode != 0 else "nobody noticed"
        if not finished_at_once:
            again = torchrun(folder, *shared, "--save-every", "1", *resume(folder))
            error = again.communicate(timeout=300)[1].decode()
            if again.returncode:
                complaint = complaint or f"resumed: {error[-300:]}"
        found = safetensors.torch.load_file(folder / OUT) if (folder / OUT).exists() else {}
        same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        count.trial(complaint or (None if same else "other weights"))


def children_of(pid: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return sorted(int(word) for word in text.split())
