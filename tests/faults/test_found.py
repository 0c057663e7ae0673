"""Bugs that fuzzing of readers has found, one test for each; the inputs are in corpus/."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from harmconvert import save
from harmconvert.errors import InputError
from harmconvert.kernels import all_frequencies
from harmconvert.layers import read_times
from harmconvert.pipeline import convert, recorded_stages
from harmconvert.plan import Frequencies, Plan
from harmconvert.report import page, report_of
from harmconvert.search import Item, Probes, with_order
from harmconvert.sources import load, open_reference, rebuild
from harmconvert.storage import Header, Source, read_header, read_weights
from harmconvert.training import Position, Recipe, StateFile, read_identity

from ..networks import seeded
from .readers import Small, _header_of, _trained, trainer

LAYER = {"name": "a", "kernel_size": [3, 3], "frequencies": [[0, 0]]}


def written(folder: Path, text: str) -> Path:
    path = folder / "file.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


# --- plans ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": [], "policy": ' + "1" * 5000 + "}", "cannot read the plan .*4300 digits"),
        ('{"layers": [], "layers": []}', "cannot read the plan .*'layers' appears twice"),
        ('{"layers": [], "policy": "\\ud800"}', "cannot read the plan .*half of a surrogate pair"),
        ("[" * 100_000, "cannot read the plan .*nested too deeply"),
    ],
)
def test_plans_with_json_that_python_cannot_parse_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan.load(written(tmp_path, text))


@pytest.mark.parametrize("size", [[256, 256, *[1] * 1000], [1, 1, 1, 3], [10**9, 10**9], [3, -3], [3.0, 3], [True]])
@pytest.mark.parametrize("part", ["layers", "skipped"])
def test_impossible_kernel_sizes_are_refused_before_their_frequencies_are_listed(size: Any, part: str) -> None:
    entry = {**LAYER, "kernel_size": size, "kind": "Conv2d", "why": "?", "frequencies": [[0] * len(size)]}
    with pytest.raises(InputError, match="this is not a plan: "):
        Plan.from_json({"layers": [], part: [entry]})


def test_a_plan_is_checked_for_being_whole_without_listing_all_frequencies() -> None:
    layers = [{**LAYER, "name": str(n), "kernel_size": [65536 - n], "frequencies": [[0]]} for n in range(500)]
    plan = Plan.from_json({"layers": layers})
    all_frequencies.__globals__["_all_frequencies"].cache_clear()
    assert not plan.whole
    assert "keeps 1 of 65536" in str(plan)
    assert all_frequencies.__globals__["_all_frequencies"].cache_info().misses == 0


# --- checkpoints ---


def test_a_header_with_numbers_that_python_cannot_parse_is_refused(tmp_path: Path) -> None:
    from harmconvert.storage import write_tensors

    path = tmp_path / "net.safetensors"
    for text, message in (("1" * 5000, "4300 digits"), ('{"a": 1, "a": 1}', "'a' appears twice")):
        write_tensors({"x": torch.zeros(1)}, path, {"harmconvert": text}, force=True)
        with pytest.raises(InputError, match=f"net.safetensors: its header is not JSON: .*{message}"):
            read_header(path)


@pytest.mark.parametrize(
    "history",
    [{"training": 3}, {"training": [1]}, {"calibration": [1]}, {"calibration": "x"}, {"conversion": {"layers": [1]}}],
)
def test_a_history_that_further_training_cannot_use_is_refused_when_it_is_read(history: Any) -> None:
    """Before, the error appeared only after the training, whose result was lost."""
    with pytest.raises(InputError, match="its header is unreadable: history: "):
        Header.from_json({**_header_of("trained"), "history": history})


@pytest.mark.parametrize(
    "changed",
    [
        {"calibration": {"layers": [], "inputs": 3}},  # the number of held-back inputs is missing
        {"conversion": {"search": {"unit": "params"}}},
        {"conversion": {"search": {**_header_of("trained")["history"]["conversion"]["search"], "whole": 0}}},
        {"training": [{"stages": [{"name": "cut"}]}]},
    ],
)
def test_a_history_without_the_entries_of_a_report_raises_input_error(changed: Any) -> None:
    history = _header_of("trained")["history"]
    header = Header.from_json({**_header_of("trained"), "history": {**history, **changed}})
    with pytest.raises(InputError, match="net: the history in its header is invalid"):
        page(report_of(_trained(), header, "net"))


@pytest.mark.parametrize("field", ["scheme", "name", "arguments", "sha256"])
def test_a_source_with_wrong_types_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"the source recorded in the file is unreadable: .*{field}"):
        Source.from_json({**asdict(Source("timm", "resnet18")), field: [[1]]})


def test_a_small_file_cannot_request_a_network_of_any_size(tmp_path: Path) -> None:
    import timm

    huge = Source("timm", "test_resnet", {"num_classes": 10**7})
    save(convert(timm.create_model("test_resnet", num_classes=3), 2), tmp_path / "net.safetensors", source=huge)
    with pytest.raises(InputError, match="is a network of 3,881,499,192 bytes, far more than the file holds: refused"):
        load(tmp_path / "net.safetensors")
    assert rebuild(Source("timm", "test_resnet", {"num_classes": 5}), limit=1 << 30).num_classes == 5


# --- weights ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(1)}, "1 is not a valid name of a tensor"),
        (
            {"a": torch.zeros(1).expand(1 << 40)},
            r"'a' has the shape \(1099511627776,\), but the file holds only a part",
        ),
        ({"a": torch.zeros(2, device="meta")}, r"'a' is not a plain tensor \(it is meta, sparse"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is not a plain tensor"),
    ],
)
def test_weights_that_are_not_plain_tensors_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / "net.pth")


def test_weights_that_unpack_to_many_times_their_size_are_refused(tmp_path: Path) -> None:
    """20 kilobytes unpack to 20 megabytes: torch does not compress files, but it reads compressed ones."""
    torch.save({"a": torch.zeros(5_000_000)}, tmp_path / "net.pth")
    target = zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "net.pth") as plain, target as packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    assert read_weights(tmp_path / "net.pth")["a"].shape == (5_000_000,)
    with pytest.raises(InputError, match=r"packed.pth is refused: its .* bytes unpack to 20,"):
        read_weights(tmp_path / "packed.pth")


@pytest.mark.parametrize(
    "spoil", [{"fc.weight": torch.zeros(3)}, {"bn.bias": torch.zeros(2, 2)}, {"dct0": torch.zeros(3)}]
)
def test_reference_files_whose_shapes_do_not_fit_together_are_refused(tmp_path: Path, spoil: Any) -> None:
    from ..test_reference import state_of

    torch.save({**state_of("harm_wrn10_1"), **spoil}, tmp_path / "net.pt7")
    with pytest.raises(InputError, match="net"):
        open_reference(str(tmp_path / "net.pt7"), {}, "dense")


# --- training ---


def kept(folder: Path, **changed: Any) -> Path:
    """Write a state with changed parts; return its path."""
    path = folder / "net.state.pth"
    state_file = StateFile(path, identity={"recipe": Recipe().to_json()}, record={"stages": [], "calibration": None})
    state_file.save(Position(1, 2), trainer().state_dict)
    torch.save({**torch.load(path, weights_only=True), **changed}, path)
    return path


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("identity", torch.zeros(3)), ("identity", {"recipe": torch.zeros(2)}), ("record", 3), ("record", [1]),
        ("random", 1.5), ("random", {1, 2}), ("random", [None]), ("position", {"epoch": "x"}),
        ("position", {"epoch": -1, "step": 0, "sums": [0.0] * 3, "rows": []}),
        ("position", {"epoch": 1, "step": 0, "sums": [0.0], "rows": []}),
        ("position", {"epoch": 1, "step": 0, "sums": ["x"] * 3, "rows": []}),
        ("model", {"x": torch.zeros(1).expand(1 << 40)}), ("optimizer", {"x": [torch.zeros(2, device="meta")]}),
        ("version", None),
    ],
)  # fmt: skip
def test_a_state_with_parts_of_wrong_types_is_refused(tmp_path: Path, part: str, value: Any) -> None:
    path = kept(tmp_path, **{part: value})
    for read in (StateFile(path).load, lambda: read_identity(path)):
        with pytest.raises(InputError, match="is not a readable training state: "):
            read()


def test_one_flipped_bit_in_a_state_is_detected_and_the_state_before_it_used(tmp_path: Path) -> None:
    """torch.load does not compare checksums: the run would continue with another weight."""
    path, said = kept(tmp_path), []
    StateFile(path, identity={"recipe": Recipe().to_json()}).save(Position(1, 3), trainer().state_dict)
    data, weights = bytearray(path.read_bytes()), trainer().state_dict()["model"]["fc.weight"].numpy().tobytes()
    data[data.index(weights) + 5] ^= 1
    path.write_bytes(data)
    position, _ = StateFile(path, say=said.append).load()
    assert (position.epoch, position.step) == (1, 2)
    assert "is damaged (net.state/" in said[0]
    path.with_name(f"{path.name}.previous").unlink()
    with pytest.raises(InputError, match="is not what was written"):
        StateFile(path).load()


def test_a_state_without_one_of_its_parts_is_refused(tmp_path: Path) -> None:
    path = kept(tmp_path)
    whole = torch.load(path, weights_only=True)
    for part in ("version", "identity", "record", "position", "random", "model"):
        torch.save({key: value for key, value in whole.items() if key != part}, path)
        with pytest.raises(InputError, match="not a readable training state"):
            StateFile(path).load()


@pytest.mark.parametrize("random", [{}, {"torch": 3}, {"torch": torch.zeros(3)}])
def test_invalid_random_states_are_refused(tmp_path: Path, random: Any) -> None:
    path = kept(tmp_path, random=[random])
    with pytest.raises(InputError, match="holds invalid random states: "):
        StateFile(path).load()


@pytest.mark.parametrize("part", ["optimizer", "scaler", "updates", "model"])
@pytest.mark.parametrize("value", [True, None, {}, {"a": 1}, [1]])
def test_a_state_that_cannot_be_loaded_is_refused(part: str, value: Any) -> None:
    one = trainer()
    content = {**one.state_dict(), part: value}
    if part == "scaler" or (part, value) == ("updates", True):  # there is no scaler on a CPU; True is a number
        one.load_state_dict(content)
        return
    with pytest.raises(InputError, match="the training state does not fit this network"):
        one.load_state_dict(content)


def test_the_record_of_another_command_is_refused(tmp_path: Path) -> None:
    for record in ({}, {"stages": [1], "calibration": None}, {"stages": [{"name": "x"}], "calibration": None}):
        with pytest.raises(InputError, match="is not the state of a fine-tuning"):
            recorded_stages(kept(tmp_path, record=record))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "it must be a mapping"), (torch.zeros(3), "it must be a mapping"), ([], "it must be a mapping"),
        ({"epochs": math.nan}, "epochs: nan should be a count"), ({"epochs": "5"}, "epochs: '5' should be a count"),
        ({"lr": math.inf}, "lr: inf should be a finite"), ({"name": {}}, "name: a dict of 0 items should be text"),
        ({"scale": [1]}, "scale: a list of 1 item should be"), ({"clip_grad": "x"}, "clip_grad: 'x' should be"),
        ({"batch_size": 10**400}, "a number of hundreds of digits should be a count"),
    ],
)  # fmt: skip
def test_recipes_with_wrong_types_are_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"cannot read the recipe: .*{message}"):
        Recipe.from_json(data)


# --- caches ---


@pytest.mark.parametrize(
    "times", [[0, 1], [-1.0, 1.0], [math.nan, 1], [1, math.inf], [10**400, 1], ["1", 1], [1], "ab"]
)
def test_invalid_cached_times_are_measured_again(tmp_path: Path, times: Any) -> None:
    """Before, a zero caused a division by zero, and a number of 400 digits could not be converted to a float."""
    path = written(tmp_path, json.dumps({"key": times}))
    assert read_times(path) == {}
    assert read_times(written(tmp_path, '{"key": [0.5, 2]}')) == {"key": (0.5, 2.0)}


@pytest.mark.parametrize(
    "changed",
    [
        {"single": {"a": math.nan}}, {"single": {"a": True}}, {"whole": {"a": math.inf}}, {"whole": []}, {"key": []},
        {"orders": {"a": {"frequencies": [[math.inf]], "by": "energy", "why": None}}}, {"orders": []},
        {"orders": {"a": {"frequencies": [[10**400]], "by": "energy", "why": None}}},
        {"orders": {"a": {"frequencies": [[0]], "by": "energy"}}},
    ],
)  # fmt: skip
def test_invalid_probes_are_refused(tmp_path: Path, changed: Any) -> None:
    data = {"version": 1, "key": {}, "single": {}, "whole": {}, "orders": {}}
    assert Probes.opened(written(tmp_path, json.dumps(data)), {}).single == {}
    with pytest.raises(InputError, match="cannot read probes from"):
        Probes.opened(written(tmp_path, json.dumps({**data, **changed})), {})


@pytest.mark.parametrize(
    "order", [lambda every: every[1:], lambda every: (*every[1:], (9, 9)), lambda every: every * 2]
)
def test_an_order_that_lacks_frequencies_is_refused(order: Callable[[Any], Any]) -> None:
    every = all_frequencies((3, 3))
    item = Item(("a",), ((Frequencies((3, 3), every),),))
    assert len(with_order(item, every[::-1]).choices) == 9
    with pytest.raises(InputError, match="the order of the frequencies of a lacks some or has others"):
        with_order(item, order(every))


def test_the_unchanged_checkpoint_of_these_tests_is_read() -> None:
    """This shows that the tests above fail only because of their changes."""
    header = Header.from_json(_header_of("trained"))
    assert "<!doctype html>" in page(report_of(_trained(), header, "net"))
    assert seeded(Small) is not None
