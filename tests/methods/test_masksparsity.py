"""MaskSparsity: its penalty, thresholds, vote and phases."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.cost import operations
from filtrun.errors import Unfit, UserError
from filtrun.methods.pruning.bn_penalty import penalty_gradient
from filtrun.methods.pruning.masksparsity import MaskSparsity
from filtrun.methods.pruning.removal import tensors_of
from filtrun.methods.pruning.scale_masks import energy_threshold, keep_of, vote
from filtrun.methods.pruning.slimming import Slimming
from filtrun.models.mobilenet import MobileNetV2

RESNET = ["model=resnet20", "model.depth=8", "model.width=4"]


class Residual(nn.Module):
    """A stem and two blocks that add to it, all of 8 channels: one group of three batch norms, two inner ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False) for i in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = F.relu(self.norms[0](self.convs[0](x)))
        for i in (1, 3):
            inner = F.relu(self.norms[i](self.convs[i](h)))
            h = F.relu(h + self.norms[i + 1](self.convs[i + 1](inner)))
        return self.head(h.mean((2, 3)))


@pytest.fixture
def model():
    model = Residual()
    torch.manual_seed(1)
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.copy_(torch.rand(8) * torch.randn(8).sign())
    return model


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def gradients(model):
    model.zero_grad()
    model(X).square().sum().backward()
    return [norm.weight.grad.clone() for norm in model.norms]


def test_penalties_are_their_formulas():
    gamma = torch.tensor([0.5, -0.2, 0.0, 1e-6, -1e-6])
    assert penalty_gradient(gamma, 0.1).tolist() == pytest.approx([0.1, -0.1, 0, 0.1, -0.1])
    assert penalty_gradient(gamma, 0.1, "l2").tolist() == pytest.approx([0.05, -0.02, 0, 1e-7, -1e-7])
    assert penalty_gradient(gamma, 0.1, "smooth_l1", 1e-3).tolist() == pytest.approx([0.1, -0.1, 0, 1e-7, -1e-7])


def test_only_doomed_channels_are_penalised(model):
    method = MaskSparsity(s=0.1, threshold=0.4).attach(model, X[:1])
    assert len(method.scales) == 5
    plain = gradients(model)
    method.regularise()  # before the masks: all, as network slimming does
    slimming = copy.deepcopy(model)
    for mine, grad in zip(slimming.norms, plain, strict=True):
        mine.weight.grad = grad.clone()
    Slimming(s=0.1).regularise(slimming)
    assert all(torch.equal(a.weight.grad, b.weight.grad) for a, b in zip(model.norms, slimming.norms, strict=True))
    keeps = method.choose(model, X[:1])
    plain = gradients(model)
    method.regularise()
    for i, norm in enumerate(model.norms):
        keep = keeps.get(f"norms.{i}", torch.ones(8, dtype=torch.bool))
        assert torch.equal(norm.weight.grad[keep], plain[i][keep])
        expected = plain[i] + 0.1 * norm.weight.detach().sign()
        assert torch.equal(norm.weight.grad[~keep], expected[~keep])
    method.doomed = {}  # nothing doomed: a plain training
    plain = gradients(model)
    method.regularise()
    assert all(torch.equal(norm.weight.grad, grad) for norm, grad in zip(model.norms, plain, strict=True))


def test_groups_vote_and_inner_layers_decide_alone(model):
    method = MaskSparsity(threshold=0.4).attach(model, X[:1])
    keeps = method.choose(model, X[:1])
    scale = [norm.weight.detach().abs() for norm in model.norms]
    for i in (1, 3):
        assert torch.equal(keeps[f"norms.{i}"], scale[i] > 0.4)
    together = vote([scale[i] > 0.4 for i in (0, 2, 4)])
    assert all(torch.equal(keeps[f"norms.{i}"], together) for i in (0, 2, 4))
    masked = copy.deepcopy(model).eval()
    method.prune(model, X[:1])
    with torch.no_grad():
        for i, norm in enumerate(masked.norms):
            norm.weight[~keeps[f"norms.{i}"]] = 0
            norm.bias[~keeps[f"norms.{i}"]] = 0
        assert (masked(X) - model.eval()(X)).abs().max() < 1e-5
    sizes = [norm.num_features for norm in model.norms]
    assert sizes[0] == sizes[2] == sizes[4] == int(together.sum())
    assert method.numbers["channels"] == 24 and method.numbers["channels_left"] == sizes[0] + sizes[1] + sizes[3]


