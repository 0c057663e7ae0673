"""Commands in processes of their own that fail or die at a chosen moment.

A server that has imported everything forks them, so that each starts in milliseconds.
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
    "encodings.cp437",  # which zipfile wants, where another user may not read it
]  # fmt: skip
# What Python tells of before it touches a file system; a process that is killed at each has been killed between all.
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
    """What befalls a child.

    ``kill_at_step``: SIGKILL before so many touches of files in its folder (from 1); ``largest_file``: bytes after
    which the disk is full; ``user``: whom it runs as; ``umask``; ``environment``: set before it starts.
    """

    kill_at_step: int | None = None
    largest_file: int | None = None
    user: int | None = None
    umask: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def child(work: Callable[..., Any], folder: Path, *arguments: Any, fault: Fault | None = None) -> ForkServerProcess:
    """A started process that runs ``work`` in a folder; what it says goes to the folder's file ``said``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(work, str(folder), arguments, fault or Fault()))
    process.start()
    return process


def ended(process: ForkServerProcess) -> int:
    """The exit code of a child, -9 for one that was killed."""
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("a child did not end within two minutes")
    return process.exitcode


def command(*arguments: str) -> None:
    """Run the command line as the program does."""
    from harmconvert.cli import main

    main(list(arguments))


def said(folder: Path) -> str:
    """What the last child in a folder wrote to stdout and stderr."""
    return (folder.parent / f"{folder.name}.said").read_text()


def _run(work: Callable[..., Any], folder: str, arguments: tuple[Any, ...], fault: Fault) -> None:
    import torch

    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(fault.environment)
    # What is said is a file, too, and would be cut off by the limit on files.
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
    """Ends this process at a step that touches a folder."""

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
