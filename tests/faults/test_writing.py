"""After full disks, missing permissions, rival writers or SIGKILL, a target is the old file or the complete new one."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from harmconvert import load
from harmconvert.errors import HarmconvertError
from harmconvert.files import write_file, write_folder
from harmconvert.samples import SAMPLES
from harmconvert.storage import read_header
from harmconvert.training import read_record

from ..pictures import digit_folders
from .children import Fault, child, command, ended, said
from .tally import Counter, Tally, size

SAMPLE = "sample:resnet_mnist5k"
OLD = b"what was there before"
ONE_PROCESS = pytest.mark.xdist_group("writing")  # the fast tests, so that the files without faults are written once
NOBODY = 65534


@dataclass(frozen=True)
class Job:
    """A command that writes ``target``; ``others`` are other files that it may leave, if they are complete."""

    arguments: tuple[str, ...]
    target: str
    others: tuple[str, ...] = ()


JOBS = {
    "convert": Job(("convert", SAMPLE, "--lambda", "2", "-o", "out.safetensors", "--force"), "out.safetensors"),
    "finetune": Job(
        (
            *("finetune", "../cut.safetensors", "--data-dir", "../digits", "--hflip", "0", "--crop", "padded"),
            *("-b", "10", "--workers", "0", "--calibration-images", "0", "--epochs", "2", "--save-every", "1"),
            *("-o", "out.safetensors", "--force", "--report", "out.html"),
        ),
        "out.safetensors",
        ("out.state.pth", "out.state.pth.previous", "out.metrics.csv", "out.html"),
    ),
    "export": Job(("export", "../cut.safetensors", "-o", "out.safetensors", "--force"), "out.safetensors"),
    "export a folder": Job(("export", "../cut.safetensors", "--format", "timm", "-o", "out", "--force"), "out"),
    "plan": Job(
        ("convert", SAMPLE, "--lambda", "2", "-o", "c.safetensors", "--force", "--save-plan", "out.json"),
        "out.json",
        ("c.safetensors",),
    ),
    "report": Job(("report", "../cut.safetensors", "-o", "out.html", "--force"), "out.html"),
}  # fmt: skip

SAMPLED = size(("convert", "finetune", "export a folder"), tuple(JOBS))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a truncated checkpoint, a few digits, and the output of each job without any fault."""
    folder = tmp_path_factory.mktemp("writing")
    digit_folders(folder / "digits" / "train", 2)
    digit_folders(folder / "digits" / "val", 1, first=2)
    assert ended(child(command, folder, "convert", SAMPLE, "--lambda", "2", "-o", "cut.safetensors")) == 0, said(folder)
    return folder


class Expected(dict[str, Path]):
    """The target of each job, written without any fault when it is first asked for."""

    def __init__(self, material: Path) -> None:
        self.material = material

    def __missing__(self, name: str) -> Path:
        folder = self.material / f"expected {name}"
        folder.mkdir()
        assert ended(child(command, folder, *JOBS[name].arguments)) == 0, said(folder)
        self[name] = folder / JOBS[name].target
        return self[name]


@pytest.fixture(scope="module")
def expected(material: Path) -> Expected:
    return Expected(material)


def put_old(target: Path) -> None:
    """Write an old target that the job may replace with --force."""
    if "." in target.name:
        target.write_bytes(OLD)
    else:
        target.mkdir()
        (target / "config.json").write_bytes(OLD)


def is_old(target: Path) -> bool:
    content = target / "config.json" if target.is_dir() else target
    return content.exists() and content.read_bytes() == OLD


def is_whole(path: Path, wanted: Path) -> bool:
    """Return whether a target equals what the job writes without any fault, except for recorded times."""
    if path.is_dir():
        return sorted(os.listdir(path)) == sorted(os.listdir(wanted)) and all(
            is_whole(path / name, wanted / name) for name in os.listdir(wanted)
        )
    if path.suffix == ".safetensors":
        try:
            found, known = (safetensors.torch.load_file(one) for one in (path, wanted))
        except Exception:
            return False
        return found.keys() == known.keys() and all(torch.equal(found[key], known[key]) for key in known)
    if path.suffix == ".html":
        return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return path.exists() and len(path.read_bytes()) == len(wanted.read_bytes())


def problem(folder: Path, job: Job, wanted: Path, code: int) -> tuple[str | None, bool]:
    """Return a complaint about a folder after a job ended with this exit code, and whether the target is lost."""
    target = folder / job.target
    if not target.exists() or not (is_old(target) or is_whole(target, wanted)):
        return f"{job.arguments[0]}: {job.target} is neither the old nor the whole new one ({os.listdir(folder)})", True
    if code == 0 and is_old(target):
        return f"{job.arguments[0]}: exit code 0, and the old file is there", False
    staging = re.compile(r"\.(.+)\.\d+(-\d+)?\.(staging|old)|out\.state\.pth\.linking")
    left = {name for name in os.listdir(folder) if name != job.target and name not in job.others}
    if code < 0:  # a lock ends with its process; the next run removes the empty file of the lock
        left.discard(".out.state.pth.lock")
    if code >= 0 and left:
        return f"{job.arguments[0]}: exit code {code} and left {left}", False
    if len(left) > 1 or not all(staging.fullmatch(name) for name in left):
        return f"{job.arguments[0]}: killed, and left {left}", False
    for name in job.others:
        if (folder / name).exists() and not readable(folder / name):
            return f"{job.arguments[0]}: {name} is not whole", True
    return None, False


