"""The codec of quantised tensors: every stream is read back exactly, by a second reader too, and damage is refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import harmconvert as hc
from harmconvert.codecs import QUANTISED, CodecTable, Entry, Layout, Quantised, pack, quantised_entry, unpack
from harmconvert.codecs.entropy import LAPLACE, SHAPES, TOTAL, Decoder, Encoder, both_signs, table, table_of_counts
from harmconvert.codecs.stream import too_many_tables
from harmconvert.errors import InputError
from harmconvert.storage import as_stored, read_checkpoint

from . import second_reader
from .networks import Branches, random_input, seeded

LAYOUTS = {
    "1x1": Layout((6, 5)),
    "3x3": Layout((4, 3, 9)),
    "grouped": Layout((6, 2, 9), groups=3),
    "depthwise": Layout((5, 1, 9), groups=5),
    "transposed": Layout((4, 3, 4), transposed=True),
    "transposed, grouped": Layout((6, 2, 3, 2), groups=2, transposed=True),
    "1-d": Layout((7,)),
}


def random_quantised(layout: Layout, seed: int = 0, scale: float = 2.0, rows: bool = True) -> Quantised:
    """Return integers whose size depends on the row and the column, with steps and factors of all kinds."""
    random_numbers = np.random.default_rng(seed)
    groups, height, width = layout.groups, layout.rows, layout.columns
    sizes = scale * np.exp(
        random_numbers.normal(0, 0.7, (groups, height, 1)) + random_numbers.normal(0, 0.7, (groups, 1, width))
    )
    integers = np.rint(random_numbers.normal(0, 1, (groups, height, width)) * sizes).astype(np.int32)
    steps = random_numbers.integers(-40, 8, (groups, width)).astype(np.int32)
    if not rows:
        return Quantised(integers, steps)
    row_steps = random_numbers.integers(-3, 4, (groups, height)).astype(np.int32)
    return Quantised(integers, steps, row_steps, random_numbers.normal(1, 0.1, (groups, height)).astype(np.float32))


def same(one: Quantised, other: Quantised) -> bool:
    def equal(left: Any, right: Any) -> bool:
        return np.array_equal(0 if left is None else left, 0 if right is None else right)

    pairs = ("integers_GON", "column_steps_GN", "row_steps_GO", "scales_GO")
    return all(equal(getattr(one, name), getattr(other, name)) for name in pairs)


# --- tables and the coder ---


@pytest.mark.parametrize("largest", [0, 1, 7, 300, pytest.param(8191, marks=pytest.mark.slow)])
def test_the_weights_of_every_table_sum_to_the_total(largest: int) -> None:
    for scale in (0, 3, 24, 60, 127):
        for shape in SHAPES:
            weights = both_signs(table(scale, shape, largest))
            assert weights.sum() == TOTAL
            assert weights.min() >= 1
            assert np.array_equal(weights, weights[::-1])


def test_a_table_is_the_documented_formula() -> None:
    for scale, shape, largest in ((24, 4, 5), (30, 8, 20), (17, 2, 9), (40, 5, 60)):
        assert both_signs(table(scale, shape, largest)).tolist() == second_reader.distribution(scale, shape, largest)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=60))
def test_a_table_of_counts_gives_every_integer_a_weight(counts: list[int]) -> None:
    weights = table_of_counts(counts)
    assert weights.sum() == TOTAL
    assert weights.min() >= 1


def test_the_length_of_a_stream_is_its_information() -> None:
    weights = both_signs(table(28, LAPLACE, 30))
    values = np.random.default_rng(0).choice(np.arange(-30, 31), 20_000, p=weights / TOTAL).astype(np.int32)
    encoder = Encoder()
    encoder.add(values, weights)
    information = -np.log2(weights[values + 30] / TOTAL).sum() / 8
    assert information <= len(encoder.words()) <= information + 12


def test_a_stream_with_words_left_is_refused() -> None:
    weights = both_signs(table(28, LAPLACE, 3))
    encoder = Encoder()
    encoder.add(np.array([1, -2, 0, 3] * 40, np.int32), weights)
    decoder = Decoder(encoder.words())
    decoder.take(100, weights)
    with pytest.raises(ValueError, match="does not end"):
        decoder.end()


# --- streams ---


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stream_is_read_back_exactly(name: str, rows: bool) -> None:
    layout = LAYOUTS[name]
    quantised = random_quantised(layout, rows=rows)
    assert same(unpack(pack(quantised, layout), layout), quantised)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([0.0, 0.05, 1.0, 30.0, 900.0]))
def test_any_integers_are_read_back_exactly(seed: int, name: str, scale: float) -> None:
    layout = LAYOUTS[name]
    quantised = random_quantised(layout, seed, scale)
    quantised = replace(quantised, integers_GON=np.clip(quantised.integers_GON, -8191, 8191))
    assert same(unpack(pack(quantised, layout), layout), quantised)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_second_reader_gets_the_same_values(name: str) -> None:
    layout = LAYOUTS[name]
    for seed, scale, rows in ((0, 2.0, True), (1, 0.3, False), (2, 40.0, True)):
        entry = quantised_entry(random_quantised(layout, seed, scale, rows), layout, torch.float32)
        assert entry.stream is not None
        json = CodecTable(coded={"key": entry}).to_json()["quantised"]["tensors"]["key"]
        expected = second_reader.quantised(json, entry.stream.numpy().tobytes())
        assert np.array_equal(QUANTISED.decode(entry.stream, entry).numpy(), expected)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0, 20.0])
def test_a_stream_is_at_most_two_percent_above_the_entropy(scale: float) -> None:
    layout = Layout((128, 64, 9))
    integers = np.rint(np.random.default_rng(0).laplace(0, scale, (1, 128, 576))).astype(np.int32)
    counts = np.unique(integers, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    stream = pack(Quantised(integers, np.full((1, 576), -20, np.int32)), layout)
    assert len(stream) <= 1.02 * entropy


def test_integers_that_no_smooth_distribution_fits_are_at_most_two_percent_above_the_entropy() -> None:
    layout = Layout((128, 576))
    integers = np.random.default_rng(0).choice([-5, -1, 1, 5], (1, 128, 576)).astype(np.int32)
    stream = pack(Quantised(integers, np.zeros((1, 576), np.int32)), layout)
    assert len(stream) <= 1.02 * integers.size * 2 / 8


def test_rows_and_columns_of_different_scales_need_fewer_bits_than_their_common_entropy() -> None:
    layout = Layout((256, 64, 9))
    quantised = random_quantised(layout, rows=False)
    counts = np.unique(quantised.integers_GON, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert len(pack(quantised, layout)) < 0.9 * entropy


def test_values_are_integers_times_steps_times_factors() -> None:
    quantised = Quantised(
        np.array([[[1, -2], [3, 0]]], np.int32), np.array([[4, -8]], np.int32), np.array([[0, 2]], np.int32),
        np.array([[1.0, 0.5]], np.float32),
    )  # fmt: skip
    expected = [[[2.0, -0.5], [3 * 2 * math.sqrt(2) * 0.5, 0.0]]]
    assert quantised.values() == pytest.approx(np.array(expected), rel=1e-15)


def test_integers_and_steps_out_of_range_are_refused() -> None:
    layout = Layout((1, 1))
    steps = np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="an integer of 8192 is above 8191: use larger steps"):
        pack(Quantised(np.full((1, 1, 1), 8192, np.int32), steps), layout)
    with pytest.raises(ValueError, match="a step is out of range"):
        pack(Quantised(np.ones((1, 1, 1), np.int32), steps + 5000), layout)
    apart = np.array([[0, 1100]], np.int32)
    with pytest.raises(ValueError, match="its steps differ too much"):
        pack(Quantised(np.ones((1, 1, 2), np.int32), apart), Layout((1, 2)))


def test_damaged_streams_are_refused_or_decode_to_other_values() -> None:
    """No damage may crash the process, take long, or need memory beyond the tensor's size."""
    layout = LAYOUTS["3x3"]
    stream = pack(random_quantised(layout), layout)
    generator, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(stream)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        del damaged[generator.choice([len(damaged), generator.randrange(len(damaged))]) :]
        try:
            quantised = unpack(bytes(damaged), layout)
        except ValueError:
            refused += 1
        else:
            assert quantised.integers_GON.shape == (1, 4, 27)
    assert refused > 200


