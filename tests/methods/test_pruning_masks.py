"""Masks and scores: exact zeros, exact shares, the thresholds of the reference code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filtrun.errors import UserError
from filtrun.methods.pruning import scores
from filtrun.methods.pruning.masks import MaskSet


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3)


def test_masks_write_plus_zero_and_survive_storing(layer):
    masks = MaskSet()
    keep = torch.rand(layer.weight.shape) > 0.5
    masks.set("w", layer.weight, keep)
    masks.set("b", layer.bias, torch.tensor([1, 1, 0, 1, 0, 1]).bool(), "filter")
    with torch.no_grad():
        layer.weight[~keep] = float("nan")
    before = layer.weight.detach().clone()
    masks.apply()
    assert torch.equal(layer.weight[keep], before[keep])
    assert (layer.weight[~keep] == 0).all() and not torch.signbit(layer.weight[~keep]).any()
    zeros = int((~keep).sum()) + 2
    assert masks.sparsity() == pytest.approx(zeros / (layer.weight.numel() + 6))
    assert masks.shares() == pytest.approx({"w": keep.double().mean().item(), "b": 4 / 6})
    other, copy = MaskSet(), nn.Conv2d(4, 6, 3)
    other.load_state_dict(masks.state_dict(), {"w": copy.weight, "b": copy.bias})
    assert torch.equal(other["w"], keep) and other.entries["b"].granularity == "filter"
    assert torch.equal(copy.weight == 0, ~keep) and (copy.bias[[2, 4]] == 0).all()


def test_filter_masks_broadcast_and_gradients_are_masked(layer):
    masks = MaskSet()
    keep = torch.tensor([True, False, True, True, False, True])
    masks.set("w", layer.weight, keep.view(6, 1, 1, 1), "filter")
    layer(torch.rand(1, 4, 5, 5)).sum().backward()
    masks.apply()
    masks.apply_to_gradients()
    assert masks.sparsity() == pytest.approx(1 / 3)
    for tensor in (layer.weight, layer.weight.grad):
        assert torch.equal(tensor.flatten(1).any(1), keep)


def test_masks_that_do_not_fit_are_refused(layer):
    masks = MaskSet()
    with pytest.raises(ValueError, match="does not fit"):
        masks.set("w", layer.weight, torch.ones(5, 1, 1, 1).bool())
    masks.set("w", layer.weight, torch.ones(6, 1, 1, 1).bool())
    with pytest.raises(UserError, match="no such tensor"):
        MaskSet().load_state_dict(masks.state_dict(), {})
    with pytest.raises(UserError, match="does not fit"):
        MaskSet().load_state_dict(masks.state_dict(), {"w": layer.bias})


@pytest.mark.parametrize("density", [0.1, 0.35, 0.5, 1.0, 0.0, 1 - 0.9])
def test_thresholds_drop_exactly_k(density):
    torch.manual_seed(1)
    table = {"a": torch.rand(7, 9), "b": torch.rand(40) * 2}
    whole = torch.cat([t.flatten() for t in table.values()])
    found = scores.keep_masks(table, density)
    k = int((1 - density) * 103)
    gone = whole.argsort()[:k]
    expected = torch.ones(103, dtype=torch.bool).index_fill_(0, gone, False)
    assert torch.equal(torch.cat([found["a"].flatten(), found["b"]]), expected)
    local = scores.keep_masks(table, density, "local")
    assert [int((~m).sum()) for m in local.values()] == [int((1 - density) * 63), int((1 - density) * 40)]


def test_ties_at_the_threshold_all_go():
    found = scores.keep_masks({"a": torch.tensor([1.0, 1.0, 1.0, 2.0])}, 0.75)
    assert found["a"].tolist() == [False, False, False, True]


def test_scores_are_their_formulas(layer):
    x = torch.rand(3, 4, 6, 6)
    layer(x).square().sum().backward()
    w, g = layer.weight.detach(), layer.weight.grad
    assert torch.equal(scores.magnitude(w), w.abs()) and torch.equal(scores.magnitude(w, 2), w * w)
    assert torch.allclose(scores.filter_norm(w, 1), w.abs().sum((1, 2, 3)))
    assert torch.equal(scores.taylor(w, g), (w * g).abs()) and torch.equal(scores.taylor(w, g, True), (w * g) ** 2)
    gate = torch.ones_like(w, requires_grad=True)  # SNIP by its definition: the derivative by a mask
    nn.functional.conv2d(x, w * gate, layer.bias).square().sum().backward()
    found = scores.snip({"w": w}, {"w": g})["w"]
    assert torch.allclose(found, gate.grad.abs() / gate.grad.abs().sum(), atol=1e-9) and math.isclose(
        found.sum(), 1, rel_tol=1e-5
    )
    one, two = scores.random_scores({"w": w}, 3)["w"], scores.random_scores({"w": w}, 3)["w"]
    assert torch.equal(one, two) and not torch.equal(one, scores.random_scores({"w": w}, 4)["w"])


def test_prunable_weights_are_layers_and_can_be_left_out():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    assert list(scores.prunable_weights(model)) == ["0.weight", "2.0.weight", "2.1.weight"]
    assert list(scores.prunable_weights(model, ["2"])) == ["0.weight"]
    with pytest.raises(UserError, match="ignore=head names no module"):
        scores.prunable_weights(model, ["head"])
    with pytest.raises(UserError, match="no convolution"):
        scores.prunable_weights(model, ["0", "2"])
