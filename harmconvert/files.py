"""Write files atomically: write a temporary file beside the target, flush it to disk, then rename it."""

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

from .documents import parse_json
from .errors import Argument, OutsideError, UsageError, shortened

# Targets that this process is writing. The number tells apart several threads that write the same target.
_writing: set[tuple[Path, int]] = set()
_thread_lock = threading.Lock()
_locked_paths: set[Path] = set()  # needed by `locked`: a lock of the system excludes processes, not threads


def check_output(path: str | Path, force: bool = False, suffix: str = "") -> Path:
    """Check that a file can be written to ``path`` and return its real path, with links resolved.

    Call this before long work begins. Temporary files of killed runs beside the target are removed.

    Raises:
        UsageError: the file exists and ``force`` is not set; it is a folder, a device, a FIFO or a dangling link; its
            folder does not exist; its name does not end in ``suffix``.
        OutsideError: there is no permission to write in the folder.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise UsageError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: remove the link or name another output"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a {_file_kind(path)}: name a regular file")
    if not path.name.endswith(suffix):
        raise UsageError(f"{path} should end in {suffix}, the suffix of this format: rename the output")
    if path.exists() and not force:
        raise _exists(path)
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: make it first")
    target = path.resolve()
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise outside_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), f"cannot write {path}")
    with suppress(OSError):  # if the folder has a problem, writing reports it
        _remove_leftovers(target)
    return target


def _exists(path: Path) -> UsageError:
    force, output = Argument("force", True), Argument("output")
    return UsageError(f"{path} exists: use ", force, " to replace it, or name another ", output)


def write_file(path: str | Path, write: Callable[[Path], None], force: bool = False) -> None:
    """Call ``write`` with a path in a temporary folder beside ``path``, then move the new file to ``path`` atomically.

    At every moment ``path`` is either the old file or the complete new one. If the process is killed, the next run
    removes the temporary folder.

    Raises:
        UsageError: see `check_output`.
        OutsideError: the disk is full or a permission is missing.
    """
    target = check_output(path, force)
    try:
        with _staged(target, "staging") as (folder,):
            folder.mkdir()
            staging = folder / target.name
            staging.touch(exist_ok=False)
            mode = stat.S_IMODE(staging.stat().st_mode)
            write(staging)
            # The writer may have replaced the file by one with other permissions: restore those of the umask.
            staging.chmod(mode)
            _flush(staging)
            if force:
                staging.replace(target)
            else:
                _rename_without_replacing(staging, target)
            _flush(target.parent)
    except OSError as error:
        raise outside_error(error, f"cannot write {path}") from error


def cache_folder() -> Path:
    """Return the cache folder: ``$HARMCONVERT_CACHE``, else harmconvert/ in the user's cache folder. Create it.

    Raises:
        OSError: the folder cannot be created.
    """
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("HARMCONVERT_CACHE") or users / "harmconvert")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def beside(output: str | Path, ending: str) -> Path:
    """Return the path of a file that belongs to an output: the output's name without .safetensors, plus ``ending``."""
    return Path(str(output).removesuffix(".safetensors") + ending)


def state_path(output: str | Path) -> Path:
    """Return the path of the training state of the run that writes ``output``.

    >>> state_path("a/net.safetensors").name
    'net.state.pth'
    """
    return beside(output, ".state.pth")


def metrics_path(output: str | Path) -> Path:
    """Return the path of the metrics table of the run that writes ``output``.

    >>> metrics_path("a/net.safetensors").name
    'net.metrics.csv'
    """
    return beside(output, ".metrics.csv")


def default_name(source: str, lam: str, bits: str | None = None, rank: str | None = None) -> str:
    """Return the default output of `harmconvert convert`: NAME-harmonic-LAMBDA.safetensors, with -rankR and -Bbit.

    >>> default_name("hf-hub:timm/resnet18.a1_in1k", "progressive"), default_name("resnet50", "layer4.*=2")
    ('resnet18.a1_in1k-harmonic-progressive.safetensors', 'resnet50-harmonic-custom.safetensors')
    >>> default_name("resnet50", "full", "2.5"), default_name("resnet50", "2", rank="0.5")
    ('resnet50-harmonic-full-2.5bit.safetensors', 'resnet50-harmonic-2-rank0.5.safetensors')
    """
    kept = "custom" if "=" in lam else lam.strip()
    coded = "" if bits is None else "-custombit" if "=" in bits else f"-{bits.strip()}bit"
    ranked = "" if rank is None else "-rankcustom" if "=" in rank else f"-rank{rank.strip()}"
    return f"{short_name(source)}-harmonic-{kept}{ranked}{coded}.safetensors"


def short_name(source: str) -> str:
    """Return the part of a source's name that is used in the names of output files.

    >>> short_name("sample:resnet_mnist5k"), short_name("reference:folder/resnet50.pth.tar")
    ('resnet_mnist5k', 'resnet50')
    >>> short_name("smp:unet/resnet34")
    'unet-resnet34'
    """
    if re.fullmatch(r"smp:[^/]+/[^/]+", source):  # an encoder alone is the name of another network
        source = source.replace("/", "-")
    name = re.sub(r"(\.(safetensors|pth|pt7?|tar))+$", "", source).rstrip("/").replace(":", "/").split("/")[-1]
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "network"


