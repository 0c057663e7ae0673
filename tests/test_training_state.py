"""The state of a run: it is resumed bit for bit, written atomically, and refused if it belongs to another run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from harmconvert.errors import InputError, OutsideError, UsageError
from harmconvert.files import state_path
from harmconvert.network import gathered, sum_over_ranks
from harmconvert.training import (
    Callbacks,
    Position,
    Recipe,
    SignalError,
    StateFile,
    StepProgress,
    StopRequest,
    Trainer,
    state,
    train,
)

from .seams import replace_everywhere
from .test_training import PLAIN, noise, small

# Everything that has state: momentum, a schedule, a moving average, the random numbers of mixup and dropout.
RECIPE = Recipe(epochs=3, batch_size=8, lr=0.05, sched="cosine", ema=0.9, mixup=0.3)


class KilledError(Exception):
    """Simulates SIGKILL: the run ends without cleaning up."""


def train_until(epoch: int, step: int, model: nn.Module, state_file: StateFile) -> None:
    """Train, and interrupt the run at this step."""

    def progress(at: StepProgress) -> None:
        if (at.epoch, at.step) == (epoch, step):
            raise KilledError

    callbacks = Callbacks(progress=progress)
    with pytest.raises(KilledError):
        train(model, noise(), RECIPE, machine=PLAIN, state_file=state_file, callbacks=callbacks)


def uninterrupted() -> dict[str, Tensor]:
    model = small(dropout=0.3)
    train(model, noise(), RECIPE, machine=PLAIN)
    return model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize(
    ("epoch", "step", "every"),
    [(0, 2, 1), (0, 4, 1), (0, 4, 3), *((*at, every) for at in [(1, 1), (1, 3), (2, 4)] for every in (1, 3, None))],
)
def test_a_resumed_run_equals_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, epoch: int, step: int, every: int | None
) -> None:
    path = tmp_path / "run.state.pth"
    state_file = StateFile(path, every, {"recipe": RECIPE.to_json()})
    train_until(epoch, step, small(dropout=0.3), state_file)
    torch.manual_seed(12345)  # any other random state before the resume
    model = small(dropout=0.3)
    rows = train(model, noise(), RECIPE, machine=PLAIN, state_file=replace(state_file, resume=True))
    assert same(model.state_dict(), uninterrupted())
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_the_metrics_of_an_interrupted_epoch_cover_the_whole_epoch(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "run.state.pth", 1)
    train_until(1, 3, small(), state_file)
    resumed = train(small(), noise(), RECIPE, machine=PLAIN, state_file=replace(state_file, resume=True))
    whole = train(small(), noise(), RECIPE, machine=PLAIN)
    for row, expected in zip(resumed, whole, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}


def test_if_the_state_is_corrupt_the_state_before_it_is_used_with_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    state_file = StateFile(tmp_path / "run.state.pth", 1, say=said.append)
    train_until(1, 3, small(dropout=0.3), state_file)
    content = state_file.path.read_bytes()
    state_file.path.write_bytes(content[: len(content) // 2])
    model = small(dropout=0.3)
    train(model, noise(), RECIPE, machine=PLAIN, state_file=replace(state_file, resume=True))
    assert same(model.state_dict(), uninterrupted())
    assert "run.state.pth is damaged" in said[0]
    assert "resuming from the previous state" in said[0]


def test_a_failed_save_keeps_the_state_before_a_corrupt_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(whole: object, staging: Path) -> None:
        raise OutsideError("the disk is full")

    state_file = StateFile(tmp_path / "run.state.pth")
    state_file.save(Position(1), lambda: {"model": {}})
    state_file.save(Position(2), lambda: {"model": {}})
    state_file.path.write_bytes(state_file.path.read_bytes()[:-200])
    assert state_file.load()[0].epoch == 1
    with monkeypatch.context() as broken:
        broken.setattr(state, "_save", full)
        with pytest.raises(OutsideError):
            state_file.save(Position(2), lambda: {"model": {}})
    assert state_file.load()[0].epoch == 1
    state_file.save(Position(2), lambda: {"model": {}})
    state_file.save(Position(3), lambda: {"model": {}})
    state_file.path.write_bytes(b"")
    assert state_file.load()[0].epoch == 2


def test_a_state_of_another_number_of_processes_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    state_file = StateFile(tmp_path / "run.state.pth", say=said.append)
    replace_everywhere(monkeypatch, gathered, lambda value: [value] * 4)
    state_file.save(Position(1), lambda: {"model": {}})
    state_file.load()
    assert "was written by 4 processes, so random numbers will differ" in said[0]


def test_if_processes_receive_different_signals_all_of_them_handle_the_same_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process gets SIGINT and another SIGTERM: all processes handle SIGTERM."""
    ours = SimpleNamespace(sums=torch.ones(3, dtype=torch.float64))

    def as_if_two(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor += torch.tensor([1.0, 1, 1, 0, 1])

    replace_everywhere(monkeypatch, sum_over_ranks, as_if_two)
    request = StopRequest()
    request.signal = signal.SIGINT
    assert Trainer.read_sums(ours, request) == ((2, 2, 2), signal.SIGTERM)
    replace_everywhere(monkeypatch, as_if_two, lambda tensors: None)
    assert Trainer.read_sums(ours, request)[1] == signal.SIGINT
    assert Trainer.read_sums(ours, StopRequest())[1] == 0


def test_a_corrupt_state_without_an_earlier_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.state.pth"
    for content, message in [(b"", "is empty"), (b"nonsense", "not a readable training state")]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            train(small(), noise(), RECIPE, machine=PLAIN, state_file=StateFile(path, resume=True))


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.state.pth"
    train(
        small(),
        noise(),
        RECIPE,
        machine=PLAIN,
        state_file=StateFile(path, 1, {"recipe": RECIPE.to_json(), "data": [4]}),
    )
    other = StateFile(path, 1, {"recipe": replace(RECIPE, lr=1.0).to_json(), "data": [4]})
    with pytest.raises(UsageError, match=r"another run: its recipe's lr was 0\.05, here it is 1\.0"):
        train(small(), noise(), RECIPE, machine=PLAIN, state_file=replace(other, resume=True))
    other = StateFile(path, 1, {"recipe": RECIPE.to_json(), "data": [5]})
    with pytest.raises(UsageError, match=r"another run: its data was \[4\], here it is \[5\]"):
        train(small(), noise(), RECIPE, machine=PLAIN, state_file=replace(other, resume=True))


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "run.state.pth"
    torch.save({"version": 1, "trap": Trap()}, path)
    with pytest.raises(InputError, match="not a readable training state"):
        train(small(), noise(), RECIPE, machine=PLAIN, state_file=StateFile(path, resume=True))
    assert not (tmp_path / "sprung").exists()


def test_a_full_disk_does_not_change_the_last_state(tmp_path: Path) -> None:
    import resource

    state_file = StateFile(tmp_path / "run.state.pth", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    content = b""

    def fill_up(at: StepProgress) -> None:
        nonlocal content
        if at.step == 2:
            content = state_file.path.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        with pytest.raises(OutsideError, match=r"cannot (save the training state|write .*run.state.pth)"):
            train(small(), noise(), RECIPE, machine=PLAIN, state_file=state_file, callbacks=Callbacks(progress=fill_up))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert content
    assert state_file.path.read_bytes() == content
    assert not list(tmp_path.glob("*.staging"))
    model = small()
    train(model, noise(), RECIPE, machine=PLAIN, state_file=replace(state_file, resume=True))
    whole = small()
    train(whole, noise(), RECIPE, machine=PLAIN)
    assert same(model.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_explains_how_to_resume(tmp_path: Path, number: int, code: int) -> None:
    state_file = StateFile(tmp_path / "run.state.pth")
    handler = signal.getsignal(number)

    def interrupt(at: StepProgress) -> None:
        if (at.epoch, at.step) == (1, 2):
            os.kill(os.getpid(), number)

    with pytest.raises(SignalError, match=r"after 1 epoch and 3 steps; go on with .* resume=.*state.pth") as caught:
        train(
            small(dropout=0.3),
            noise(),
            RECIPE,
            machine=PLAIN,
            state_file=state_file,
            callbacks=Callbacks(progress=interrupt),
        )
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == handler
    model = small(dropout=0.3)
    train(model, noise(), RECIPE, machine=PLAIN, state_file=replace(state_file, resume=True))
    assert same(model.state_dict(), uninterrupted())


@pytest.mark.slow
def test_two_runs_do_not_share_a_state(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "run.state.pth", 1)
    other = (
        "from pathlib import Path\nfrom harmconvert.errors import OutsideError\n"
        "from harmconvert.training import StateFile\n"
        f"try:\n    with StateFile(Path({str(state_file.path)!r})).lock(): print('alone')\n"
        "except OutsideError as error: print(error)\n"
    )

    def tried() -> str:
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout

    with state_file.lock():
        assert "another process is training with" in tried()
        with pytest.raises(OutsideError, match="another process is training with"), state_file.lock():
            pass
        assert "another process is training with" in tried()
    assert tried() == "alone\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".run.state.pth.lock").touch()  # the lock file of a run that was killed
    with state_file.lock():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_leaves_no_state(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "run.state.pth", 1)
    train(small(), noise(), RECIPE, machine=PLAIN, state_file=state_file)
    assert {path.name for path in tmp_path.iterdir()} == {"run.state.pth", "run.state.pth.previous"}
    state_file.remove()
    assert not list(tmp_path.iterdir())


def test_the_path_of_the_state_follows_the_output() -> None:
    assert len({state_path(name) for name in ("net.a", "net.b", "net.safetensors")}) == 3
    assert state_path("x/net-finetuned.safetensors") == Path("x/net-finetuned.state.pth")