def test_residual_groups_can_be_left_alone(model):
    method = MaskSparsity(threshold=0.4, residual=False).attach(model, X[:1])
    assert sorted(method.scales) == ["norms.1", "norms.3"]
    method.prune(model, X[:1])
    assert [model.norms[i].num_features for i in (0, 2, 4)] == [8, 8, 8]


def test_the_vote_by_brute_force():
    """As few votes as needed to remove at least what the most modest member would, all of a rank at once."""
    for bits in itertools.product([0, 1], repeat=9):
        keeps = [torch.tensor(bits[i : i + 3]).bool() for i in (0, 3, 6)]
        modest = min(int((~k).sum()) for k in keeps)
        votes = [sum(int(not k[c]) for k in keeps) for c in range(3)]
        for needed in (3, 2, 1):
            gone = [v >= needed for v in votes]
            if sum(gone) >= modest:
                break
        assert vote(keeps).tolist() == [not g for g in gone]


def test_thresholds_and_the_guard():
    scales = torch.tensor([0.001, 0.002, 0.5, 0.6])
    assert energy_threshold(scales, 1e-4) == pytest.approx((0.002 + 0.5) / 2)
    assert energy_threshold(torch.tensor([0.5, 0.6]), 1e-4) == 0.0 and energy_threshold(torch.full((3,), 9e-4)) == 1.0
    assert keep_of(scales, 0.002).tolist() == [False, False, True, True]  # at the threshold goes
    assert keep_of(scales, 0.7).tolist() == [False, False, False, True]
    assert keep_of(torch.full((3,), 0.1), 0.7).tolist() == [True, False, False]
    random = np.random.default_rng(0)
    for _ in range(20):
        values = np.sort(random.random(12) ** 6)
        energy = np.cumsum(values**2) / np.sum(values**2)
        first = int(np.argmax(energy > 0.01))
        expected = (values[first - 1] + values[first]) / 2 if first else 0.0
        assert energy_threshold(torch.tensor(values), 0.01) == pytest.approx(expected)


def test_no_layer_is_left_empty_and_depthwise_layers_inherit():
    torch.manual_seed(0)
    model, x = MobileNetV2(width=0.1), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0, 0.02)
    MaskSparsity().attach(model, x).prune(model, x)
    assert model.eval()(x).shape == (1, 10)
    assert min(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)) >= 1
    rest = copy.deepcopy(model)
    MaskSparsity(threshold=10.0).attach(rest, x).prune(rest, x)  # all below: one channel stays in each
    assert rest.eval()(x).shape == (1, 10)
    assert {m.num_features for m in rest.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


def test_a_share_of_the_multiply_adds(model):
    with torch.no_grad():
        before = operations(lambda: model(X))["macs"]
    MaskSparsity(macs=0.6).attach(model, X[:1]).prune(model, X[:1])
    with torch.no_grad():
        after = operations(lambda: model(X))["macs"]
    assert 0.2 * before < after <= 0.4 * before


def test_the_phases_of_a_run(tmp_path):
    words = [
        f"method.masksparsity.{o}" for o in ("macs=0.3", "global_share=0.4", "masked_share=0.4", "finetune_lr=1e-4")
    ]
    bench = BenchRun("masksparsity", [*RESNET, *words], tmp_path)
    run = bench.fresh(steps=5)
    runner.setup(run)
    assert [(p.name, p.steps, p.lr) for p in run.phases] == [
        ("global sparsity", 2, None), ("masked sparsity", 2, None), ("fine-tune", 1, 1e-4),
    ]  # fmt: skip
    seen = {}
    method = run.methods[0]
    plain = method.start_phase

    def start_phase(run):
        plain(run)
        seen[run.phase.name] = {n: t.detach().clone() for n, t in tensors_of(run.model).items()}

    method.start_phase = start_phase
    runner.fit(run)
    base = tensors_of(bench.base)
    assert all(torch.equal(t, base[n]) for n, t in seen["masked sparsity"].items())  # from the dense weights again
    assert seen["fine-tune"]["layer1.0.conv1.weight"].shape != base["layer1.0.conv1.weight"].shape or method.removals
    report = method.report(run)
    assert report["channels"] == 28 > report["channels_left"] and report["slim_gap"] < 1e-5
    assert {"kept_scale_when_marked", "kept_scale"} <= set(report)
    assert "pruned/accuracy" in run.measured and not method.start


def test_bad_options(tmp_path):
    with pytest.raises(UserError, match="must not add up to more than 1"):
        MaskSparsity(global_share=0.7, masked_share=0.6)
    with pytest.raises(Unfit, match="batch norm"):
        MaskSparsity().attach(nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1)), torch.rand(1, 1, 4, 4))
