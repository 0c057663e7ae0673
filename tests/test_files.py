from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harmconvert.errors import OutsideError, UsageError
from harmconvert.files import check_output, read_json, write_file, write_folder


def fill(path: Path) -> None:
    path.write_bytes(b"new")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_written_file_is_complete_and_leaves_no_staging_file(tmp_path: Path) -> None:
    write_file(tmp_path / "a", fill)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(UsageError, match="exists: use force=True to replace it, or name another output"):
        write_file(tmp_path / "a", fill)
    assert (tmp_path / "a").read_bytes() == b"old"
    write_file(tmp_path / "a", fill, force=True)
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", fail, force=True)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_only_staging_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead, living = 2**22 + 1, os.getppid()  # the first is larger than any process number
    (tmp_path / f".a.{dead}.staging").write_bytes(b"half")
    (tmp_path / f".a.{living}.staging").write_bytes(b"half")
    write_file(tmp_path / "a", fill)
    assert names(tmp_path) == [f".a.{living}.staging", "a"]


def test_a_leftover_staging_file_with_the_own_process_number_is_removed(tmp_path: Path) -> None:
    """In a container every run has the same process number: leftovers of a killed run must not block the next ones."""
    (tmp_path / f".a.{os.getpid()}.staging").mkdir()
    (tmp_path / f".a.{os.getpid()}.staging" / "a").write_bytes(b"half")
    write_file(tmp_path / "a", fill)
    assert names(tmp_path) == ["a"]


def test_two_threads_may_write_one_target(tmp_path: Path) -> None:
    def slowly(path: Path) -> None:
        path.write_bytes(b"old")
        write_file(tmp_path / "a", fill)  # the other thread writes at the same time
        path.write_bytes(b"last")

    write_file(tmp_path / "a", slowly, force=True)
    assert (tmp_path / "a").read_bytes() == b"last"
    assert names(tmp_path) == ["a"]


def test_a_file_created_by_another_writer_is_kept(tmp_path: Path) -> None:
    def slowly(path: Path) -> None:
        fill(path)
        (tmp_path / "a").write_bytes(b"another's")

    with pytest.raises(UsageError, match="was created in the meantime: use force=True to replace it"):
        write_file(tmp_path / "a", slowly)
    assert (tmp_path / "a").read_bytes() == b"another's"
    assert names(tmp_path) == ["a"]


def test_many_threads_may_write_one_target_at_once(tmp_path: Path) -> None:
    def often() -> None:
        for _ in range(100):
            write_file(tmp_path / "a", fill, force=True)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(often) for _ in range(4)]:
            done.result()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_created_by_another_writer_is_kept(tmp_path: Path, force: bool) -> None:
    def slowly(folder: Path) -> None:
        fill(folder / "x")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "thesis").write_bytes(b"another's")

    with pytest.raises(UsageError, match="holds other files" if force else "exists: use force=True to replace it"):
        write_folder(tmp_path / "d", ("x",), slowly, force=force)
    assert names(tmp_path / "d") == ["thesis"]
    assert names(tmp_path) == ["d"]


def test_temporary_files_of_the_writer_are_removed(tmp_path: Path) -> None:
    """safetensors writes to a temporary file of its own and renames it."""

    def untidy(path: Path) -> None:
        path.with_name(".tmp1234").write_bytes(b"half")
        fill(path)

    write_file(tmp_path / "a", untidy)
    assert names(tmp_path) == ["a"]


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "fifo")
    (tmp_path / "deep").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep")


def test_a_link_is_kept_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", fill, force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_outputs_that_are_not_regular_files_are_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "socket"))
    sock.close()
    cases = {
        tmp_path: "is a folder: name a file in it",
        tmp_path / "dangling": "is a link to nowhere, which does not exist",
        tmp_path / "fifo": "is a FIFO: name a regular file",
        tmp_path / "socket": "is a socket",
        Path("/dev/null"): "is a device",
        tmp_path / "none" / "a": "none does not exist: make it first",
    }
    before = names(tmp_path)
    for path, message in cases.items():
        with pytest.raises(UsageError, match=message):
            write_file(path, fill, force=True)
        with pytest.raises(UsageError, match=message):
            check_output(path)
    assert names(tmp_path) == before
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutsideError, match="check the permissions of the folder"):
        write_file(tmp_path / "a", fill)


def test_errors_of_the_system_are_reported_with_a_remedy(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutsideError, match=r"cannot write .*: No space left on device; free some space"):
        write_file(tmp_path / "a", full)
    assert names(tmp_path) == []


def test_a_folder_is_written_completely_and_replaced_with_force(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", ("x", "y"), lambda folder: fill(folder / "x"))
    assert names(tmp_path) == ["d"]
    with pytest.raises(UsageError, match="exists: use force=True"):
        write_folder(tmp_path / "d", ("x", "y"), lambda folder: fill(folder / "y"))
    write_folder(tmp_path / "d", ("x", "y"), lambda folder: fill(folder / "y"), force=True)
    assert names(tmp_path / "d") == ["y"]
    assert names(tmp_path) == ["d"]

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutsideError):
        write_folder(tmp_path / "d", ("x", "y"), fail, force=True)
    assert names(tmp_path / "d") == ["y"]
    assert names(tmp_path) == ["d"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is no folder"):
        write_folder(tmp_path / "file", ("x", "y"), fill, force=True)


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"holds other files \(notes.txt\), which force=True would remove"):
        write_folder(tmp_path / "d", ("x",), lambda folder: fill(folder / "x"), force=True)
    assert names(tmp_path / "d") == ["notes.txt"]


def test_a_folder_moved_aside_by_a_killed_process_is_restored(tmp_path: Path) -> None:
    old = tmp_path / f".d.{2**22 + 1}.old"
    old.mkdir()
    (old / "x").write_bytes(b"old")

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutsideError):
        write_folder(tmp_path / "d", ("x",), fail, force=True)
    assert (tmp_path / "d" / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["d"]
