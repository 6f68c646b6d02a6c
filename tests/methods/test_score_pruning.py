"""The baselines: what they remove, when, what it saves, and that a pruned model comes back from its file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.cost import operations
from filtrun.errors import UserError
from filtrun.method import count
from filtrun.methods.pruning.magnitude import Magnitude
from filtrun.methods.pruning.prune_random import PruneRandom
from filtrun.methods.pruning.slimming import Slimming
from filtrun.methods.pruning.snip import Snip
from filtrun.methods.pruning.taylor import Taylor
from filtrun.record import Record
from filtrun.reload import reload

RESNET = ["model=resnet20", "model.depth=8", "model.width=4"]


def chain() -> nn.Sequential:
    """Two convolutions of 6 and 8 filters with batch norms, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for n, p in model.named_parameters() if p.ndim > 1]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_single_weights_go_by_their_score(scope):
    model, x = chain(), torch.rand(4, 3, 8, 8)
    model(x).square().sum().backward()
    plain = [w.clone() for w in weights(model)]
    grads = [p.grad.clone() for p in model.parameters() if p.ndim > 1]
    sensitivity = [(w * g).abs() for w, g in zip(plain, grads, strict=True)]
    for method, score in (
        (Magnitude(amount=0.8, granularity="weight", scope=scope), [w.abs() for w in plain]),
        (Taylor(amount=0.8, granularity="weight", scope=scope), sensitivity),
        (Snip(amount=0.8, scope=scope), sensitivity),
    ):  # fmt: skip
        pruned = copy.deepcopy(model)
        for mine, theirs in zip(pruned.parameters(), model.parameters(), strict=True):
            mine.grad = theirs.grad.clone()
        method.prune(pruned)
        whole = torch.cat([s.flatten() for s in score])
        for w, s, found in zip(plain, score, weights(pruned), strict=True):
            pool = whole if scope == "global" else s.flatten()
            limit = pool.sort().values[int(0.8 * pool.numel()) - 1]
            assert torch.equal(found, torch.where(s > limit, w, 0.0))
        method.prune(pruned, amount=0.9)  # further: what has gone stays gone
        assert method.masks.sparsity() == pytest.approx(0.9, abs=0.01)


def test_scores_without_a_gradient_say_what_to_do():
    with pytest.raises(UserError, match="call backward"):
        Snip().prune(chain())


def test_random_is_a_function_of_the_seed():
    found = [PruneRandom(granularity="weight").prune(chain(), seed=s).masks for s in (1, 1, 2)]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0].entries)
    assert any(not torch.equal(found[0][n], found[2][n]) for n in found[0].entries)
    assert found[0].sparsity() == pytest.approx(0.5, abs=0.01)
    x = torch.rand(1, 3, 8, 8)
    kept = [
        PruneRandom(scope="local").prune(chain(), x, seed=s).removals[0].keep["0.weight"][0] for s in (1, 1, 2, 3, 4)
    ]
    assert torch.equal(kept[0], kept[1]) and any(not torch.equal(kept[0], k) for k in kept[2:])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_filters_of_smallest_norm_go(norm):
    model, x = chain(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        for layer, rows in ((0, [1, 4]), (3, [0, 2, 7])):
            model[layer].weight[rows] *= 1e-3
            model[layer + 1].weight[rows] *= 1e-3
        model[3].weight[:, [1, 4]] *= 1e-3
        model[8].weight[:, [0, 2, 7]] *= 1e-3
    method = Magnitude(amount=5 / 14 + 1e-6, norm=norm).prune(model, x)
    keep = method.removals[0].keep
    assert (~keep["0.weight"][0]).nonzero().flatten().tolist() == [1, 4]
    assert (~keep["3.weight"][0]).nonzero().flatten().tolist() == [0, 2, 7]
    assert [tuple(w.shape[:2]) for w in weights(model)] == [(4, 3), (5, 4), (4, 5)]


def test_zeroing_and_taking_out_are_the_same_function():
    x = torch.rand(2, 3, 8, 8)
    zeroed, slim = chain().eval(), chain().eval()
    method = Magnitude(amount=0.5, slim=False).prune(zeroed, x[:1])
    Magnitude(amount=0.5).prune(slim, x[:1])
    assert torch.allclose(zeroed(x), slim(x), atol=1e-6) and count(slim.parameters()) < count(zeroed.parameters())
    assert {m.granularity for m in method.masks} == {"filter"}
    with torch.no_grad():
        macs = operations(lambda: slim(x))["macs"]
    assert method.macs == macs  # what zeroing would save, by formula
    gone = dict(method.gone)
    method.prune(zeroed, x[:1], amount=0.7)
    assert all(set(rows) <= set(method.gone[name]) for name, rows in gone.items())


def test_rounds_add_up_and_layers_keep_their_share():
    model, x = chain(), torch.rand(1, 3, 8, 8)
    method = Magnitude(amount=1.0, most=0.5)
    method.prune(model, x, amount=0.3).prune(model, x, amount=1.0)
    assert [len(w) for w in weights(model)] == [3, 4, 4]
    halves = Magnitude(scope="local")
    other = chain()
    halves.prune(other, x, amount=0.25).prune(other, x, amount=0.5)
    assert [len(w) for w in weights(other)] == [3, 4, 4]  # a half of what there was at first


def test_slimming_penalises_scales_and_cuts_the_smallest():
    model, x = chain(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -0.01, 0.3, 0.9, -0.2, 0.8]))
        model[4].weight.copy_(torch.tensor([0.02, 0.6, 0.7, -0.05, 0.9, 1.0, 1.1, 0.4]))
    model(x).sum().backward()
    grads = [model[i].weight.grad.clone() for i in (1, 4)]
    method = Slimming(amount=4 / 14 + 1e-6, s=0.1)
    method.regularise(model)
    for i, grad in zip((1, 4), grads, strict=True):
        assert torch.equal(model[i].weight.grad, grad + 0.1 * model[i].weight.detach().sign())
    method.prune(model, x[:1])
    keep = method.removals[0].keep
    assert (~keep["1.weight"][0]).nonzero().flatten().tolist() == [1, 4]  # 0.01, 0.2
    assert (~keep["4.weight"][0]).nonzero().flatten().tolist() == [0, 3]  # 0.02, 0.05
    assert method.numbers == pytest.approx({"kept_scale": 7.2 / 10, "doomed_scale": 0.28 / 4}, abs=1e-6)


