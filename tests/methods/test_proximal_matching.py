"""Proximal matching: the loss and its schedule by hand, and weights that stay non-negative."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from filtrun.errors import UserError
from filtrun.methods.restoration.proximal_matching import ProximalMatching, gamma_schedule, matching_loss
from filtrun.models.lpn import LPN
from filtrun.trainer import Phase


def test_the_loss_is_one_minus_a_gaussian_of_the_distance_of_whole_images() -> None:
    torch.manual_seed(0)
    out, target = torch.rand(2, 3, 2, 4, 4)
    expected = sum(1 - math.exp(-((out[b] - target[b]) ** 2).sum().item() / 0.7**2) for b in range(3)) / 3
    assert matching_loss(out, target, 0.7).item() == pytest.approx(expected, rel=1e-5)
    assert matching_loss(out, out, 0.7).item() == 0
    near = out + 1e-4  # where it is small it is the squared distance over gamma^2, without cancellation
    assert matching_loss(near, out, 0.7).item() == pytest.approx(32 * 1e-8 / 0.49, rel=1e-2)


def run_of(steps: int, **more: Any) -> Any:
    trainer = SimpleNamespace(total_steps=lambda images: steps)
    return SimpleNamespace(trainer=trainer, train_split=[0] * 10, shared={}, phase=None, **more)


def test_phases_are_the_official_schedule() -> None:
    phases = ProximalMatching().phases(run_of(40_000))
    assert [(p.name, p.steps, p.lr) for p in phases] == [
        ("l1", 20_000, 1e-3), ("match1", 5000, 1e-4), ("match2", 5000, 1e-4), ("match3", 5000, 1e-4),
        ("match4", 5000, 1e-4),
    ]  # fmt: skip
    assert [p.steps for p in ProximalMatching(warmup=0.0, stages=3).phases(run_of(11))] == [3, 3, 5]
    assert [p.name for p in ProximalMatching().phases(run_of(3))] == ["l1", "match4"]


@pytest.mark.parametrize(("phase", "gamma"), [("l1", None), ("match1", 8), ("match2", 4), ("match4", 1)])
def test_each_phase_has_its_loss(phase: str, gamma: int | None) -> None:
    torch.manual_seed(1)
    out, target = torch.rand(2, 3, 1, 5, 5)
    run = run_of(8)
    run.shared, run.phase = {"pair": SimpleNamespace(y=target), "output": (out + 1, out)}, Phase(phase, 1)
    found = ProximalMatching().loss(run, None, torch.tensor(7.0))
    if gamma is None:
        torch.testing.assert_close(found, (out - target).abs().mean())
    else:
        torch.testing.assert_close(found, matching_loss(out, target, gamma * 0.08 * 5))
    assert ProximalMatching(gamma=0.3).smallest(target) == 0.3
    assert gamma_schedule(0.3, 1) == [0.3]


def test_weights_are_non_negative_after_each_step() -> None:
    model = LPN(1, 8, hidden=3)
    method, run = ProximalMatching(), run_of(8, model=torch.nn.Sequential(model))
    method.edit_model(run)
    with torch.no_grad():
        for weight in model.convex_weights():
            weight.sub_(1)
    free = model.res[0].weight.detach().clone()
    method.after_step(run)
    assert all(weight.min() == 0 for weight in model.convex_weights())
    assert torch.equal(free, model.res[0].weight) and free.min() < 0


def test_what_does_not_fit_is_said() -> None:
    run = run_of(8)
    run.shared = {"pair": SimpleNamespace(y=torch.rand(1, 1, 4, 4)), "output": torch.rand(1, 1, 2, 2)}
    run.phase = Phase("l1", 1)
    with pytest.raises(UserError, match=r"output \(1, 1, 2, 2\), target \(1, 1, 4, 4\)"):
        ProximalMatching().loss(run, None, torch.tensor(0.0))
    with pytest.raises(UserError, match="gamma=0"):
        ProximalMatching(gamma=0.0)
