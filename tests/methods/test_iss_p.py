"""Soft shrinkage against a slow reference, its limits (dense training, hard thresholding), and masks that stay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filtrun.errors import UserError
from filtrun.methods.pruning.iss_p import ISSP
from filtrun.methods.pruning.soft_shrink import (
    SAMPLE,
    fitting_groups,
    shrink,
    shrink_count,
    smallest,
    smallest_fast,
    smallest_in_groups,
)


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_counts_round_up_and_are_capped() -> None:
    assert [shrink_count(10, p) for p in (0.0, 0.01, 0.5, 0.85)] == [0, 1, 5, 9]
    assert shrink_count(1000, 0.999) == 995 and shrink_count(400, 1.0) == 398


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_selection_and_one_step(ratio: float) -> None:
    weight = seeded(8, 4, 3, 3)
    before, chosen = weight.clone(), smallest(weight, ratio)
    order = sorted(range(weight.numel()), key=lambda i: abs(weight.flatten()[i].item()))
    expected = set(order[: math.ceil(ratio * weight.numel())])
    assert {i for i, on in enumerate(chosen.flatten().tolist()) if on} == expected
    shrink(weight, chosen, 0.95)
    assert torch.equal(weight[chosen], before[chosen] * 0.95) and torch.equal(weight[~chosen], before[~chosen])
    assert before[chosen].abs().max() <= before[~chosen].abs().min()


def test_ties_go_by_place() -> None:
    assert smallest(torch.ones(6), 0.5).tolist() == [True] * 3 + [False] * 3


def test_groups() -> None:
    weight = seeded(5, 8)
    chosen = smallest_in_groups(weight, 3, 4)
    assert torch.equal(chosen.view(-1, 4).sum(1), torch.full((10,), 3))
    kept = weight.view(-1, 4).abs().max(1).values
    assert torch.equal(weight[~chosen].abs(), kept)
    with pytest.raises(ValueError, match="40 entries are no multiple of 3"):
        smallest_in_groups(weight, 1, 3)
    assert fitting_groups(19, 20, [1728, 36864]) == (23, 24)
    assert fitting_groups(1, 2, [64, 32]) == (1, 2)
    with pytest.raises(ValueError, match="no group size fits"):
        fitting_groups(2, 3, [32, 9])


def test_fast_ranking_is_near_the_exact_one() -> None:
    weight = seeded(300, 300)
    fast = smallest_fast(weight, 0.9, torch.Generator().manual_seed(0))
    assert abs(fast.float().mean() - 0.9) < 0.01
    rows = torch.randint(weight.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0))
    following = weight.flatten()[rows].abs().sort().values[shrink_count(SAMPLE, 0.9)]  # fast_pick_pruned_layer
    assert torch.equal(fast, weight.abs() < following)
    small = seeded(10, 10)
    assert small.numel() < SAMPLE and torch.equal(smallest_fast(small, 0.5), smallest(small, 0.5))


def train(alpha: float, freeze_at: int = 20, **options: object) -> tuple[nn.Sequential, ISSP | None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    method = ISSP(alpha=alpha, **options).attach(model) if alpha >= 0 else None  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        (model(seeded(16, 8)) - 1).square().mean().backward()
        optimizer.step()
        if method is not None and step < freeze_at:
            method.shrink()
        elif method is not None:
            if step == freeze_at:
                method.freeze()
            method.masks.apply()
    return model, method


def test_alpha_one_is_dense_training_to_the_bit() -> None:
    dense, shrunk = train(-1)[0], train(1.0, freeze_at=99)[0]
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), shrunk.parameters(), strict=True))


def test_alpha_zero_is_hard_thresholding() -> None:
    model, _ = train(0.0, freeze_at=99, ratio=0.7)
    for layer in (model[0], model[2]):
        assert int((layer.weight == 0).sum()) == math.ceil(0.7 * layer.weight.numel())


def test_the_frozen_mask_holds() -> None:
    model, method = train(0.95, ratio=0.8)
    assert method is not None
    for name, layer in (("0.weight", model[0]), ("2.weight", model[2])):
        assert int((layer.weight == 0).sum()) == math.ceil(0.8 * layer.weight.numel())
        assert torch.equal(layer.weight != 0, method.masks[name])
    assert abs(method.masks.sparsity() - 0.8) < 0.01


def test_groups_on_a_model_and_mistakes() -> None:
    model, _ = train(0.9, groups="3:4")
    assert (model[0].weight.view(-1, 4) == 0).sum(1).eq(3).all()
    for bad in ("4:4", "3-4"):
        with pytest.raises(UserError, match="must read D:S"):
            ISSP(groups=bad)
    with pytest.raises(UserError, match=r"groups=2:3: no group size fits"):
        ISSP(groups="2:3").attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(3, 3)))


def test_a_super_resolution_network_pays_for_what_is_left(tmp_path) -> None:
    from filtrun import runner
    from filtrun.bench_run import BenchRun
    from filtrun.cost import layer_macs

    words = ["model=espcn", "task=superres", "data=photos", "data.patches=50", "task.crop=32", "task.eval_images=1"]
    run = BenchRun("iss_p", words, tmp_path).fresh(steps=4)
    runner.setup(run)
    runner.fit(run)
    method = run.methods[0]
    method.verify(run)
    with run.plainly():
        dense = layer_macs(run.model, lambda: run.task.probe(run))
    left = sum(macs * int((run.model.get_submodule(n).weight != 0).sum()) / run.model.get_submodule(n).weight.numel()
               for n, macs in dense.items())  # fmt: skip
    report = method.report(run)
    assert report["macs"] == pytest.approx(left) and 0.09 < left / sum(dense.values()) < 0.1
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-3)