def made(tmp_path: Path, slug: str, words: list[str], options: str = "") -> BenchRun:
    return BenchRun(slug, [*words, *[f"method.{slug}.{o}" for o in options.split()]], tmp_path)


def trained(bench: BenchRun, steps: int = 2):
    run = bench.fresh(steps=steps)
    runner.setup(run)
    runner.fit(run)
    return run


def test_the_plan_of_a_run(tmp_path):
    run = made(tmp_path, "magnitude", RESNET, "rounds=3 start=0.2 end=0.6 amount=0.6").fresh(steps=10)
    runner.setup(run)
    assert [(p.name, p.steps) for p in run.phases] == [("dense", 2), ("prune 1", 2), ("prune 2", 2), ("prune 3", 4)]
    runner.fit(run)
    report = run.methods[0].report(run)
    assert report["channels"] == 4 + 8 + 16 and report["channels_left"] == 12
    assert report["slim_gap"] < 1e-5 and 0 <= run.measured["pruned/accuracy"] <= 1
    assert [len(r.keep) > 0 for r in run.methods[0].removals] == [True] * 3


@pytest.mark.parametrize("model", ["vgg16_bn model.width=0.0625", "mobilenetv2 model.width=0.1"])
def test_networks_of_other_shapes_shrink_to_the_asked_multiply_adds(tmp_path, model):
    bench = made(tmp_path, "magnitude", f"model={model}".split(), "measure=macs amount=0.5 most=0.95")
    run = trained(bench)
    base = copy.deepcopy(bench.base).eval()
    x = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        before, after = (operations(lambda m=m: m(x))["macs"] for m in (base, run.model.eval()))
    assert 0.3 * before < after <= 0.5 * before
    run.methods[0].verify(run)


@pytest.mark.parametrize(
    "words",
    [
        ["model=unet", "model.size=nano"],
        ["model=espcn", "task=superres", "data=photos", "task.crop=32", "task.eval_images=1"],
    ],
)
def test_single_weights_of_denoisers_and_upscalers(tmp_path, words):
    run = trained(made(tmp_path, "magnitude", words, "granularity=weight amount=0.75"))
    method, report = run.methods[0], run.methods[0].report(run)
    assert report["sparsity"] == pytest.approx(0.75, abs=1e-3)
    method.verify(run)
    zeros = sum(int((m.parameter == 0).sum()) for m in method.masks)
    assert zeros == round(report["sparsity"] * sum(m.parameter.numel() for m in method.masks))
    with run.plainly():
        assert 0 < report["macs"] < 0.7 * operations(lambda: run.task.probe(run))["macs"]


def test_bad_options(tmp_path):
    with pytest.raises(UserError, match="end=0.1 must not be below start=0.5"):
        Magnitude(rounds=2, start=0.5, end=0.1)
    with pytest.raises(UserError, match="no batch norm"):
        made(tmp_path, "slimming", ["model=vit", "model.size=nano", "model.depth=1"]).fresh()
    with pytest.raises(UserError, match="both claim the tensor"):
        made(tmp_path, "[magnitude,sara]", RESNET).fresh()


@pytest.mark.parametrize(
    ("options", "saves"),
    [("", "params"), ("method.magnitude.granularity=weight method.magnitude.amount=0.9", "nonzero_params")],
)
def test_a_whole_run_its_costs_and_its_return(smoke, tmp_path, options, saves):
    words = ["method=magnitude", "data=digits", *RESNET, "trainer.ema=0.5", *options.split()]
    assert smoke(*words, "hydra.run.dir=run").code == 0
    record = Record.read(tmp_path / "run")
    cost = record.cost
    assert cost[saves] < 0.7 * cost["total_params"] and cost["base_macs"] == cost["base_flops"] / 2
    if saves == "params":
        assert cost["macs"] < 0.8 * cost["base_macs"] and "effective_macs" not in cost
        assert cost["stored_bytes"] < 4 * cost["total_params"]
    else:
        assert cost["macs"] == cost["base_macs"] and cost["effective_macs"] < 0.5 * cost["macs"]
        assert cost["nonzero_params"] < cost["params"] == cost["total_params"]
    assert 0 < cost["latency_seconds"] < 1 and 0 < cost["base_latency_seconds"] < 1
    assert "pruned/accuracy" in record.metrics
    run, _ = reload(tmp_path / "run", device="cpu")
    assert count(run.model.parameters()) == cost["params"]
    with run.evaluating():
        again = run.task.evaluate(run)
    assert again == {name.removeprefix("test/"): v for name, v in record.metrics.items() if name.startswith("test/")}
