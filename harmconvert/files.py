"""Write a file whole or not at all: staged beside its target, flushed to disk, renamed."""

from __future__ import annotations

import csv
import ctypes
import errno
import itertools
import os
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from .documents import parsed
from .errors import OutsideError, UsageError, shortened

# What this process is writing: targets, each with the number of the writing among those of one target.
_writing: set[tuple[Path, int]] = set()
_lock = threading.Lock()
_held: set[Path] = set()  # locks of `locked`: the system's are a process's, not a thread's


def check_output(path: str | Path, force: bool = False, suffix: str = "") -> Path:
    """The file that writing to ``path`` would replace or make, links followed; call it before long work begins.

    What killed runs left beside it is removed.

    Raises:
        UsageError: it exists and ``force`` is not set; it is a folder, a device, a FIFO or a dangling link; its folder
            does not exist; it does not end in ``suffix``.
        OutsideError: nothing may be written there.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise UsageError(f"{path} is a link to nothing ({os.readlink(path)}): remove it or name another output")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a {_kind(path)}: name a regular file")
    if not path.name.endswith(suffix):
        raise UsageError(f"{path} should end in {suffix}, which is what it will be")
    if path.exists() and not force:
        raise UsageError(f"{path} exists: use --force to replace it, or name another output with -o")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: make it first")
    target = path.resolve()
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise outside(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), f"cannot write {path}")
    with suppress(OSError):  # writing will say so
        _remove_leftovers(target)
    return target


def write_file(path: str | Path, write: Callable[[Path], None], force: bool = False) -> None:
    """Let ``write`` fill a file in a staging folder beside ``path``, then put that in the target's place at once.

    The target is the old file or the whole new one at every moment. A staging folder that a killed process left behind,
    with whatever its writer put there, is removed by the next run.

    Raises:
        UsageError: as `check_output`.
        OutsideError: the disk is full, permission is missing.
    """
    target = check_output(path, force)
    try:
        with _staged(target, "staging") as (folder,):
            folder.mkdir()
            staging = folder / target.name
            staging.touch(exist_ok=False)
            mode = stat.S_IMODE(staging.stat().st_mode)
            write(staging)
            # The writer may have put a private file in the staging file's place: the umask decides, not its habit.
            staging.chmod(mode)
            _flush(staging)
            if force:
                staging.replace(target)
            else:
                _put_where_nothing_is(staging, target)
            _flush(target.parent)
    except OSError as error:
        raise outside(error, f"cannot write {path}") from error


def cache_folder() -> Path:
    """The folder for what can be made again: ``$HARMCONVERT_CACHE``, else harmconvert/ in the user's cache folder.

    Raises:
        OSError: it cannot be made.
    """
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("HARMCONVERT_CACHE") or users / "harmconvert")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def beside(output: str | Path, ending: str) -> Path:
    """The path of what belongs to an output: its name without .safetensors, and an ending."""
    return Path(str(output).removesuffix(".safetensors") + ending)


def state_path(output: str | Path) -> Path:
    """Where the state of the run that makes ``output`` is kept.

    >>> state_path("a/net.safetensors").name
    'net.state.pth'
    """
    return beside(output, ".state.pth")


def metrics_path(output: str | Path) -> Path:
    """Where the figures of the run that makes ``output`` are kept.

    >>> metrics_path("a/net.safetensors").name
    'net.metrics.csv'
    """
    return beside(output, ".metrics.csv")


def default_name(source: str, lam: str) -> str:
    """The file that `harmconvert convert` writes where no other is named: NAME-harmonic-LAMBDA.safetensors.

    >>> default_name("hf-hub:timm/resnet18.a1_in1k", "progressive"), default_name("resnet50", "layer4.*=2")
    ('resnet18.a1_in1k-harmonic-progressive.safetensors', 'resnet50-harmonic-custom.safetensors')
    """
    return f"{short_name(source)}-harmonic-{'custom' if '=' in lam else lam.strip()}.safetensors"


def short_name(source: str) -> str:
    """What a file made from a source is called after.

    >>> short_name("sample:resnet_mnist5k"), short_name("reference:folder/resnet50.pth.tar")
    ('resnet_mnist5k', 'resnet50')
    """
    name = re.sub(r"(\.(safetensors|pth|pt7?|tar))+$", "", source).rstrip("/").replace(":", "/").split("/")[-1]
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "network"


def write_text(path: str | Path, text: str, force: bool = False) -> None:
    """Write a text in UTF-8 as `write_file` does."""
    write_file(path, lambda staging: cast(None, staging.write_text(text, encoding="utf-8")), force)


def read_json(path: str | Path) -> Any:
    """The JSON document in a regular file.

    Raises:
        OSError: it is no regular file (a FIFO would be waited for without end), or cannot be read.
        ValueError: it is not JSON in UTF-8, or as `harmconvert.documents.parsed` says.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return parsed(path.read_text(encoding="utf-8"))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], force: bool = False) -> None:
    """Write rows that share their keys, at least one, as `write_file` does; None is an empty cell."""

    def write(staging: Path) -> None:
        with staging.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_file(path, write, force)


