"""SaRA against a slow reference of the official semantics, written here from the algorithm, in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun, probe
from filtrun.checkpoint import weights_sha256
from filtrun.context import mix_seed
from filtrun.delta import FILE, load_delta, save_delta
from filtrun.errors import UserError
from filtrun.methods.peft.sara import SaRA, auto_lr, nuclear_subgradient, select_below, threshold_for

THETA, LR = 0.03, 4e-3
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 1e-2


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64, 70), nn.LayerNorm(70), nn.GELU(),
        nn.Linear(70, 66), nn.GELU(), nn.Linear(66, 5),
    )  # fmt: skip
    return made.to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 1, 4, 4, generator=generator, dtype=dtype), torch.randint(0, 5, (6,), generator=generator))
        for _ in range(count)
    ]


def dense(model: nn.Module) -> dict[str, Tensor]:
    """The tensors the network computes with, by base name, whatever holds them."""
    names = [n for n, _ in net().named_parameters()]
    return {n: getattr(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]).detach().clone() for n in names}


Trace = list[dict[str, Tensor]]


def train(sara: SaRA, steps: int, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Trace]:
    model = net() if model is None else model
    optimizer = sara.optimizer(model, lr=LR, **options)
    trace = []
    for x, y in batches(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        trace.append(dense(model))
    return model, trace


def reference(
    steps: int, *, switch: int | None = None, lam: float = 0.0, reset: bool = False, quirk: bool = False
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """The official update, dense and slow: (weights after each step, first mask, last mask)."""
    model = net()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = {n: w.abs() < THETA for n, w in weights.items()}
    masks = dict(first)
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    eligible = [n for n, w in weights.items() if w.ndim == 2 and min(w.shape) > 64 and masks[n].any()]
    trace, count, shows_magnitude = [], 0, quirk
    for step, (x, y) in enumerate(batches(steps)):
        leaves = {n: w.clone().requires_grad_(True) for n, w in weights.items()}
        seen = {n: torch.where(masks[n], w.abs(), w) if shows_magnitude else w for n, w in leaves.items()}
        F.cross_entropy(torch.func.functional_call(model, seen, (x,)), y).backward()
        if switch is not None and step + 1 == switch + 1:
            masks = {n: (weights[n].abs() < THETA) & first[n] for n in weights}
            if reset:
                m = {n: torch.zeros_like(w) for n, w in weights.items()}
                v = {n: torch.zeros_like(w) for n, w in weights.items()}
                count, shows_magnitude = 0, quirk
                trace.append({n: torch.where(masks[n], w.abs(), w) if quirk else w.clone() for n, w in weights.items()})
                continue
        shows_magnitude, count = False, count + 1
        if lam:
            drawn = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(mix_seed(0, step)))[0]
            name = eligible[int(drawn)]
            if masks[name].sum() > 100:
                (lam * torch.linalg.svdvals(leaves[name] * masks[name]).sum()).backward()
        for n, w in weights.items():
            g = leaves[n].grad
            assert g is not None
            m[n] = BETAS[0] * m[n] + (1 - BETAS[0]) * g
            v[n] = BETAS[1] * v[n] + (1 - BETAS[1]) * g * g
            mean, spread = m[n] / (1 - BETAS[0] ** count), v[n] / (1 - BETAS[1] ** count)
            updated = w * (1 - LR * DECAY) - LR * mean / (spread.sqrt() + EPS)
            weights[n] = torch.where(masks[n], updated, w)
        trace.append({n: w.clone() for n, w in weights.items()})
    return trace, first, masks


def furthest(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> float:
    return max((x[n] - y[n]).abs().max().item() for x, y in zip(a, b, strict=True) for n in x)


# -- the pure functions ----------------------------------------------------------------------------------------------
def test_selection_is_strict() -> None:
    weight = torch.tensor([[-0.2, -0.1, 0.0], [0.1, 0.0999, 0.3]])
    assert select_below(weight, 0.1).tolist() == [[False, False, True], [False, True, False]]


def test_threshold_for_a_fraction_chooses_that_many() -> None:
    weights = [torch.arange(1.0, 8.0), -torch.arange(8.0, 11.0)]  # magnitudes 1..10
    theta = threshold_for(weights, 0.3)
    assert theta == 4.0
    assert sum(int(select_below(w, theta).sum()) for w in weights) == 3


def test_auto_lr_at_the_papers_threshold() -> None:
    assert auto_lr(2e-3) == pytest.approx(4.9658530379e-4, rel=1e-9)


def test_nuclear_subgradient_is_that_of_the_sum_of_singular_values() -> None:
    matrix = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    torch.linalg.svdvals(matrix).sum().backward()
    assert (matrix.grad - nuclear_subgradient(matrix.detach())).abs().max() < 1e-10  # type: ignore[operator]


# -- against the reference -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", ["scatter", "dense"])
@pytest.mark.parametrize(("lam", "reset"), [(0.0, False), (0.05, False), (0.05, True)])
def test_update_low_rank_term_and_reselection_equal_the_reference(memory: str, lam: float, reset: bool) -> None:
    sara = SaRA(threshold=THETA, lambda_rank=lam, progressive_iter=4, memory=memory, reset_moments=reset)
    _, trace = train(sara, 9)
    want, first, last = reference(9, switch=4, lam=lam, reset=reset)
    assert furthest(trace, want) < 1e-10
    assert sara.trainable == sum(int(m.sum()) for m in first.values())
    found = {e.name: e.mask() for e in sara.entries}
    assert all(torch.equal(found[n], last[n]) for n in found)
    assert all(not last[n].any() for n in last.keys() - found.keys())
    assert 0 < sum(int(m.sum()) for m in last.values()) < sara.trainable


def test_sign_quirk_equals_the_reference_of_the_official_fast_path() -> None:
    sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=4, official_sign_quirk=True)
    _, trace = train(sara, 9)
    assert furthest(trace, reference(9, switch=4, reset=True, quirk=True)[0]) < 1e-10


def test_never_reselecting_keeps_the_first_mask() -> None:
    sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=None)
    _, trace = train(sara, 6)
    assert furthest(trace, reference(6)[0]) < 1e-10
    assert sum(int(e.mask().sum()) for e in sara.entries) == sara.trainable


@pytest.mark.parametrize("memory", ["scatter", "dense"])
def test_entries_outside_the_mask_are_bit_identical_after_every_step(memory: str) -> None:
    base = dense(net())
    _, trace = train(SaRA(threshold=THETA, lambda_rank=0.05, progressive_iter=3, memory=memory), 8)
    for weights in trace:
        assert all(torch.equal(weights[n][base[n].abs() >= THETA], base[n][base[n].abs() >= THETA]) for n in base)
    assert any(not torch.equal(trace[-1][n], base[n]) for n in base)


def test_reselection_drops_what_left_the_band_and_freezes_it() -> None:
    base = dense(net())
    sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=4, reset_moments=False)
    _, trace = train(sara, 9)
    at_switch = trace[3]
    for entry in sara.entries:
        first, second = base[entry.name].abs() < THETA, entry.mask()
        assert not (second & ~first).any()
        assert (at_switch[entry.name][second].abs() < THETA).all()
        dropped = first & ~second
        assert torch.equal(trace[-1][entry.name][dropped], at_switch[entry.name][dropped])


def test_lambda_changes_the_weights_and_lowers_the_singular_values() -> None:
    masks = {n: w.abs() < THETA for n, w in dense(net()).items()}
    ends = [train(SaRA(threshold=THETA, lambda_rank=lam, progressive_iter=None), 8)[1][-1] for lam in (0.0, 0.5)]
    sums = [sum(torch.linalg.svdvals(w[n] * masks[n]).sum().item() for n in ("3.weight", "6.weight")) for w in ends]
    assert not torch.equal(ends[0]["6.weight"], ends[1]["6.weight"])
    assert sums[1] < sums[0]


def test_small_masks_are_left_out_of_the_low_rank_term() -> None:
    model = nn.Sequential(nn.Linear(70, 70)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0).view(-1)[:100] = 0.01
    sara = SaRA(threshold=0.02, lambda_rank=1.0, progressive_iter=None)
    sara.attach(model)
    sara.add_low_rank_gradient(0)
    assert all(e.values.grad is None for e in sara.entries)


# -- memory, start, several uses ---------------------------------------------------------------------------------------
def test_optimizer_state_is_two_vectors_of_the_chosen_entries() -> None:
    model = net()
    sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=None)
    optimizer = sara.optimizer(model)
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    optimizer.step()
    sizes = [t.numel() for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    assert sum(sizes) == 2 * sara.trainable
    assert sum(e.values.grad.numel() for e in sara.entries) == sara.trainable  # type: ignore[union-attr]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{e.name}_values" for e in sara.entries}


def test_the_signed_variant_starts_at_the_base_and_the_quirk_does_not() -> None:
    x, plain = batches(1)[0][0], net()
    for options, equal in [({}, True), ({"memory": "dense"}, True), ({"official_sign_quirk": True}, False)]:
        model = net()
        SaRA(threshold=THETA, **options).attach(model)  # type: ignore[arg-type]
        assert torch.equal(model(x), plain(x)) is equal


def test_detach_leaves_the_plain_model() -> None:
    model, names = net(), [n for n, _ in net().named_parameters()]
    objects = dict(model.named_parameters())
    sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=2)
    train(sara, 4, model)
    x, trained = batches(1)[0][0], dense(model)
    before = model(x)
    sara.detach()
    assert [n for n, _ in model.named_parameters()] == names and not list(model.named_buffers())
    assert all(p is objects[n] and torch.equal(p, trained[n]) for n, p in model.named_parameters())
    assert torch.equal(model(x), before) and not model._forward_pre_hooks


def test_dense_variant_is_whole_after_the_last_step_without_another_forward() -> None:
    model, _ = train(SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=None, memory="dense"), 3)
    for name, weight in dense(net()).items():
        kept = weight.abs() >= THETA
        assert torch.equal(dict(model.named_parameters())[name][kept], weight[kept])


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).double()
    model[2].weight = model[0].weight
    x = torch.randn(5, 8, dtype=torch.float64)
    twin = copy.deepcopy(model)
    sara = SaRA(threshold=0.2, lambda_rank=0.0, progressive_iter=None).attach(model)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    entry = next(e for e in sara.entries if e.name == "0.weight")
    assert torch.allclose(entry.values.grad, twin[0].weight.grad.take(entry.index), atol=1e-12)  # type: ignore[arg-type,union-attr]
    sara.detach()
    assert model[0].weight is model[2].weight


@pytest.mark.parametrize("fused", [False, True])
def test_a_forward_without_gradients_sees_the_step_before_it(fused: bool) -> None:
    x, y = batches(1, torch.float32)[0]
    for managed in (True, False):  # SaRA's own optimizer, and one that does not tell it of its steps
        model = net(torch.float32)
        sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=None)
        if managed:
            optimizer = sara.optimizer(model, lr=LR, fused=fused)
        else:
            sara.attach(model)
            optimizer = torch.optim.AdamW([e.values for e in sara.entries], lr=LR, fused=fused)
        with torch.no_grad():
            before = model(x)
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                after, again = model(x), model(x)
            assert not torch.equal(before, after) and torch.equal(after, again)
            plain = net(torch.float32)
            plain.load_state_dict(dense(model))
            assert torch.equal(plain(x), after)
            assert torch.equal(next(e for e in sara.entries).values, sara.entries[0].dense.take(sara.entries[0].index))
            before = after


def test_fused_and_plain_adamw_agree() -> None:
    ends = [train(SaRA(threshold=THETA, lambda_rank=0.05, progressive_iter=3), 6, fused=f)[1] for f in (False, True)]
    assert furthest(*ends) < 1e-10


def test_clipping_acts_on_the_chosen_entries_only() -> None:
    model = net()
    sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=None).attach(model)
    twin = net()
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    masked = [p.grad[p.abs() < THETA] for p in twin.parameters()]  # type: ignore[index]
    norm = nn.utils.clip_grad_norm_([e.values for e in sara.entries], 1e-3)
    assert norm.item() == pytest.approx(torch.cat(masked).norm().item(), rel=1e-10)
    left = torch.cat([e.values.grad for e in sara.entries])  # type: ignore[misc]
    assert left.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_frozen_entries_do_not_count_when_gradients_are_clipped() -> None:
    model = net()
    sara = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=2, reset_moments=False)
    train(sara, 4, model)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    for entry in sara.entries:
        assert entry.active is not None and entry.values.grad is not None
        assert not entry.values.grad[~entry.active].any()


def test_gradient_accumulation_equals_one_batch() -> None:
    x, y = batches(1)[0]
    ends = []
    for parts in (1, 3):
        model = net()
        optimizer = SaRA(threshold=THETA, lambda_rank=0.0, progressive_iter=None).optimizer(model, lr=LR)
        for _ in range(2):
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(a), b) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(dense(model))
    assert furthest(ends[:1], ends[1:]) < 1e-6


# -- mistakes ----------------------------------------------------------------------------------------------------------
def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="threshold=0.1 and fraction=0.2"):
        SaRA(threshold=0.1, fraction=0.2)
    with pytest.raises(UserError, match="chooses nothing"):
        SaRA(threshold=0.0).attach(net())
    with pytest.raises(UserError, match="progressive_iter=0.5"):
        SaRA(threshold=THETA).optimizer(net())
    with pytest.raises(UserError, match="official_sign_quirk"):
        SaRA(official_sign_quirk=True, memory="dense")


# -- in a run ----------------------------------------------------------------------------------------------------------
def bench(folder: Path, *overrides: str) -> BenchRun:
    return BenchRun("sara", ["model=vit", "model.size=nano", "model.depth=1", *overrides], folder)


@pytest.mark.parametrize("memory", ["scatter", "dense"])
def test_stored_entries_restore_the_model_on_a_fresh_base(tmp_path: Path, memory: str) -> None:
    setting = bench(tmp_path, f"method.sara.memory={memory}", "method.sara.reset_moments=false")
    run, sha = setting.trained(steps=4), weights_sha256(setting.base)
    with run.evaluating():
        want = run.task.probe(run)
        save_delta(run, tmp_path, sha)
    again = setting.fresh()
    load_delta(again, tmp_path / FILE, sha)
    assert torch.equal(probe(again), want)
    for model_run in (run, again):
        model_run.each_reversed("finish")
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), again.model.parameters(), strict=True))
    assert list(again.model.state_dict()) == list(setting.base.state_dict())


def test_another_threshold_and_another_base_are_refused(tmp_path: Path) -> None:
    setting = bench(tmp_path, "method.sara.threshold=0.01")
    run, sha = setting.trained(), weights_sha256(setting.base)
    save_delta(run, tmp_path, sha)
    with pytest.raises(UserError, match="saved with threshold 0.01, but this base gives 0.02"):
        load_delta(bench(tmp_path, "method.sara.threshold=0.02").fresh(), tmp_path / FILE, sha)
    with pytest.raises(UserError, match="belongs to another base"):
        load_delta(setting.fresh(), tmp_path / FILE, "0" * 64)


def test_the_report_counts_what_was_chosen_and_the_default_share_is_15_percent(tmp_path: Path) -> None:
    run = bench(tmp_path).trained(steps=4)
    total = sum(p.numel() for p in run.weights.values())
    report = run.methods[0].report(run)
    assert report["selected_share"] == pytest.approx(0.15, abs=1 / total + 1e-3)
    assert report["selected_weights"] == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert report["low_rank_matrices"] == 0  # the tiny network has no matrix with both sides above 64
    assert 0 < report["trained_after_reselection"] < report["selected_weights"]  # type: ignore[operator]


def test_the_run_reselects_at_its_share_of_the_steps_and_clips(tmp_path: Path) -> None:
    setting = bench(tmp_path, "method.sara.progressive_iter=0.5", "method.sara.reset_moments=false")
    run = setting.fresh(steps=4, clip=1e-4)
    runner.setup(run)
    sara = run.methods[0]
    seen: list[tuple[bool, float]] = []
    optimizer = run.optimizer.optimizer  # what Fabric wraps
    original = optimizer.step

    def watched(*args: Any, **options: Any) -> Any:
        squares = [e.values.grad.square().sum() for e in sara.entries]  # type: ignore[attr-defined]
        seen.append((sara.switched, math.sqrt(sum(s.item() for s in squares))))  # type: ignore[attr-defined]
        return original(*args, **options)

    optimizer.step = watched
    runner.fit(run)
    assert [switched for switched, _ in seen] == [False, False, True, True]
    assert all(norm <= 1.001e-4 for _, norm in seen)


@pytest.mark.parametrize("order", ["sara,lora", "lora,sara", "sara,bitfit", "bitfit,sara"])
def test_two_methods_on_the_same_tensors_are_an_error_that_names_both(tmp_path: Path, order: str) -> None:
    setting = BenchRun(f"[{order}]", ["model=unet", "model.size=nano"], tmp_path)
    with pytest.raises(UserError) as caught:
        setting.fresh()
    first, second = order.split(",")
    assert f"method={second} and method={first} both claim the tensor" in str(caught.value)
