"""Streaming classification metrics against sklearn and hand-made values."""

from __future__ import annotations

import math

import pytest
import torch

from filtrun.errors import UserError
from filtrun.metrics.classify import ClassifyMeter, classify_metrics


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (500,), generator=generator)
    logits = 2 * torch.randn(500, 10, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 10)
    return logits, labels


def test_accuracy_top_five_and_nll_equal_sklearn(case):
    from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

    logits, labels = case
    probs = logits.double().softmax(1).numpy()
    got = classify_metrics(logits, labels, top_k=(1, 3, 5))
    assert got["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert got["top3"] == pytest.approx(top_k_accuracy_score(labels, probs, k=3))
    assert got["top5"] == pytest.approx(top_k_accuracy_score(labels, probs, k=5))
    assert got["nll"] == pytest.approx(log_loss(labels, probs), rel=1e-6)


def test_ece_equals_a_slow_loop(case):
    logits, labels = case
    confidence, predicted = logits.double().softmax(1).max(1)
    total = 0.0
    for m in range(15):
        rows = [i for i in range(500) if m / 15 < confidence[i] <= (m + 1) / 15]
        if rows:
            accuracy = sum((predicted[i] == labels[i]).item() for i in rows) / len(rows)
            total += len(rows) / 500 * abs(accuracy - sum(confidence[i].item() for i in rows) / len(rows))
    assert classify_metrics(logits, labels)["ece"] == pytest.approx(total, rel=1e-9)


def test_values_by_hand():
    # confidences 0.9 (right), 0.9 (wrong), 0.6 (right): bins (0.867, 0.933] and (0.533, 0.6]
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    got = classify_metrics(probs.log(), torch.tensor([0, 1, 1]))
    assert set(got) == {"accuracy", "nll", "ece"}  # top-5 of two classes says nothing
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.6)) / 3)
    assert got["ece"] == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.6)) / 3)


def test_batches_processes_and_the_whole_set_agree(case):
    logits, labels = case
    whole = classify_metrics(logits, labels)
    meters = [ClassifyMeter(10), ClassifyMeter(10)]
    for i, (x, y) in enumerate(zip(logits.split(64), labels.split(64), strict=True)):
        meters[i % 2].update(x, y)
    reduced = ClassifyMeter(10)
    reduced.state = meters[0].state + meters[1].state  # what an all-reduce does
    meters[0].merge(meters[1])
    assert meters[0].compute() == pytest.approx(whole, rel=1e-9)
    assert reduced.compute() == pytest.approx(whole, rel=1e-9)


def test_sure_and_half_precision_predictions():
    logits = torch.tensor([[50.0, 0.0], [0.0, 50.0]], dtype=torch.bfloat16)
    got = classify_metrics(logits, torch.tensor([0, 1]))
    assert got == pytest.approx({"accuracy": 1.0, "nll": 0.0, "ece": 0.0}, abs=1e-12)
    assert math.isnan(ClassifyMeter(2).compute()["accuracy"])
    with pytest.raises(UserError, match="bins=0"):
        ClassifyMeter(2, bins=0)
