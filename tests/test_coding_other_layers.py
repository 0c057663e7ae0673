"""Coding the weights of recurrent layers, embeddings and attention modules, with calibration inputs and without."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from timm.models.sequencer import Sequencer2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import harmconvert as hc
from harmconvert.codecs import codec_of, layout_of, unpack
from harmconvert.errors import InputError, UsageError
from harmconvert.network import tensors_of
from harmconvert.plan import LayerPlan, Plan, Rank

from . import second_reader
from .commands import fails, ok
from .networks import random_input, seeded

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

IMAGES = random_input((24, 1, 8, 12), seed=3)


class Recogniser(nn.Module):
    """A text recogniser: a convolution, a recurrent layer over the columns of an image, and a linear layer."""

    def __init__(self, recurrent: Callable[..., nn.Module], outputs: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.recurrent = recurrent(64, 16, batch_first=True, **options)
        self.head = nn.Linear(outputs, 7)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.conv(x).relu().flatten(1, 2).mT
        return self.head(self.recurrent(columns)[0])


class Cells(nn.Module):
    """Recurrent cells that are called one after the other for each column of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.plain, self.gated, self.long = nn.RNNCell(64, 16), nn.GRUCell(16, 16), nn.LSTMCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = [None, None, None]
        for column in self.conv(x).relu().flatten(1, 2).unbind(2):
            state[0] = self.plain(column, state[0])
            state[1] = self.gated(state[0], state[1])
            state[2] = self.long(state[1], state[2])
        return state[2][0]  # type: ignore[no-any-return]


class Captions(nn.Module):
    """An image and a text of tokens as inputs; the decoder has the weight of the embedding, or stands before it."""

    def __init__(self, decoder_first: bool = False, sparse: bool = False) -> None:
        super().__init__()
        if decoder_first:
            self.decoder = nn.Linear(16, 30, bias=False)
        self.conv = nn.Conv2d(1, 16, 3)
        self.embedding = nn.Embedding(30, 16, padding_idx=0, sparse=sparse)
        self.bag = nn.EmbeddingBag(30, 16, sparse=sparse)
        if not decoder_first:
            self.decoder = nn.Linear(16, 30, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        scene = self.conv(image).relu().mean((2, 3))[:, None]
        return self.decoder(scene + self.embedding(tokens) + self.bag(tokens)[:, None])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A convolution, a layer of a transformer, which torch computes in one fast function, and cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=4, batch_first=True)
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.conv(x).flatten(2).mT)
        return self.head(self.cross(tokens, x[:, 0, :, :8], x[:, 0, :, 8:])[0].mean(1))  # type: ignore[no-any-return]


def _captions(**options: bool) -> Callable[[], nn.Module]:
    return lambda: Captions(**options)


def _recogniser(*arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Recogniser(*arguments, **options)


TOKENS = torch.arange(24 * 5).reshape(24, 5) * 7 % 30
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], set[str]]] = {
    "LSTM": (
        _recogniser(nn.LSTM, 16, bidirectional=True, proj_size=8),
        (IMAGES,),
        {f"recurrent.weight_{part}_l0{end}" for part in ("ih", "hh", "hr") for end in ("", "_reverse")},
    ),
    "GRU": (_recogniser(nn.GRU, 16), (IMAGES,), {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}),
    "RNN": (_recogniser(nn.RNN, 16), (IMAGES,), {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}),
    "cells": (
        Cells, (IMAGES,), {f"{cell}.weight_{part}" for cell in ("plain", "gated", "long") for part in ("ih", "hh")}
    ),
    "embeddings": (_captions(), (IMAGES, TOKENS), {"embedding.weight", "bag.weight"}),
    "sparse embeddings, the decoder first": (
        _captions(decoder_first=True, sparse=True), (IMAGES, TOKENS), {"decoder.weight", "bag.weight"}
    ),
    "attention": (
        Attention, (IMAGES,),
        {"encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight", "cross.out_proj.weight",
         "cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight"},
    ),
}  # fmt: skip


PARAMETERS = [(name, calibrated) for name in NETWORKS for calibrated in (False, True)]