def readable(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load(path, model=SAMPLES["resnet_mnist5k"].build())
        elif path.suffix in (".pth", ".previous"):
            read_record(path)
        elif path.suffix == ".html":
            return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
        else:
            return path.read_bytes().endswith(b"\n")
    except (HarmconvertError, UserWarning):
        return False
    return True


def cleaned(folder: Path, job: Job) -> str | None:
    """Return a complaint if the next writer of the target does not remove the leftovers of a killed one."""
    target = folder / job.target
    if target.is_dir():
        write_folder(
            target, os.listdir(target), lambda staging: shutil.copytree(target, staging, dirs_exist_ok=True), True
        )
    else:
        write_file(target, lambda staging: shutil.copy(target, staging) and None, force=True)
    left = [name for name in os.listdir(folder) if name.endswith((".staging", ".old")) and f".{job.target}." in name]
    return f"{left} is still there after the next run" if left else None


def outcome(count: Tally, folder: Path, job: Job, wanted: Path, code: int) -> None:
    found, lost = problem(folder, job, wanted, code)
    count.trial(found or cleaned(folder, job), lost=lost)


def fresh(material: Path, name: str) -> Path:
    folder = material / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.slow
def test_a_command_killed_at_any_step_leaves_a_complete_target(
    material: Path, expected: Expected, tally: Counter, name: str
) -> None:
    """The command is killed before each access to a file in its folder in turn, until it completes."""
    count = tally("writing", f"SIGKILL before every step of the file system: {name}")
    job, folder = JOBS[name], material / f"steps {name}"
    step = 1
    while True:
        put_old(fresh(material, folder.name) / job.target)
        code = ended(child(command, folder, *job.arguments, fault=Fault(kill_at_step=step)))
        outcome(count, folder, job, expected[name], code)
        if code != -9:
            assert code == 0, said(folder)
            break
        step += size(4, 1)
    assert step > 4


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.slow
def test_a_command_killed_at_a_random_moment_leaves_a_complete_target(
    material: Path, expected: Expected, tally: Counter, name: str
) -> None:
    count = tally("writing", f"SIGKILL at random moments: {name}")
    job, folder = JOBS[name], material / f"moments {name}"
    start = time.monotonic()
    put_old(fresh(material, folder.name) / job.target)
    assert ended(child(command, folder, *job.arguments)) == 0
    whole = time.monotonic() - start
    chance = random.Random(name)
    for _ in range(size(3, 100 if name in ("convert", "finetune", "export") else 30)):
        put_old(fresh(material, folder.name) / job.target)
        process = child(command, folder, *job.arguments)
        process.join(chance.uniform(0, 1.1 * whole))
        process.kill()
        outcome(count, folder, job, expected[name], ended(process))


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.slow
def test_a_full_disk_leaves_a_complete_target(material: Path, expected: Expected, tally: Counter, name: str) -> None:
    """Files are limited to 0 bytes, a part of the header, a part of the tensors, or all except one byte."""
    count = tally("writing", f"no space left (RLIMIT_FSIZE): {name}")
    job, folder = JOBS[name], material / f"full {name}"
    files = sorted(expected[name].iterdir()) if expected[name].is_dir() else [expected[name]]
    whole = max(file.stat().st_size for file in files)
    for limit in size((0, 100, whole - 1), (0, 1, 7, 8, 9, 100, 4096, whole // 2, whole - 4097, whole - 1)):
        put_old(fresh(material, folder.name) / job.target)
        code = ended(child(command, folder, *job.arguments, fault=Fault(largest_file=max(limit, 0))))
        found, lost = problem(folder, job, expected[name], code)
        if code != 4 and not (code == 0 and name == "finetune"):
            found = found or f"{limit} bytes: exit code {code}"
        elif not is_old(folder / job.target) and code != 0 and name != "plan":  # the plan is written before the network
            found = found or f"{limit} bytes: the old file is gone"
        count.trial(found, lost=lost)


@ONE_PROCESS
def test_a_small_disk_leaves_a_complete_target(
    material: Path, expected: Expected, tmp_path: Path, tally: Counter
) -> None:
    count = tally("writing", "no space left (a small tmpfs)")
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    ):
        count.trial()  # counts the attempt only
        pytest.skip("no right to mount a tmpfs here")
    try:
        for name in ("convert", "export", "export a folder"):
            job, folder = JOBS[name], tmp_path / name
            folder.mkdir()
            put_old(folder / job.target)
            arguments = [a.replace("../cut", str(material / "cut")) for a in job.arguments]
            process = child(command, folder, *arguments)
            code = ended(process)
            found, lost = problem(folder, job, expected[name], code)
            count.trial(found or (None if code == 4 and is_old(folder / job.target) else f"{name}: {code}"), lost=lost)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """Yield a folder that other users can access."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@ONE_PROCESS
def test_missing_permissions_are_reported(material: Path, everybodys: Path, expected: Expected, tally: Counter) -> None:
    count = tally("writing", "folders that may not be written")
    user = NOBODY if os.geteuid() == 0 else None
    shutil.copy(material / "cut.safetensors", everybodys)
    for name in ("convert", "export", "export a folder", "plan"):
        job, folder = JOBS[name], everybodys / name
        folder.mkdir()
        put_old(folder / job.target)
        (everybodys / f"{name}.said").write_text("")
        folder.chmod(0o555)
        cache = {"HARMCONVERT_CACHE": str(everybodys / "none")}
        code = ended(child(command, folder, *job.arguments, fault=Fault(user=user, environment=cache)))
        found, lost = problem(folder, job, expected[name], code)
        words = "check the permissions of the folder"
        fine = code == 4 and is_old(folder / job.target) and words in said(folder)
        count.trial(found or (None if fine else f"{name}: {code}: {said(folder)[-300:]}"), lost=lost)
        folder.chmod(0o755)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket must be short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


NO_FILES: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo,
    "a link to a device": make_device,
    "a socket": make_socket,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder with files": lambda path: (path.mkdir(), (path / "mine").write_bytes(OLD)),
}


@pytest.mark.parametrize("name", JOBS)
def test_targets_that_are_not_regular_files_are_refused(material: Path, tally: Counter, name: str) -> None:
    count = tally("writing", "targets that are FIFOs, devices, sockets, folders, links to nothing, despite --force")
    job = JOBS[name]
    for what, make in NO_FILES.items():
        folder = fresh(material, "no file")
        target = folder / job.target
        make(target)
        before = os.lstat(target)
        code = ended(child(command, folder, *job.arguments))
        after = os.lstat(target)
        same = (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode) and os.listdir(folder) == [job.target]
        fine = code == 2 and same and (not target.is_dir() or os.listdir(target) == ["mine"])
        count.trial(None if fine else f"{name}, {what}: exit code {code}, {os.listdir(folder)}, {said(folder)[-300:]}")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.slow
def test_several_writers_of_one_target_leave_a_complete_target(material: Path, tally: Counter) -> None:
    """With --force the last writer wins; without it the first one wins, and the others report an error."""
    count = tally("writing", "several processes that write one target")
    results = {}
    for lam in ("1", "2", "3", "full"):
        path = material / f"rival {lam}.safetensors"
        assert ended(child(command, material, "convert", SAMPLE, "--lambda", lam, "-o", path.name)) == 0, said(material)
        results[lam] = path
    for turn in range(size(1, 30)):
        for force in ([], ["--force"]):
            folder = fresh(material, "rivals")
            processes = [
                child(command, folder, "convert", SAMPLE, "--lambda", lam, "-o", "out.safetensors", *force)
                for lam in results
            ]
            codes = sorted(ended(process) for process in processes)
            whole = any(is_whole(folder / "out.safetensors", path) for path in results.values())
            fine = codes == ([0] * 4 if force else [0, 2, 2, 2]) and os.listdir(folder) == ["out.safetensors"]
            count.trial(None if fine else f"turn {turn}: {codes}, {os.listdir(folder)}", lost=not whole)


@pytest.mark.parametrize("mask", size((0o027,), (0o000, 0o022, 0o027, 0o077)))
@pytest.mark.slow
def test_the_permissions_of_outputs_follow_the_umask(material: Path, tally: Counter, mask: int) -> None:
    count = tally("writing", "files and folders under a umask of 000, 022, 027, 077")
    for name in ("convert", "export", "export a folder", "plan", "report"):
        job, folder = JOBS[name], fresh(material, "umask")
        assert ended(child(command, folder, *job.arguments, fault=Fault(umask=mask))) == 0, said(folder)
        target = folder / job.target
        files = [*target.iterdir()] if target.is_dir() else [target]
        modes = {stat.S_IMODE(file.stat().st_mode) for file in files}
        count.trial(None if modes == {0o666 & ~mask} else f"{name}: {[oct(mode) for mode in modes]} under {mask:03o}")
        if target.is_dir():
            count.trial(
                None if stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask else f"the folder under {mask:03o}"
            )


@pytest.mark.slow
def test_a_link_is_followed_to_its_target(material: Path, tally: Counter) -> None:
    count = tally("writing", "targets that are links to a file: the file is replaced, the link stays")
    for name in ("convert", "export", "plan", "report"):
        job, folder = JOBS[name], fresh(material, "linked")
        (folder / "real").mkdir()
        put_old(folder / "real" / job.target)
        (folder / job.target).symlink_to(f"real/{job.target}")
        code = ended(child(command, folder, *job.arguments))
        fine = code == 0 and (folder / job.target).is_symlink() and not is_old(folder / job.target)
        count.trial(None if fine and os.listdir(folder / "real") == [job.target] else f"{name}: {code}")


def test_complete_targets_have_a_readable_header(material: Path) -> None:
    """The files that these tests call complete have a readable header."""
    assert read_header(material / "cut.safetensors").plan.layers
