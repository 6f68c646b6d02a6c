"""N:M masks against a slow reference, gradients against closed forms, schedules against the paper's, and whole runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filtrun.errors import Unfit, UserError
from filtrun.methods.pruning.nm import NMWeight, decay_at, frame_at, nm_mask, patterns, top_mask
from filtrun.methods.pruning.nm_progressive import NMProgressive


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize(("shape", "n", "m"), [((8, 16), 2, 4), ((8, 16), 1, 8), ((4, 8, 3, 3), 1, 4)])
def test_mask_equals_a_slow_reference(shape: tuple[int, ...], n: int, m: int, axis: str) -> None:
    weight = seeded(*shape)
    keep = nm_mask(weight, n, m, axis)
    dim = 1 if axis == "row" else 0
    for group, kept in zip(weight.split(m, dim), keep.split(m, dim), strict=True):
        flat, chosen = group.movedim(dim, -1).reshape(-1, m), kept.movedim(dim, -1).reshape(-1, m)
        for values, mask in zip(flat.tolist(), chosen.tolist(), strict=True):
            best = sorted(range(m), key=lambda i: abs(values[i]), reverse=True)[:n]
            assert [i for i in range(m) if mask[i]] == sorted(best)
    with pytest.raises(ValueError, match="no multiple of 5"):
        nm_mask(weight, 2, 5, axis)


def test_unstructured_control_keeps_the_largest() -> None:
    weight = torch.tensor([[1.0, -5.0, 0.1, 3.0], [0.2, 0.3, -4.0, 2.0]])
    assert top_mask(torch.randn(10, 11), 1 / 16).sum() == 6  # floor(6.9), as the official code counts
    assert top_mask(weight, 0.5).tolist() == [[False, True, False, True], [False, False, True, True]]


def test_forward_fades_from_dense_to_binary() -> None:
    weight = seeded(4, 8)
    part = NMWeight((1, 4), "row")
    assert torch.equal(part(weight), weight)  # decay 1
    part.decay.fill_(0.25)
    mask = nm_mask(weight, 1, 4)
    assert torch.equal(part(weight), torch.where(mask, weight, 0.25 * weight))
    part.decay.fill_(0.0)
    assert torch.equal(part(weight), weight * mask)


@pytest.mark.parametrize("pull", [0.0, 2e-4])
def test_gradient_goes_straight_through(pull: float) -> None:
    weight = seeded(4, 8).requires_grad_(True)
    part = NMWeight((2, 4), "row", pull=pull)
    part.decay.fill_(0.1)
    upstream = torch.rand(4, 8)
    part(weight).backward(upstream)
    mask = nm_mask(weight, 2, 4)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, upstream + pull * weight.detach() * ~mask, rtol=0, atol=1e-7)
    if not pull:
        assert torch.equal(weight.grad, upstream)


def test_decay_and_patterns() -> None:
    assert decay_at("mdgf_linear", 1e-2, 0) == 1 and decay_at("mdgf_linear", 1e-2, 100) == 0
    assert decay_at("mdgf_linear", 1e-2, 25) == pytest.approx(0.75)
    assert decay_at("mdgf_exp", 1e-2, 100) == pytest.approx(math.exp(-1))
    assert decay_at("step", 1e-2, 0) == decay_at("srste", 1e-2, 0) == 0
    assert patterns("sdgf_stepwise", 1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert patterns("sdgf_stepwise", 2, 4) == [(3, 4), (2, 4)]
    assert patterns("sdgf_geometric", 2, 4) == [(16, 32), (8, 16), (4, 8), (2, 4)]
    assert patterns("sdgf_densify", 1, 4) == [(1, 32), (1, 16), (1, 8), (1, 4)]
    assert patterns("mdgf_exp", 1, 32) == [(1, 32)]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 3))


def test_frames_begin_where_the_official_table_puts_them() -> None:
    # get_decay_config of the official code: keys int(i * span / frames); here 5 frames of 298 and 4 of 30
    assert [next(t for t in range(298) if frame_at(t, 298, 5) == i) for i in range(5)] == [0, 59, 119, 178, 238]
    assert [next(t for t in range(30) if frame_at(t, 30, 4) == i) for i in range(4)] == [0, 7, 15, 22]
    assert frame_at(297, 298, 5) == 4


def test_schedule_over_a_run() -> None:
    method = NMProgressive(pattern="1:4", recipe="sdgf_stepwise", location=["linear"], dense_share=0.2,
                           finetune_share=0.2).attach(small())  # fmt: skip
    part = method.parts[0][2]
    seen = []
    for step in range(10):
        method.place(step, 10)
        seen.append((part.pattern, part.decay.item()))
    dense, frames = [((1, 1), 1.0)] * 2, [((3, 4), 0.0)] * 2 + [((2, 4), 0.0)] * 2 + [((1, 4), 0.0)] * 2
    assert seen == [*dense, *frames, ((1, 4), 0.0), ((1, 4), 0.0)]
    fading = NMProgressive(pattern="1:4", location=["linear"], rate=0.5, dense_share=0.2, finetune_share=0.2)
    part = fading.attach(small()).parts[0][2]
    values = []
    for step in range(10):
        fading.place(step, 10)
        values.append(part.decay.item())
    expected = [1, 1, *(math.exp(-0.5 * t) for t in range(6)), 0, 0]
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("recipe", ["mdgf_exp", "srste", "step", "sdgf_geometric"])
def test_alone_on_a_model(recipe: str) -> None:
    model, x = small(), seeded(64, 16)
    kept = model[0].weight
    method = NMProgressive(pattern="1:2", recipe=recipe, rate=0.3, location=["linear"], axis="row").attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = model(x).square().mean().item()
    for step in range(12):
        method.place(step, 12)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    method.place(12, 12)
    masked = model(x)
    method.merge()
    torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-6)
    assert model[0].weight is kept and type(model[0]) is nn.Linear and masked.square().mean().item() < first
    for layer in (model[0], model[2], model[3]):
        assert (layer.weight.view(layer.weight.shape[0], -1, 2) != 0).sum(-1).eq(1).all()
    assert method.masks.sparsity() == 0.5


def test_srste_without_pull_equals_step() -> None:
    weights = []
    for recipe in ("srste", "step"):
        model = small()
        method = NMProgressive(pattern="1:4", recipe=recipe, pull=0.0, location=["linear"]).attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            method.place(step, 5)
            optimizer.zero_grad()
            model(seeded(8, 16)).square().mean().backward()
            optimizer.step()
        method.merge()
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_layers_that_do_not_fit() -> None:
    method = NMProgressive(pattern="1:32", location=["linear"]).attach(small())
    assert method.left_dense == ["0", "3"] and [name for name, *_ in method.parts] == ["2.weight"]
    with pytest.raises(Unfit, match="needs layers with a multiple of 64 inputs"):
        NMProgressive(pattern="1:64", location=["linear"]).attach(small())
    with pytest.raises(UserError, match="location='nowhere' matches no layer"):
        NMProgressive(location=["nowhere"]).attach(small())
    with pytest.raises(Unfit, match="location=ff is for transformers"):
        NMProgressive().attach(small())
    for bad in ("4:2", "2-4", "0:4", "4:4"):
        with pytest.raises(UserError, match="must read N:M"):
            NMProgressive(pattern=bad)
    with pytest.raises(UserError, match="must not sum"):
        NMProgressive(dense_share=0.7, finetune_share=0.5)


def test_a_denoiser_keeps_one_convolution_weight_in_eight(tmp_path) -> None:
    from filtrun import runner
    from filtrun.bench_run import BenchRun
    from filtrun.cost import layer_macs

    me = "method.nm_progressive"
    words = ["model=unet", "model.size=nano", f"{me}.location=[conv]", f"{me}.pattern='1:8'", f"{me}.rate=0.5"]
    run = BenchRun("nm_progressive", words, tmp_path).fresh(steps=4)
    method = run.methods[0]
    masked, dense_layers = [name for name, *_ in method.parts], method.left_dense
    runner.setup(run)
    runner.fit(run)
    with run.plainly():
        macs = layer_macs(run.model, lambda: run.task.probe(run))
    report = method.report(run)
    expected = sum(n / 8 if f"{name}.weight" in masked else n for name, n in macs.items())  # N / M of a masked layer
    assert len(masked) > 5 and dense_layers and report["macs"] == pytest.approx(expected)
    method.finish(run)
    for name in masked:
        weight = run.model.get_parameter(name)
        assert (weight.movedim(1, -1).reshape(-1, 8) != 0).sum(1).eq(1).all(), name