def inputs_of(inputs: tuple[Tensor, ...]) -> Any:
    """Return the arguments of a network as it takes them in a batch."""
    return inputs[0] if len(inputs) == 1 else {"image": inputs[0], "tokens": inputs[1]}


def batches_of(inputs: tuple[Tensor, ...]) -> list[Any]:
    return [inputs_of(part) for part in zip(*(tensor.split(8) for tensor in inputs), strict=True)]


def bits_of(conversion: hc.Conversion) -> float:
    """Return the average bits per coded weight, counted in the streams."""
    sizes = [codec_of(entry).bytes(entry) for entry in conversion.coded.values()]
    return 8 * sum(sizes) / sum(math.prod(entry.shape) for entry in conversion.coded.values())


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    expected, actual = tensors_of(first), tensors_of(second)
    return expected.keys() == actual.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("name", "calibrated"), PARAMETERS)
def test_matrices_are_coded_and_read_back_bit_for_bit(name: str, calibrated: bool, tmp_path: Path) -> None:
    make, inputs, matrices = NETWORKS[name]
    model = seeded(make)
    example = inputs_of(tuple(tensor[:2] for tensor in inputs))
    conversion = hc.convert(
        model, bits=5, calibration=batches_of(inputs) if calibrated else None, example_input=example
    )  # fmt: skip
    before, after = tensors_of(model), tensors_of(conversion.model)
    assert matrices <= {*conversion.coded}
    for key in matrices:
        # On inputs, matrices whose errors hardly change the outputs get few bits.
        assert 0 < float((after[key] - before[key]).norm() / before[key].norm()) < (0.6 if calibrated else 0.1), key
    floats = [
        key for key in before if key in after and key.startswith(("recurrent.bias", "norm", "cross.in_proj_bias"))
    ]
    assert all(torch.equal(before[key], after[key]) for key in floats)
    path = tmp_path / "coded.safetensors"
    hc.save(conversion, path)
    loaded = hc.load(path, model=model)
    assert same_tensors(conversion.model, loaded)
    read = second_reader.read(path)
    assert read.whole
    for key in matrices:
        assert torch.equal(torch.from_numpy(read.tensors[key]), after[key]), key
    with torch.no_grad():
        expected = conversion.model(*inputs)
        assert torch.equal(loaded(*inputs), expected)
        assert 0 < float((expected - model(*inputs)).norm() / model(*inputs).norm()) < 0.15
        # The outputs are those of the written values, not of copies that a module holds.
        fresh = seeded(make, seed=1)
        fresh.load_state_dict(hc.load(path, model=model, form="dense").state_dict())
        assert torch.allclose(fresh(*inputs), expected, atol=1e-5)
    check = hc.verify(model, conversion, example)
    assert check.as_planned, check.problems
    planned = conversion.plan.on("precision")
    assert check.verdict.startswith(f"coded as planned in {len(planned)} of {len(planned)} layers: ")


def test_calibration_gives_recurrent_layers_bits_by_the_effect_of_their_errors() -> None:
    make, inputs, _ = NETWORKS["LSTM"]
    model = seeded(make)
    coded = hc.convert(model, bits=4, calibration=batches_of(inputs))
    rounded = hc.convert(model, bits=4)
    assert bits_of(coded) == pytest.approx(bits_of(rounded), rel=0.02)
    with torch.no_grad():
        errors = [float((one.model(*inputs) - model(*inputs)).norm()) for one in (coded, rounded)]
    assert errors[0] < 0.6 * errors[1]
    assert coded.calibration is not None
    record = next(layer for layer in coded.calibration.layers if layer.name == "recurrent")
    assert record.why == "its inputs cannot be observed"
    assert record.bits == pytest.approx(coded.plan.on("precision")["recurrent"].bits, abs=1e-3)


@pytest.mark.parametrize("bits", [2.0, 4.0])
def test_the_bits_are_an_average_over_all_coded_weights(bits: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(500, 64), nn.LSTM(64, 64)))
    conversion = hc.convert(model, bits=bits)
    assert {*conversion.coded} == {"0.weight", "1.weight_ih_l0", "1.weight_hh_l0"}
    assert bits_of(conversion) == pytest.approx(bits, rel=0.02)
    kept = conversion.plan.on("precision")
    assert conversion.cost.harmonic_bytes < conversion.cost.bytes * bits / 32 + 3000
    assert (500 * 64 * kept["0"].bits + 2 * 256 * 64 * kept["1"].bits) / (500 * 64 + 2 * 256 * 64) == pytest.approx(
        bits, rel=0.02
    )