def write_text(path: str | Path, text: str, force: bool = False) -> None:
    """Write a text file in UTF-8; see `write_file` for errors."""
    write_file(path, lambda staging: cast(None, staging.write_text(text, encoding="utf-8")), force)


def read_json(path: str | Path) -> Any:
    """Return the JSON document in a regular file.

    Raises:
        OSError: the file cannot be read or is not a regular file (reading a FIFO could wait forever).
        ValueError: the file is not JSON in UTF-8; see `harmconvert.documents.parse_json`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return parse_json(path.read_text(encoding="utf-8"))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], force: bool = False) -> None:
    """Write a CSV table of at least one row; all rows have the same keys, None becomes an empty cell.

    See `write_file` for errors.
    """

    def write(staging: Path) -> None:
        with staging.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_file(path, write, force)


def check_folder(path: str | Path, own: Collection[str], force: bool = False) -> Path:
    """Check that a folder can be written to ``path`` and return its real path. Call this before long work begins.

    ``own``: the names of the files that will be written. A folder that holds any other file is never replaced.

    Raises:
        UsageError: the folder exists and ``force`` is not set; it holds other files; ``path`` is not a folder; its
            parent does not exist.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is no folder: name another ", Argument("output"))
    with suppress(OSError):  # if the folder has a problem, writing reports it
        _remove_leftovers(path.resolve())
    if path.exists() and not force:
        raise _exists(path)
    if path.exists() and (others := sorted({entry.name for entry in path.iterdir()} - set(own))):
        what = f"{path} holds other files ({shortened(others, 3)}), which "
        raise UsageError(what, Argument("force", True), " would remove: name a new folder")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: make it first")
    return path.resolve()


def write_folder(path: str | Path, own: Collection[str], fill: Callable[[Path], None], force: bool = False) -> None:
    """Call ``fill`` with a temporary folder beside ``path``, then move that folder to ``path`` atomically.

    ``own``: the names of the files that ``fill`` writes.

    Raises:
        UsageError: see `check_folder`.
        OutsideError: the disk is full or a permission is missing.
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
            check_folder(path, own, force)  # again: somebody may have put other files there in the meantime
            if not (force and target.exists() and _swap_folders(staging, target)):
                if force and target.exists():
                    target.replace(old)
                staging.rename(target)
            _flush(target.parent)
    except OSError as error:
        raise outside_error(error, f"cannot write {path}") from error


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock on the file ``path``, so that no other process can do ``what`` at the same time.

    The system releases the lock when this process ends for any reason. If the disk does not support locks, nothing is
    locked.

    Raises:
        OutsideError: another process holds the lock.
    """
    path = path.resolve()
    refused = OutsideError(f"another process is {what} (it holds {path}): wait for it, or name another output")
    with _thread_lock:
        if path in _locked_paths:
            raise refused
        _locked_paths.add(path)
    try:
        descriptor = _open_and_lock(path, refused)
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)
    finally:
        _locked_paths.discard(path)


def _open_and_lock(path: Path, refused: OutsideError) -> int | None:
    """Return the descriptor of the locked file, or None if the system or the disk does not support locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise outside_error(error, f"cannot lock {path}") from error
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
        os.close(descriptor)  # the previous holder has removed the file between open and lock: try again


def outside_error(error: OSError, what: str) -> OutsideError:
    """Return an OutsideError that says what the system refused and what may help."""
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
    """Yield temporary paths beside a target that no other writer uses, one per ending; remove them at the end."""
    with _thread_lock:
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
        finally:  # only now may another writer get this number, and with it these paths
            _writing.discard((target, number))


def _rename_without_replacing(staging: Path, target: Path) -> None:
    """Rename a temporary file to its target; raise UsageError if the target has been created in the meantime."""
    try:
        os.link(staging, target)
        return
    except FileExistsError:
        pass
    except OSError:  # this disk has no hard links: test and rename, which is not atomic
        if not target.exists():
            staging.replace(target)
            return
    raise UsageError(f"{target} was created in the meantime: use ", Argument("force", True), " to replace it")


def _swap_folders(staging: Path, target: Path) -> bool:
    """Swap two folders atomically; return False if the system cannot (the call is renameat2 of Linux)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(staging), at_cwd, os.fsencode(target), exchange) == 0


def _remove_leftovers(target: Path) -> None:
    pattern = re.compile(re.escape(f".{target.name}.") + r"(\d+)(?:-(\d+))?\.(staging|old)")
    for entry in list(target.parent.iterdir()):
        if match := pattern.fullmatch(entry.name):
            with _thread_lock:  # otherwise a thread could get this number between the test and the removal
                if not _is_in_use(target, int(match[1]), int(match[2] or 0)):
                    _remove(entry, target)


def _remove(path: Path, target: Path) -> None:
    """Remove a temporary path. An old folder goes back to the target's name if no new folder has replaced it."""
    if path.suffix == ".old" and path.exists() and not target.exists():
        path.replace(target)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_in_use(target: Path, pid: int, number: int) -> bool:
    """Return whether the process that made a temporary path may still be using it."""
    if pid == os.getpid():  # in a container every run may have the same process number, also one that was killed
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


def _file_kind(path: Path) -> str:
    mode = path.stat().st_mode
    kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")