def test_few_integers_do_not_get_many_large_tables() -> None:
    """Each table of 8,191 weights takes a tenth of a second: a file of many such streams would take hours."""
    layout = Layout((4, 1))
    integers = np.full((1, 4, 1), 8191, np.int32)
    steps = Quantised(integers, np.zeros((1, 1), np.int32), np.array([[-40, -10, 10, 40]], np.int32))
    stream = pack(steps, layout)
    assert same(unpack(stream, layout), steps), "few integers are coded by their counts instead"
    assert not too_many_tables(20, 30, 288)
    assert too_many_tables(100, 8191, 100)


def test_a_stream_with_too_many_tables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((4, 1))
    integers = np.full((1, 4, 1), 8191, np.int32)
    row_steps = np.array([[-40, -10, 10, 40]], np.int32)
    with monkeypatch.context() as patch:
        patch.setattr("harmconvert.codecs.stream.too_many_tables", lambda *sizes: False)
        stream = pack(Quantised(integers, np.zeros((1, 1), np.int32), row_steps), layout)
        assert np.array_equal(unpack(stream, layout).integers_GON, integers), "a valid stream but for its tables"
    with pytest.raises(ValueError, match="it has more tables than a tensor of its size may have"):
        unpack(stream, layout)


# --- files ---


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    conversion = hc.convert(seeded(Branches), 3, example_input=random_input((2, 3, 16, 16)))
    state = conversion.model.state_dict()
    names = [key for key in state if key.endswith("coefficients") and not key.startswith(("alias", "tied_b"))]
    entries = {key: QUANTISED.entry(state[key]) for key in names}
    model = as_stored(conversion.model, entries)
    hc.save(replace(conversion, model=model, coded=entries), tmp_path / "coded.safetensors")
    return tmp_path / "coded.safetensors"