def test_tied_weights_are_coded_once_and_stay_tied(tmp_path: Path) -> None:
    for number, decoder_first in enumerate((False, True)):
        model = seeded(_captions(decoder_first=decoder_first))
        key = "decoder.weight" if decoder_first else "embedding.weight"
        for bits in ({"*": 4}, {"decoder": 4}, {"embedding": 4}):
            conversion = hc.convert(model, bits=bits)
            assert ({"decoder.weight", "embedding.weight"} & {*conversion.coded}) == {key}
            assert {"decoder", "embedding"} <= {*conversion.plan.on("precision")}
            assert hc.verify(model, conversion, inputs_of((IMAGES[:2], TOKENS[:2]))).as_planned
        path = tmp_path / f"{number}.safetensors"
        hc.save(conversion, path)
        loaded: Any = hc.load(path, model=model)
        assert loaded.decoder.weight is loaded.embedding.weight
        assert not loaded.embedding.weight[0].any(), "the row of the padding"
        with safetensors.safe_open(path, "pt") as file:
            assert len({"decoder.weight", "embedding.weight"} & {*file.keys()}) == 1
        skipped = {skip.name for skip in hc.convert(model, bits=4, exclude=["decoder"]).plan.skipped}
        assert skipped == {"decoder", "embedding"}


def test_calibration_does_not_fit_a_decoder_whose_weight_is_an_embedding() -> None:
    make, inputs, _ = NETWORKS["embeddings"]
    record = hc.convert(seeded(make), bits=4, calibration=batches_of(inputs)).calibration
    assert record is not None
    decisions = {layer.name: (layer.decision, layer.why) for layer in record.layers}
    assert decisions["decoder"] == decisions["embedding"] == ("projection", "its inputs cannot be observed")
    assert decisions["conv"][0] == "refit"


def test_a_weight_that_a_module_of_another_class_shares_is_coded_and_verified() -> None:
    class Output(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    def make() -> nn.Module:
        embedding = nn.Embedding(20, 8)
        return nn.Sequential(embedding, Output(embedding.weight))

    model, tokens = seeded(make), torch.arange(20).reshape(4, 5)
    conversion = hc.convert(model, bits=4)
    assert len(conversion.coded) == 1
    check = hc.verify(model, conversion, tokens)
    assert check.as_planned, check.problems


def test_without_bits_nothing_changes_for_networks_with_such_layers() -> None:
    for name, (make, inputs, matrices) in NETWORKS.items():
        model = seeded(make)
        conversions = [hc.convert(model, 2, example_input=inputs_of(inputs)), hc.convert(model, rank=0.5)]
        for conversion in conversions:
            before, after = tensors_of(model), tensors_of(conversion.model)
            modules = {
                "recurrent",
                "plain",
                "gated",
                "long",
                "embedding",
                "bag",
                "encoder.self_attn",
                "cross",
                "decoder",
            }
            assert not modules & {layer.name for layer in (*conversion.plan.layers, *conversion.plan.skipped)}, name
            same = [key for key in matrices if "out_proj" not in key]
            assert all(torch.equal(before[key], after[key]) for key in same)


def test_patterns_name_them_and_the_others_stay_in_floating_point() -> None:
    make, _, matrices = NETWORKS["LSTM"]
    conversion = hc.convert(seeded(make), bits={"recurrent": 3})
    assert {*conversion.coded} == matrices
    with pytest.raises(
        UsageError, match=r"'x' matches no layer with weights to code \(there are: conv, recurrent, head"
    ):
        hc.convert(seeded(make), bits={"x": 3})
    only = hc.convert(seeded(make), bits=3, include=["conv"])
    assert {*only.coded} == {"conv.coefficients"}
    assert {skip.name: skip.why for skip in only.plan.skipped}["recurrent"] == "not among those to include"


def test_a_changed_matrix_is_reported() -> None:
    make, inputs, _ = NETWORKS["LSTM"]
    model = seeded(make)
    conversion = hc.convert(model, bits=4)
    with torch.no_grad():
        conversion.model.recurrent.weight_hh_l0[0, 0] += 0.25
    problems = hc.verify(model, conversion, inputs[0][:2]).problems
    assert problems == ("recurrent: its weights are not those that were coded",)
    with torch.no_grad():
        conversion.model.recurrent.bias_hh_l0[0] += 0.25
    problems = hc.verify(model, conversion, inputs[0][:2]).problems
    assert "recurrent.bias_hh_l0: differs from the original's" in problems


def test_weights_that_change_in_each_forward_or_are_computed_stay_in_floating_point() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(60, 16, max_norm=0.5), nn.Linear(16, 4)))
    conversion = hc.convert(model, bits=4)
    assert {*conversion.coded} == {"1.weight"}
    (skip,) = conversion.plan.skipped
    assert (skip.name, skip.why) == ("0", "it changes its weight in each forward pass (max_norm)")
    recurrent: Any = seeded(_recogniser(nn.GRU, 16))
    parametrizations.weight_norm(recurrent.recurrent, "weight_hh_l0")
    assert {key for key in hc.convert(recurrent, bits=4).coded if "recurrent" in key} == {"recurrent.weight_ih_l0"}