def check_folder(path: str | Path, own: Collection[str], force: bool = False) -> Path:
    """The folder that writing to ``path`` would make or replace; call it before long work begins.

    ``own`` are the names of the files that will be written: a folder that holds anything else is never replaced.

    Raises:
        UsageError: it exists and ``force`` is not set, it is no folder or holds other files, its parent does not exist.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} is there and is no folder: name another output with -o")
    with suppress(OSError):  # writing will say so
        _remove_leftovers(path.resolve())
    if path.exists() and not force:
        raise UsageError(f"{path} exists: use --force to replace it, or name another output with -o")
    if path.exists() and (others := sorted({entry.name for entry in path.iterdir()} - set(own))):
        raise UsageError(
            f"{path} holds other files ({shortened(others, 3)}), which --force would remove: name a new folder"
        )
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: make it first")
    return path.resolve()


def write_folder(path: str | Path, own: Collection[str], fill: Callable[[Path], None], force: bool = False) -> None:
    """Let ``fill`` fill a staging folder beside ``path`` with the files ``own``, then put that in the target's place.

    Raises:
        UsageError: as `check_folder`.
        OutsideError: the disk is full, permission is missing.
    """
    target = check_folder(path, own, force)
    try:
        with _staged(target, "staging", "old") as (staging, old):
            staging.mkdir()
            mode = stat.S_IMODE(staging.stat().st_mode) & 0o666
            fill(staging)
            for file in staging.iterdir():
                file.chmod(mode)
                _flush(file)
            _flush(staging)
            check_folder(path, own, force)  # what has come into being meanwhile is not ours to replace, either
            if not (force and target.exists() and _exchanged(staging, target)):
                if force and target.exists():
                    target.replace(old)
                staging.rename(target)
            _flush(target.parent)
    except OSError as error:
        raise outside(error, f"cannot write {path}") from error


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keep other processes from doing ``what`` meanwhile, by a lock on the file ``path`` that goes with this process,
    however it ends; nothing where the disk knows no locks.

    Raises:
        OutsideError: another process holds the lock.
    """
    path = path.resolve()
    refused = OutsideError(f"another process is {what} (it holds {path}): wait for it, or name another output")
    with _lock:
        if path in _held:
            raise refused
        _held.add(path)
    try:
        descriptor = _lock_on(path, refused)
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)
    finally:
        _held.discard(path)


def _lock_on(path: Path, refused: OutsideError) -> int | None:
    """The descriptor of a locked file; None where the system, or the disk, knows no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise outside(error, f"cannot lock {path}") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise refused from error
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # whoever held it has removed it just now


def outside(error: OSError, what: str) -> OutsideError:
    """An OutsideError that says what the system refused and what may help."""
    remedy = {
        "ENOSPC": "free some space or name another disk",
        "EDQUOT": "free some space or name another disk",
        "EACCES": "check the permissions of the folder",
        "EPERM": "check the permissions of the folder",
        "EROFS": "name a place that can be written",
    }
    name = errno.errorcode.get(error.errno or 0, "")
    return OutsideError(f"{what}: {error.strerror or error}; {remedy.get(name, 'nothing was changed')}")


@contextmanager
def _staged(target: Path, *endings: str) -> Iterator[list[Path]]:
    """Paths beside a target for this writing alone, gone when it is over."""
    with _lock:
        number = next(n for n in itertools.count() if (target, n) not in _writing)
        _writing.add((target, number))
    process = f"{os.getpid()}-{number}" if number else str(os.getpid())
    paths = [target.with_name(f".{target.name}.{process}.{ending}") for ending in endings]
    try:
        yield paths
    finally:
        try:
            for path in reversed(paths):
                _remove(path, target)
        finally:  # the next writer that gets this number has these paths
            _writing.discard((target, number))


def _put_where_nothing_is(staging: Path, target: Path) -> None:
    """Give a staging file its target's name, unless something has that by now (UsageError)."""
    try:
        os.link(staging, target)
        return
    except FileExistsError:
        pass
    except OSError:  # no hard links on this disk: then looking comes before renaming
        if not target.exists():
            staging.replace(target)
            return
    raise UsageError(f"{target} has come into being meanwhile: use --force to replace it")


def _exchanged(staging: Path, target: Path) -> bool:
    """Let two folders change places at one stroke; False where the system has no such call (renameat2, Linux)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(staging), at_cwd, os.fsencode(target), exchange) == 0


def _remove_leftovers(target: Path) -> None:
    pattern = re.compile(re.escape(f".{target.name}.") + r"(\d+)(?:-(\d+))?\.(staging|old)")
    for entry in list(target.parent.iterdir()):
        if match := pattern.fullmatch(entry.name):
            with _lock:  # a thread that begins now may get this number
                if not _in_use(target, int(match[1]), int(match[2] or 0)):
                    _remove(entry, target)


def _remove(path: Path, target: Path) -> None:
    """Remove what was staged; an old folder that nothing has taken the place of is the target, and goes back."""
    if path.suffix == ".old" and path.exists() and not target.exists():
        path.replace(target)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _in_use(target: Path, pid: int, number: int) -> bool:
    """Whether the process that staged something is still at it, as far as can be told."""
    if pid == os.getpid():  # in a container every run has the number of the one that was killed
        return (target, number) in _writing
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")
