"""Malicious and damaged files give a one-line error or the network that was saved, and none of their code runs."""

from __future__ import annotations

import os
import random
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import harmconvert as hc
from harmconvert.errors import HarmconvertError, HarmconvertWarning, printable
from harmconvert.pipeline import convert
from harmconvert.plan import Plan
from harmconvert.sources import open_source
from harmconvert.storage import read_header, read_weights
from harmconvert.training import read_record

from ..commands import run
from ..networks import Branches, seeded
from . import hostile
from .tally import Counter, size

GIBIBYTE = 2**30
# Reading a checkpoint of 100 MB needs less than this; a reader that needs more has trusted a number in a file.
MEMORY = 2 * GIBIBYTE


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a harmonic checkpoint with tied, grouped and truncated layers."""
    path = tmp_path_factory.mktemp("good") / "net.safetensors"
    hc.save(convert(seeded(Branches), {"*": 2}), path, history={"calibration": {"images": 3}})
    return path.read_bytes()


@contextmanager
def bounded_memory() -> Iterator[None]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def complaint(path: Path, read: Callable[[Path], Any], wanted: Any = None) -> str | None:
    """Return what is wrong with the reading of a file; None for the allowed results.

    Allowed are a one-line error that names the file, a warning, or the expected state.
    """
    with warnings.catch_warnings(record=True) as remarks, bounded_memory():
        warnings.simplefilter("always")
        try:
            found = read(path)
        except HarmconvertError as error:
            text = str(error)
            return None if path.name in text and "Traceback" not in text else f"{path}: says {text!r}"
        except Exception as error:
            return f"{path}: {type(error).__name__}: {error}"
    if wanted is not None and not any(issubclass(one.category, HarmconvertWarning) for one in remarks):
        state = found.state_dict()
        if state.keys() != wanted.keys() or not all(torch.equal(state[key], wanted[key]) for key in wanted):
            return f"{path}: another network, and not a word"
    return None


def loaded(path: Path) -> nn.Module:
    return hc.load(path, model=seeded(Branches))


def opened(path: Path) -> Any:
    return open_source(str(path))


@pytest.mark.parametrize("kind", ["no_safetensors", "lying_headers"])
def test_hostile_checkpoints_are_refused_or_read_correctly(
    good: bytes, tmp_path: Path, tally: Counter, kind: str
) -> None:
    what = {"no_safetensors": "containers broken in a named way", "lying_headers": "headers that lie"}[kind]
    count = tally("files", f"{what}: header, load, rebuild, as weights, on the command line")
    mark = tmp_path / "ran"
    for number, (name, content) in enumerate(getattr(hostile, kind)(good)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        for read in (read_header, loaded, opened, read_weights):
            found = complaint(path, read)
            count.trial(found and f"{name}: {found}", executed=mark.exists())
        if number % size(10, 1) == 0:
            count.trial(command_complaint(str(path)))
        path.unlink()


def command_complaint(path: str) -> str | None:
    """Return what is wrong with the messages of commands about a file that is not a checkpoint."""
    result = run("inspect", path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("harmconvert: error: ")]
    fine = result.exit_code in (2, 3) and len(lines) == 1 and printable(lines[0]) == lines[0]
    return None if fine or result.exit_code == 0 else f"{path}: exit code {result.exit_code}: {result.stderr[-300:]}"


def test_truncated_files_are_refused(good: bytes, tmp_path: Path, tally: Counter) -> None:
    count = tally("files", "checkpoints cut off at every structural boundary and at random bytes")
    header, data = hostile.taken_apart(good)
    start = len(good) - len(data)
    ends = {start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    places = {*range(10), start - 1, start, start + 1, *ends, *(end - 1 for end in ends)} - {len(good)}
    places |= set(random.Random(0).sample(range(len(good)), size(20, 200)))
    for place in sorted(places):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(good[:place])
        count.trial(complaint(path, loaded) or ("read in part" if reads(path) else None))


def reads(path: Path) -> bool:
    try:
        loaded(path)
    except HarmconvertError:
        return False
    return True


def test_flipped_bytes_are_detected(good: bytes, tmp_path: Path, tally: Counter) -> None:
    """This includes the tensors, where a container without checksums would not detect it."""
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(good)
    wanted = loaded(path).state_dict()
    start = len(good) - len(hostile.taken_apart(good)[1])
    chance = random.Random(0)
    for what, places in {
        "checkpoints with one byte of the header changed": range(chance.randrange(17), start, size(17, 1)),
        "checkpoints with one byte of the tensors changed": chance.sample(range(start, len(good)), size(40, 2000)),
    }.items():
        count = tally("files", f"{what}: refused, told, or of no effect")
        for place in places:
            content = bytearray(good)
            content[place] ^= chance.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
            path.write_bytes(content)
            count.trial(complaint(path, loaded, wanted))


def test_a_header_of_a_hundred_megabytes_is_refused(tmp_path: Path, tally: Counter) -> None:
    count = tally("files", "headers of 50 to 101 MB")
    megabytes = size((50,), (50, 99, 101))
    for number in megabytes:
        path = tmp_path / f"{number}.safetensors"
        for inside in ("", '"a":"' + "x" * (number * 10**6 - 100) + '"'):
            path.write_bytes(hostile.built(('{"__metadata__":{' + inside + "}}").ljust(number * 10**6)))
            count.trial(complaint(path, read_header))
        path.write_bytes(hostile.built({"__metadata__": {"harmconvert": "[1," * (number * 10**6 // 4)}}))
        count.trial(complaint(path, read_header))
        path.unlink()


@pytest.mark.parametrize("forced", [False, True], ids=["", "forced"])
def test_pickles_with_code_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Counter, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    count = tally("files", "pickles that run code: as weights, state of a run, shard, folder, reference, renamed")
    mark = tmp_path / "ran"
    ways = every_way_in(tmp_path)
    chosen = hostile.payloads(mark) if not forced else {"os.system": hostile.payloads(mark)["os.system"]}
    for payload, evil in chosen.items():
        for container, content in hostile.containers(evil).items():
            for way, (path, read) in ways.items():
                path.write_bytes(content)
                try:
                    read()
                    found = "was read"
                except HarmconvertError as error:
                    found = None if path.name in str(error) or path.parent.name in str(error) else f"says {error}"
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"
                executed = mark.exists()
                count.trial(found and f"{payload}, {container}, {way}: {found}", executed=executed)
                path.unlink()
                if executed:
                    mark.unlink() if mark.is_file() else mark.rmdir()


def every_way_in(folder: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Return every place where an untrusted file is read: the file, and the function that reads it."""
    hub = folder / "hub"
    hub.mkdir()
    (hub / "config.json").write_text('{"architecture": "resnet10t"}')
    index = folder / "net.index.json"
    index.write_text('{"weight_map": {"weight": "shard.bin"}}')
    weights, lying, state = folder / "net.pth", folder / "net.safetensors", folder / "net.state.pth"
    return {
        "weights": (weights, lambda: read_weights(weights)),
        "named .safetensors": (lying, lambda: read_weights(lying)),
        "a harmonic checkpoint": (lying, lambda: loaded(lying)),
        "with a source": (weights, lambda: open_source("resnet10t", weights=weights)),
        "a folder's": (hub / "pytorch_model.bin", lambda: open_source(f"local-dir:{hub}")),
        "a shard": (folder / "shard.bin", lambda: read_weights(index)),
        "the reference implementation's": (weights, lambda: open_source(f"reference:{weights}")),
        "state of a run": (state, lambda: read_record(state)),
    }