def test_a_quantised_file_is_smaller_and_reads_back_exactly(coded: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    network = read_checkpoint(coded, model=seeded(Branches, seed=1))
    hc.save(replace(network, header=None), plain)
    assert coded.stat().st_size < plain.stat().st_size
    again = read_checkpoint(plain, model=seeded(Branches, seed=1)).model.state_dict()
    for key, value in network.model.state_dict().items():
        assert torch.equal(value, again[key])


def test_a_second_reader_reads_a_quantised_file(coded: Path) -> None:
    checkpoint = second_reader.read(coded)
    assert checkpoint.whole
    state = read_checkpoint(coded, model=seeded(Branches, seed=1)).model.state_dict()
    for key, value in checkpoint.tensors.items():
        assert np.array_equal(value, state[key].numpy()), key


def test_a_network_from_a_quantised_file_is_saved_with_the_same_streams(coded: Path, tmp_path: Path) -> None:
    network = read_checkpoint(coded, model=seeded(Branches, seed=1))
    hc.save(network, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").stat().st_size <= coded.stat().st_size + 64


def test_a_damaged_quantised_file_is_refused(coded: Path) -> None:
    data = bytearray(coded.read_bytes())
    data[-20] ^= 255
    coded.write_bytes(data)
    with pytest.raises(InputError, match=r"coded.safetensors is damaged, .* get the file again"):
        read_checkpoint(coded, model=seeded(Branches, seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": -1}, "bytes"),
        ({"bytes": 3.5}, "bytes"),
        ({"groups": 0}, "groups of rows"),
        ({"groups": 5}, "groups of rows"),
        ({"transposed": 1}, "transposed"),
        ({"unknown": 1}, "unknown parameter 'unknown'"),
    ],
)
def test_an_invalid_entry_is_refused(changes: dict[str, Any], message: str) -> None:
    entry = QUANTISED.entry(torch.randn(4, 3, 9))
    with pytest.raises((ValueError, InputError), match=message):
        QUANTISED.check(replace(entry, parameters={**entry.parameters, **changes}))


def test_an_entry_for_integers_is_refused() -> None:
    with pytest.raises(ValueError, match="not a floating-point"):
        QUANTISED.check(Entry("quantised", 1, (4, 3), torch.int64, {"bytes": 10}))