def test_a_plan_that_gives_them_another_axis_is_refused(tmp_path: Path) -> None:
    model = seeded(_recogniser(nn.GRU, 16))
    plan = Plan((LayerPlan("recurrent", (), (Rank(2),)),))
    with pytest.raises(UsageError, match=r"layer recurrent \(GRU\) has no axis channels"):
        hc.convert(model, plan)
    space = {"name": "recurrent", "kernel_size": [], "space": {"frequencies": [[]]}}
    with pytest.raises(InputError, match="layer 'recurrent': it has no kernel, so it keeps no frequencies"):
        Plan.from_json({"layers": [space]})
    other = nn.Sequential()
    other.recurrent = nn.Linear(16, 16)
    hc.save(hc.convert(other, rank={"*": 2}), tmp_path / "ranked.safetensors")
    with pytest.raises(InputError, match="does not fit this Recogniser: it has no such layer: recurrent"):
        hc.load(tmp_path / "ranked.safetensors", model=model)


def test_a_budget_of_bytes_counts_them(tmp_path: Path) -> None:
    model = seeded(_recogniser(nn.LSTM, 32, bidirectional=True))
    conversion = hc.convert(model, budget="bytes=20%")
    hc.save(conversion, tmp_path / "coded.safetensors")
    with safetensors.safe_open(tmp_path / "coded.safetensors", "pt") as file:
        size = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  not a dict
    assert size == conversion.cost.harmonic_bytes
    assert conversion.search is not None
    assert 0.9 * conversion.search.limit < (tmp_path / "coded.safetensors").stat().st_size <= conversion.search.limit


def test_they_are_coded_beside_layers_of_low_rank(tmp_path: Path) -> None:
    make, inputs, matrices = NETWORKS["attention"]
    model = seeded(make)
    conversion = hc.convert(model, 2, rank={"encoder.linear1": 0.5}, bits=4, calibration=batches_of(inputs))
    assert matrices | {"encoder.linear1.coefficients_in", "encoder.linear1.coefficients_out"} <= {*conversion.coded}
    hc.save(conversion, tmp_path / "coded.safetensors")
    assert same_tensors(conversion.model, hc.load(tmp_path / "coded.safetensors", model=model))
    assert hc.verify(model, conversion, inputs[0][:2]).as_planned


def test_an_inspection_counts_them() -> None:
    model = seeded(_captions())
    inspection = hc.inspect(model)
    assert inspection.codable_parameters == 16 * 9 + 2 * 30 * 16
    assert inspection.other_bytes == 4 * 16


def test_a_network_of_only_such_layers_is_coded_on_inputs(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(40, 16), nn.LSTM(16, 16)))
    conversion = hc.convert(model, bits=4, calibration=list((torch.arange(256) * 7 % 40).reshape(32, 8).split(8)))
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    hc.save(conversion, first)
    assert same_tensors(conversion.model, hc.load(first, model=model))
    hc.save(hc.storage.read_checkpoint(first, model=model), second)
    assert {*hc.storage.read_header(second).codecs.coded} == {*conversion.coded}
    assert same_tensors(conversion.model, hc.load(second, model=model))


