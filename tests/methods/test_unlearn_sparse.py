"""Unlearning with sparsity: its mathematics, the pruned network, and what each unlearner trains on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.errors import UserError
from filtrun.methods.pruning import mia, tickets, unlearners
from filtrun.methods.pruning.unlearn_metrics import gaps
from filtrun.methods.pruning.unlearn_sparse import UnlearnSparse
from filtrun.plan import pretrainer

SMALL = ["model=resnet20", "model.depth=8", "model.width=4", "data.target=[9]", "data.few_shot=12"]
ME = "method.unlearn_sparse"


def started(folder, *words, **trainer):
    bench = BenchRun("unlearn_sparse", [*SMALL, *words], folder)
    bench.config["model"]["base"] = "scratch"
    return bench, bench.fresh(**trainer)


def trained(folder, *words, **trainer):
    _, run = started(folder, *words, **trainer)
    runner.setup(run)
    runner.fit(run)
    return run


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


# -- mathematics -----------------------------------------------------------------------------------------------------
def test_the_penalty_falls_to_zero_and_covers_every_parameter():
    assert [unlearners.l1_weight(0.2, e, 5, 1) for e in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0])
    assert [unlearners.l1_weight(0.2, e, 2, 2) for e in range(2)] == [0.2, 0.2]
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))
    whole = torch.linalg.norm(torch.cat([p.flatten() for p in net.parameters()]), ord=1)
    assert UnlearnSparse(alpha=0.1).penalty(net, 1, 4).item() == pytest.approx(0.075 * whole.item())


def test_fisher_of_a_linear_model_by_hand():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), torch.randn(5, 3)
    p = layer(x).softmax(1).detach()
    expected = torch.zeros(4, 3)
    for part in (slice(0, 3), slice(3, 5)):  # d mean CE / dW = mean (p - e_y) x^T
        for y in range(4):
            delta = p[part] - F.one_hot(torch.tensor(y), 4)
            expected += p[part, y].mean() * (delta.T @ x[part] / len(x[part])).square() / 2
    found = unlearners.fisher_diagonal(layer, [layer.weight], x.split(3))[0]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_fisher_noise_is_clipped_averaged_and_larger_for_head_and_vectors():
    fisher = torch.tensor([[0.0, 1.0], [0.01, 0.5]])
    inner = unlearners.fisher_variance(fisher, 0.1)
    assert inner[:, 0].tolist() == pytest.approx([0.1 * (1e3 + 1) / 2, 0.1 * (100 + 2) / 2], rel=1e-4)
    assert torch.equal(inner[:, 0], inner[:, 1])
    head = unlearners.fisher_variance(fisher, 0.1, last=True, forget=[1])
    assert head[:, 0].tolist() == pytest.approx([10 * 0.1 * (1e2 + 1) / 2, 1e-3], rel=1e-4)
    assert unlearners.fisher_variance(torch.ones(2), 0.1).tolist() == pytest.approx([1.0, 1.0])
    assert unlearners.fisher_mean(torch.ones(2, 2), True, [1]).tolist() == [[1, 1], [0, 0]]


def test_influence_and_both_inverses():
    torch.manual_seed(1)
    g, v = torch.randn(6, 4), torch.randn(4)
    assert torch.allclose(unlearners.influence(v, g[0], 1, 3), (v - g[0]) / 4)
    k, o = v.clone(), g[0].clone()
    for i in range(1, 6):
        k, o = k - (k @ g[i]) / (1000 + o @ g[i]) * o, o - (o @ g[i]) / (1000 + o @ g[i]) * o
    assert torch.allclose(unlearners.woodfisher(v, g), k)
    assert torch.allclose(unlearners.woodfisher(v, g, 1), unlearners.woodfisher(v, g[:3], 1))  # stops after index n + 1
    exact = torch.linalg.solve(torch.eye(4) + g.T @ g / 6, v)
    assert torch.allclose(unlearners.woodbury(v, iter(g)), exact, atol=1e-5)


def test_features_and_the_attack():
    p, y = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]]), torch.tensor([1, 1])
    assert mia.feature(p, y).flatten().tolist() == pytest.approx([0.2, 1.0])
    assert mia.feature(p, y, "correctness").flatten().tolist() == [0, 1]
    assert mia.entropy(p).tolist() == pytest.approx([-sum(q * math.log(q) for q in (0.7, 0.2, 0.1)), 0])
    expected = -0.8 * math.log(0.2) - 0.7 * math.log(0.3) - 0.1 * math.log(0.9)
    assert mia.modified_entropy(p, y).tolist() == pytest.approx([expected, 0], abs=1e-6)
    official = -0.7 * math.log(0.7) - 0.8 * math.log(0.2) - 0.1 * math.log(0.1)  # column 1: 1 - p; log p everywhere
    assert mia.modified_entropy(p, y, official=True)[0].item() == pytest.approx(official, abs=1e-6)
    seen, unseen = torch.linspace(0.9, 1, 20)[:, None], torch.linspace(0, 0.3, 20)[:, None]
    assert mia.efficacy(seen, unseen, unseen[:5]) == 1 and mia.efficacy(seen, unseen, seen[:5]) == 0
    assert mia.privacy(seen, unseen) == 1
    assert mia.attack(seen, unseen, inside=unseen, outside=unseen) == pytest.approx(0.5)


# -- pruning ---------------------------------------------------------------------------------------------------------
def net():
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 36, 10))


def test_masks_agree_with_torch_and_leave_linear_layers_alone():
    from torch.nn.utils import prune

    model = net()
    scores = {name: w.detach().abs() for name, w in tickets.conv_weights(model).items()}
    assert list(scores) == ["0.weight", "3.weight"]
    keep = tickets.prune_more(scores, 0.9)
    other = copy.deepcopy(model)
    layers = [(other[0], "weight"), (other[3], "weight")]
    for amount, mine in ((0.9, keep), (0.2, tickets.prune_more(scores, 0.2, keep))):
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=amount)
        assert all(torch.equal(mine[f"{i}.weight"], other[i].weight_mask.bool()) for i in (0, 3))


def test_every_way_reaches_the_rate():
    model = net()
    total = sum(w.numel() for w in tickets.conv_weights(model).values())
    shares = tickets.imp_shares(0.95, 0.2)
    assert len(shares) == 14 and shares[:-1] == [0.2] * 13 and shares[-1] <= 0.2
    found = None
    for share in shares:
        found = tickets.prune_more({n: w.detach().abs() for n, w in tickets.conv_weights(model).items()}, share, found)
    flow = tickets.synflow_masks(model, (3, 8, 8), 0.95, rounds=10)
    for keep in (found, flow):
        assert abs(sum(int(k.sum()) for k in keep.values()) / total - 0.05) < 3e-4  # 5040 weights
    assert all(k.any() for k in flow.values())  # SynFlow empties no layer
    assert tickets.imp_shares(0.0, 0.2) == []


def test_synflow_scores_are_paths_through_absolute_weights():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False), nn.Flatten())
    a, b = (model[i].weight.detach()[:, :, 0, 0].abs().double() for i in (0, 1))
    keep = {name: torch.ones_like(w, dtype=torch.bool) for name, w in tickets.conv_weights(model).items()}
    found = tickets.synflow_scores(model, (2, 1, 1), keep)
    assert torch.allclose(found["0.weight"][:, :, 0, 0], a * b.sum(0)[:, None])
    assert torch.allclose(found["1.weight"][:, :, 0, 0], b * a.sum(1)[None])


# -- runs ------------------------------------------------------------------------------------------------------------
def test_forgotten_and_retained_images_are_a_partition(tmp_path):
    for words in ([], ["classes=all", f"{ME}.forget=random", f"{ME}.forget_count=77"]):
        _, run = started(tmp_path, f"{ME}.unlearner=ft", *words)
        method, train = run.methods[0], run.data.split("train", "all")
        both = torch.cat([method.forgotten.index, method.retained.index]).sort().values
        assert torch.equal(both, train.index.sort().values)
        assert run.train_split is method.retained
        if words:
            assert len(method.forgotten) == 77
        else:
            assert method.forgotten.class_ids == [9] and method.retained.class_ids == list(range(9))
    _, run = started(tmp_path, f"{ME}.unlearner=ga")
    assert run.train_split is run.methods[0].forgotten


def test_no_penalty_is_fine_tuning_and_no_step_is_identity(tmp_path):
    tuned = weights(trained(tmp_path, f"{ME}.unlearner=ft"))
    free = weights(trained(tmp_path, f"{ME}.alpha=0.0"))
    assert all(torch.equal(tuned[name], free[name]) for name in tuned)
    sparse = weights(trained(tmp_path, f"{ME}.alpha=0.001"))
    assert any(not torch.equal(tuned[name], sparse[name]) for name in tuned)
    bench, run = started(tmp_path, f"{ME}.unlearner=ga", lr=0.0)
    runner.setup(run)
    runner.fit(run)
    assert all(torch.equal(p, run.weights[name]) for name, p in bench.base.named_parameters())


def test_a_step_under_the_penalty_also_goes_against_the_signs(tmp_path):
    after = {}
    for words in (["unlearner=ft"], ["unlearner=l1_sparse", "alpha=0.02"]):
        _, run = started(tmp_path, *(f"{ME}.{w}" for w in words), optimizer="sgd", momentum=0.0, lr=0.1, clip=0.0)
        runner.setup(run)
        start = weights(run)
        runner.train_step(run, next(iter(run.batches(0, skip=0))))
        after[words[0]] = weights(run)
    for name, plain in after["unlearner=ft"].items():
        expected = plain - 0.1 * 0.02 * start[name].sign()
        assert torch.allclose(after["unlearner=l1_sparse"][name], expected, atol=1e-6), name


def test_ascent_raises_the_loss_on_what_is_forgotten(tmp_path):
    _, run = started(tmp_path, f"{ME}.unlearner=ga", optimizer="sgd", momentum=0.0, lr=0.01, clip=0.0)
    runner.setup(run)
    batch = next(iter(run.batches(0, skip=0)))
    before = run.task.loss(run, batch)
    before.backward()
    gradient = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    run.model.zero_grad()
    start = weights(run)
    runner.train_step(run, batch)
    for name, after in weights(run).items():
        assert torch.allclose(after, start[name] + 0.01 * gradient[name], atol=1e-6)


@pytest.fixture(scope="module")
def sparse_words(tmp_path_factory):
    return [f"stages.root={tmp_path_factory.mktemp('stages')}", "pretrain.steps=4", "pretrain.warmup=0",
            "+pretrain.schedule=constant", f"{ME}.prune=omp", f"{ME}.rate=0.9", f"{ME}.rewind=0.5"]  # fmt: skip


def sparse_run(folder, words, unlearner, **trainer):
    bench = BenchRun("unlearn_sparse", [*SMALL, *words, f"{ME}.unlearner={unlearner}", f"{ME}.samples=20"], folder)
    bench.config["model"]["base"] = "pretrain"
    run = bench.fresh(**trainer)
    runner.setup(run)
    runner.fit(run)
    return run


@pytest.mark.parametrize("unlearner", ["ft", "ga", "l1_sparse", "fisher", "wfisher"])
def test_pruned_weights_stay_zero_through_every_unlearner(unlearner, tmp_path, sparse_words):
    run = sparse_run(tmp_path, sparse_words, unlearner)
    method = run.methods[0]
    method.verify(run)
    convs = tickets.conv_weights(run.model)
    total = sum(w.numel() for w in convs.values())
    assert sum(int((w == 0).sum()) for w in convs.values()) == round(0.9 * total)
    head = run.task.head(run.model)
    assert all((p != 0).all() for p in head if p.ndim > 1) or unlearner == "fisher"
    assert all(p.isfinite().all() for p in run.model.parameters())
    run.trainer.evaluate = False
    report = method.report(run)
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-4) and run.measured["unlearn/minutes"] > 0
    if unlearner == "ft":  # what is stored brings the masks back
        state = method.state_dict()
        method.masks.clear()
        method.load_state_dict(state)
        assert method.masks.sparsity() == pytest.approx(0.9, abs=1e-4)


def test_retraining_is_its_own_reference(tmp_path, sparse_words):
    run = sparse_run(tmp_path, [*sparse_words, f"{ME}.reference=true"], "retrain")
    method = run.methods[0]
    base = pretrainer(run.config)
    assert [p.steps for p in run.phases] == [4] and run.phases[0].lr == base.lr
    other = method.retrained(run)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), other.parameters(), strict=True))
    method.report(run)
    assert run.measured["unlearn/gap"] == 0
    values = [run.measured[f"unlearn/{name}"] for name in ("ua", "ra", "ta", "mia", "mia_privacy")]
    assert all(0 <= value <= 1 for value in values)
    found = gaps({"ua": 0.5, "ra": 1.0}, {"ua": 0.25, "ra": 1.0})
    assert found == {"unlearn/gap_ua": 0.25, "unlearn/gap_ra": 0.0, "unlearn/gap": 0.125}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["classes=all"], "classes=all"),
        ([f"{ME}.forget=random"], "classes=source"),
        ([f"{ME}.prune=omp"], "model.base=pretrain"),
        (["classes=all", f"{ME}.forget=random", f"{ME}.forget_count=5000"], "forget_count=5000"),
        ([f"{ME}.unlearner=magic"], "unlearner"),
    ],
)
def test_bad_options(words, told, tmp_path):
    with pytest.raises(UserError, match=told):
        started(tmp_path, *words)
