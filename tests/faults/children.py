"""Commands in child processes that fail or are killed at a chosen moment.

They are forked from a server process that has imported everything, so each starts within milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch", "timm", "torchvision", "harmconvert.cli.convert", "harmconvert.cli.finetune", "harmconvert.cli.export",
    "harmconvert.sources.opening", "harmconvert.pipeline.finetuning", "harmconvert.report.page",
    "harmconvert.data.loading", "tests.faults.children",
    "encodings.cp437",  # zipfile imports it, but another user may lack the permission to read it
]  # fmt: skip
# The audit events of Python before each change of a file system. Killing a process at each of them covers all moments
# between two changes.
STEPS = {
    "open",
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
}


@dataclass(frozen=True)
class Fault:
    """A fault for a child process.

    ``kill_at_step``: SIGKILL before this access to a file in its folder (counted from 1). ``largest_file``: the number
    of bytes after which the disk is full. ``user``: the user who runs the process. ``environment``: variables that are
    set before it starts.
    """

    kill_at_step: int | None = None
    largest_file: int | None = None
    user: int | None = None
    umask: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def child(work: Callable[..., Any], folder: Path, *arguments: Any, fault: Fault | None = None) -> ForkServerProcess:
    """Start a process that runs ``work`` in a folder; its output goes to the file ``said`` of the folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(work, str(folder), arguments, fault or Fault()))
    process.start()
    return process


def ended(process: ForkServerProcess) -> int:
    """Wait for a child process; return its exit code, or -9 if it was killed."""
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("a child did not end within two minutes")
    return process.exitcode


def command(*arguments: str) -> None:
    """Run the command line like the program."""
    from harmconvert.cli import main

    main(list(arguments))


def said(folder: Path) -> str:
    """Return what the last child process in a folder wrote to stdout and stderr."""
    return (folder.parent / f"{folder.name}.said").read_text()


def _run(work: Callable[..., Any], folder: str, arguments: tuple[Any, ...], fault: Fault) -> None:
    import torch

    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(fault.environment)
    # The output is a file, too, so the limit on the size of files would truncate it.
    output = os.open(
        os.devnull if fault.largest_file is not None else f"{folder}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    )
    os.dup2(output, 1)
    os.dup2(output, 2)
    if fault.umask is not None:
        os.umask(fault.umask)
    if fault.largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file, resource.RLIM_INFINITY))
    if fault.kill_at_step is not None:
        sys.addaudithook(_Killer(folder, fault.kill_at_step))
    if fault.user is not None:
        os.setgroups([])
        os.setgid(fault.user)
        os.setuid(fault.user)
    work(*arguments)


class _Killer:
    """Kills this process at a given access to a folder."""

    def __init__(self, folder: str, step: int) -> None:
        self.folder, self.left = os.path.realpath(folder), step

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.path.realpath(os.fsdecode(arguments[0])).startswith(self.folder + os.sep):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