def test_programs_are_refused(tmp_path: Path, tally: Counter) -> None:
    count = tally("files", "TorchScript and exported programs, as weights")
    net, x = nn.Sequential(nn.Conv2d(1, 1, 3)).eval(), torch.zeros(1, 1, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, x), str(tmp_path / "a"))
        torch.export.save(torch.export.export(net, (x,)), tmp_path / "b.pt2")
    for source, words in {"a": "is a TorchScript program", "b.pt2": "is an exported program"}.items():
        for name in ("net.pth", "net.pt", "net.pt2", "net.bin"):
            path = tmp_path / name
            path.write_bytes((tmp_path / source).read_bytes())
            with pytest.raises(HarmconvertError) as caught:
                read_weights(path)
            count.trial(None if words in str(caught.value) else str(caught.value))


def test_damaged_archives_are_refused(tmp_path: Path, tally: Counter) -> None:
    """torch.load does not compare checksums: a flipped bit would change a weight."""
    count = tally("files", ".pth files with one byte changed: refused, or read as they were written")
    state = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).state_dict()
    path = tmp_path / "net.pth"
    torch.save(state, path)
    whole, chance = path.read_bytes(), random.Random(0)
    for place in chance.sample(range(len(whole)), size(60, len(whole))):
        content = bytearray(whole)
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            found = read_weights(path)
            same = found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
            count.trial(None if same else f"byte {place}: other weights, and not a word")
        except HarmconvertError:
            count.trial()
        except Exception as error:
            count.trial(f"byte {place}: {type(error).__name__}: {error}")


