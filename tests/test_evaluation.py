"""Evaluation: metrics that can be checked by hand, and networks that cannot be evaluated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from harmconvert.data import Batch
from harmconvert.errors import InputError
from harmconvert.metrics import wilson_interval
from harmconvert.training import Evaluation, evaluate

from . import oracle

# Six images, ten classes: an identity network has these logits as its output.
LOGITS = torch.eye(10)[[0, 1, 2, 3, 4, 5]] * 4
LABELS = torch.tensor([0, 1, 2, 9, 9, -1])
BATCHES = [Batch(LOGITS[:4], LABELS[:4], []), Batch(LOGITS[4:], LABELS[4:], ["broken.png"])]


class Same(nn.Module):
    num_classes = 10

    def __init__(self, shift: Tensor | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(10) if shift is None else shift)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_top1_counts_only_labelled_images() -> None:
    found = evaluate(Same(), BATCHES)
    assert (found.images, found.labelled, found.unreadable) == (6, 5, ("broken.png",))
    assert found.top1 == pytest.approx(3 / 5)
    normaliser = math.log(math.exp(4) + 9)
    assert found.loss == pytest.approx((3 * (normaliser - 4) + 2 * normaliser) / 5)
    assert found.agreement is None
    assert found.images_per_second > 0


def test_top5_counts_images_whose_label_is_among_the_five_largest_logits() -> None:
    order = torch.arange(10.0)[None].repeat(2, 1)  # classes 5 to 9 have the five largest logits
    assert evaluate(Same(), [Batch(order, torch.tensor([5, 4]), [])]).top5 == 0.5
    few = torch.arange(3.0)[None]
    net = nn.Identity()
    assert evaluate(net, [Batch(few, torch.tensor([0]), [])]).top5 == 1


def test_agreement_and_divergence_equal_a_calculation_by_hand() -> None:
    shift = torch.zeros(10)
    shift[9] = 6.0  # the other network predicts 9 for every image
    found = evaluate(Same(), BATCHES, Same(shift))
    assert found.agreement == 0
    both = LOGITS.double().numpy(), (LOGITS + shift).double().numpy()
    assert found.divergence == pytest.approx(oracle.softened_kl(*both, temperature=1), rel=1e-9)
    same = evaluate(Same(), BATCHES, Same())
    assert (same.agreement, same.divergence) == (1, pytest.approx(0))


def test_evaluation_does_not_change_the_network() -> None:
    net = nn.Sequential(nn.BatchNorm1d(10), Same()).train()
    net[0].eval()
    before = net[0].running_mean.clone()
    evaluate(net, BATCHES)
    assert net.training
    assert not net[0].training
    assert torch.equal(net[0].running_mean, before)


@given(st.integers(1, 500), st.integers(0, 500))
def test_wilsons_interval_solves_its_equation(count: int, right: int) -> None:
    """The bounds are the shares p with |observed share - p| = z sqrt(p (1 - p) / n)."""
    seen = min(right, count) / count
    low, high = wilson_interval(seen, count)
    assert 0 <= low <= seen + 1e-12
    assert seen - 1e-12 <= high <= 1
    for bound in (low, high):
        z = abs(seen - bound) / math.sqrt(bound * (1 - bound) / count) if 1e-9 < bound < 1 - 1e-9 else 1.959963984540054
        assert z == pytest.approx(1.959963984540054, rel=1e-6)


def test_labels_beyond_the_classes_are_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"label 10 is beyond the 10 classes.*check the data set \(data\), or .* finetune num_classes=N",
    ):
        evaluate(Same(), [Batch(LOGITS, torch.tensor([0, 0, 0, 0, 0, 10]), [])])


def test_networks_that_are_not_classifiers_are_refused() -> None:
    with pytest.raises(InputError, match=r"not a classifier: its output has shape \(1, 3, 4, 4\)"):
        evaluate(nn.Conv2d(1, 3, 1), [Batch(torch.zeros(1, 1, 4, 4), torch.tensor([0]), [])])


def test_networks_with_other_classes_cannot_be_compared() -> None:
    batches = [Batch(torch.zeros(2, 4), torch.tensor([0, 0]), [])]
    with pytest.raises(InputError, match="the two networks have 4 and 3 classes"):
        evaluate(nn.Identity(), batches, nn.Linear(4, 3))


def test_evaluation_without_images_is_refused() -> None:
    with pytest.raises(InputError, match=r"no images to evaluate on: none could be read \(a.png\)"):
        evaluate(Same(), [Batch(torch.empty(0), torch.empty(0, dtype=torch.long), ["a.png"])])


def test_an_evaluation_is_printed_and_converted_to_json() -> None:
    found = Evaluation(1000, 1000, 0.99, 1.0, 0.1, None, None, 10.0)
    assert str(found) == "top-1 99.00% (95 %: 98.17% to 99.46%), 1,000 images"
    assert found.to_json()["top1_interval"] == pytest.approx((0.9817, 0.9946), abs=1e-4)
    assert "agreement 50.00%, KL 0.1" in str(Evaluation(10, 0, None, None, None, 0.5, 0.1, 1.0))