def test_a_network_of_timm_with_recurrent_layers_is_coded(tmp_path: Path) -> None:
    model = seeded(
        lambda: Sequencer2d(
            num_classes=5, img_size=32, layers=(1, 1, 1, 1), embed_dims=(16, 24, 24, 24), hidden_sizes=(4, 6, 6, 6)
        )
    )
    x = random_input((16, 3, 32, 32))
    conversion = hc.convert(model, bits=4)
    assert "stages.0.blocks.0.rnn_tokens.rnn_v.weight_hh_l0_reverse" in conversion.coded
    path = tmp_path / "coded.safetensors"
    hc.save(conversion, path)
    with torch.no_grad():
        assert torch.equal(hc.load(path, model=model)(x), conversion.model(x))
    assert hc.verify(model, conversion, x[:2]).as_planned


def test_networks_in_16_bits_keep_their_dtype(tmp_path: Path) -> None:
    model = seeded(_captions()).bfloat16()
    conversion = hc.convert(model, bits=4)
    hc.save(conversion, tmp_path / "coded.safetensors")
    assert conversion.coded["embedding.weight"].dtype == torch.bfloat16
    loaded = hc.load(tmp_path / "coded.safetensors", model=seeded(_captions()).bfloat16())
    assert same_tensors(conversion.model, loaded)


# --- the command line, and training ---

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    num_classes = 10

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.recurrent = nn.GRU(52, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.recurrent(self.conv(x).relu().flatten(1, 2).mT)[0][:, -1])

def make():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path


def test_the_commands_code_inspect_and_read_them(folder: Path) -> None:
    own = ("--input-size", "1,28,28")
    result = ok("convert", "net.py:make", *own, "--bits", "4", "-o", "a.safetensors")
    assert "coded: 4 tensors with 3,460 weights" in result.stdout
    assert "large tensors that are not coded: recurrent.bias_ih_l0" in result.stdout
    assert "coded as planned in 3 of 3 layers" in result.stdout
    ok("verify", "net.py:make", "a.safetensors", *own, "--as-planned", "--trust-code")
    ok("inspect", "net.py:make", *own)
    ok("report", "a.safetensors", "--trust-code", "-o", "report.html")
    ok("convert", "a.safetensors", "--trust-code", "--bits", "3", "--dtype", "float16", *own, "-o", "b.safetensors")
    assert (folder / "b.safetensors").stat().st_size < (folder / "a.safetensors").stat().st_size
    ok("convert", "net.py:make", *own, "--budget", "bytes=30%", "-o", "c.safetensors")
    fails(
        2,
        "matches no layer with weights to code",
        "convert",
        "net.py:make",
        *own,
        "--bits",
        "x=3",
        "-o",
        "d.safetensors",
    )


@pytest.mark.slow
def test_finetuning_keeps_the_integers_and_recode_codes_again(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(CODE, space)
    conversion = hc.convert(space["make"]().eval(), bits=4)
    recipe: dict[str, Any] = {
        "preprocessing": {"input_size": (1, 28, 28), "preprocess": "none"}, "epochs": 1, "lr": 0.05, "crop": "none",
    }  # fmt: skip
    tuned = hc.finetune(conversion, "sample:mnist5k", tmp_path / "a.safetensors", **recipe, calibration_images=0)
    again = hc.finetune(conversion, "sample:mnist5k", tmp_path / "b.safetensors", **recipe, recode=True)
    for result, path in ((tuned, "a.safetensors"), (again, "b.safetensors")):
        loaded = hc.load(tmp_path / path, model=space["make"]())
        assert same_tensors(result.model, loaded)
        assert result.header is not None
        same = [
            np.array_equal(*(unpack(one.stream.numpy().tobytes(), layout_of(one)).integers_GON for one in pair))
            for pair in ((entry, result.header.codecs.coded[key]) for key, entry in conversion.coded.items())
        ]
        assert all(same) if result is tuned else not any(same)