def test_hostile_indices_of_shards_are_refused(tmp_path: Path, tally: Counter) -> None:
    count = tally("files", "indices of several files: outside their folder, links, FIFOs, lies")
    state = timm.create_model("resnet10t").state_dict()
    keys = list(state)
    first, second = {k: state[k] for k in keys[:9]}, {k: state[k] for k in keys[9:]}
    folder = tmp_path / "net"
    folder.mkdir()
    safetensors.torch.save_file(first, folder / "1.safetensors")
    torch.save(second, folder / "2.bin")
    index = folder / "model.safetensors.index.json"
    honest = {**dict.fromkeys(first, "1.safetensors"), **dict.fromkeys(second, "2.bin")}

    def read(places: Any) -> dict[str, torch.Tensor]:
        index.write_text(places if isinstance(places, str) else hostile.json.dumps({"weight_map": places}))
        return read_weights(index)

    assert all(torch.equal(tensor, state[key]) for key, tensor in read(honest).items())
    (folder / "config.json").write_text('{"architecture": "resnet10t"}')
    assert torch.equal(open_source(f"local-dir:{folder}").model.state_dict()[keys[0]], state[keys[0]])

    safetensors.torch.save_file(first, tmp_path / "outside.safetensors")
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "to_fifo.safetensors").symlink_to("fifo.safetensors")
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "device.bin").symlink_to("/dev/zero")
    (folder / "passwd.bin").symlink_to("/etc/passwd")
    (folder / "folder.safetensors").mkdir()
    names = ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "fifo.safetensors", "to_fifo.safetensors"]
    names += ["dangling.safetensors", "device.bin", "passwd.bin", "folder.safetensors", "", ".", "..", "a\0b", "\ud800"]
    names += [index.name, "./1.safetensors", "2.bin", "x" * 10**5, hostile.ANSI, "/etc/passwd", "none.safetensors"]
    for name in names:
        refusal(count, name[:30], lambda name=name: read({**honest, **dict.fromkeys(first, name)}))
    for places in ("", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 10**5, '{"weight_map": ["a"]}'):
        refusal(count, places[:30], lambda places=places: read(places))
    lies = [{**honest, "more": "2.bin"}, {k: honest[k] for k in keys[1:]}, {**honest, keys[0]: 3}, {keys[0]: None}]
    for number, lie in enumerate(lies):
        refusal(count, f"lie {number}", lambda lie=lie: read(lie))


def refusal(count: Any, name: str, read: Callable[[], Any]) -> None:
    try:
        read()
        count.trial(f"{name}: was read")
    except HarmconvertError:
        count.trial()
    except Exception as error:
        count.trial(f"{name}: {type(error).__name__}: {error}")


def test_hostile_plans_are_refused(tmp_path: Path, tally: Counter) -> None:
    count = tally("files", "hostile plans as JSON files")
    good = convert(seeded(Branches), 2, example_input=torch.zeros(1, 3, 16, 16)).plan.to_json()
    path = tmp_path / "plan.json"
    odd = [-1, 10**9, float("nan"), float("inf"), None, "x", [], {}, [[]], 2**70, True, "\x1b[31m", [None], [[None]]]
    trials: list[tuple[str, Any]] = [(f"{key}={value!r}", {**good, key: value}) for key in good for value in odd]
    for key in good["layers"][0]:
        trials += [
            (f"{key}={v!r}", {**good, "layers": [{**good["layers"][0], key: v}, *good["layers"][1:]]})
            for v in [*odd, [10**9, 10**9], [-1, 3], [[0, 10**9]], [[0, -1]], [[0, 0], [0, 0]], [0] * 10**5]
        ]
    for name, content in trials:
        path.write_text(hostile.json.dumps(content))
        count.trial((found := complaint(path, Plan.load)) and f"{name}: {found}")
    for text in (b"", b"\xff\xfe", b"[" * 10**5, b"null", b"3", b'{"layers": [], "layers": 3}', b"<html>", b"NaN"):
        path.write_bytes(text)
        count.trial(complaint(path, Plan.load))


def test_paths_that_are_not_regular_files_are_refused(tmp_path: Path, tally: Counter) -> None:
    """Reading a FIFO without a writer would wait forever."""
    count = tally("files", "FIFOs, devices, sockets, folders, links to them and to nothing, in the place of a file")
    os.mkfifo(tmp_path / "fifo")
    for name, target in {"fifo": "fifo", "zero": "/dev/zero", "folder": ".", "nothing": "none"}.items():
        for ending in (".safetensors", ".pth", ".index.json", ".json"):
            path = tmp_path / f"{name}{ending}"
            path.symlink_to(target)
            for read in (read_header, loaded, read_weights, Plan.load, lambda path: read_record(path)):
                count.trial(complaint(path, read))
