"""A method that changes shapes in the middle of a run: new optimizer, averaged weights, resume, DDP, constraints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.callbacks import Ema
from filtrun.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from filtrun.context import Run
from filtrun.methods.baseline.full import Full
from filtrun.methods.pruning.base import Pruning, mean_gradients
from filtrun.methods.pruning.removal import Removal
from filtrun.trainer import Phase, Trainer, lr_factor

VIT = ["model=vit", "model.size=nano", "model.depth=1"]
HALF = {"blocks.0.mlp.fc1.weight": 0, "blocks.0.mlp.fc1.bias": 0, "blocks.0.mlp.fc2.weight": 1}


class Halving(Pruning):
    """Trains two steps, drops every other hidden unit, trains two more; masks the head's first column."""

    slug = "halving"  # type: ignore[misc]

    def phases(self, run: Run) -> list[Phase]:
        return [Phase("wide", 2), Phase("narrow", 2, lr=1e-3, schedule="linear", warmup=0)]

    def start_phase(self, run: Run) -> None:
        if run.phase is not None and run.phase.name == "narrow":
            hidden = run.model.get_submodule("blocks.0.mlp.fc1").out_features
            keep = torch.arange(hidden) % 2 == 0
            sizes = {
                "blocks.0.mlp.fc1": {"out_features": hidden // 2},
                "blocks.0.mlp.fc2": {"in_features": hidden // 2},
            }
            self.remove(run, Removal({name: {dim: keep} for name, dim in HALF.items()}, sizes))
            name, weight = next((n, p) for n, p in self.weights.items() if n.endswith("head.weight"))
            self.masks.set(name, weight, torch.arange(weight.shape[1])[None] > 0, "channel")
            self.masks.apply()


class KeepAll(Full):
    """Callback that leaves the checkpoint of every step in a run folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def after_step(self, run: Run) -> None:
        save_checkpoint(run)
        (self.folder / f"at{run.step}").mkdir()
        shutil.move(run.dir / "checkpoints", self.folder / f"at{run.step}")


@pytest.fixture
def bench(tmp_path: Path) -> BenchRun:
    return BenchRun(Halving, VIT, tmp_path)


def started(bench: BenchRun) -> Run:
    run, average = bench.fresh(), Ema(0.9)
    run.callbacks.append(average)
    runner.setup(run)
    average.start(run)
    return run


def test_the_run_goes_on_with_a_new_optimizer(bench):
    run = started(bench)
    before, first = {n: id(p) for n, p in run.model.named_parameters()}, run.optimizer
    runner.fit(run)
    assert {n: id(p) for n, p in run.model.named_parameters()} == before  # the objects others hold
    assert run.model.get_parameter("blocks.0.mlp.fc1.weight").shape == (128, 64)
    assert run.optimizer is not first and run.step == 4
    state = run.optimizer.state[run.model.get_parameter("blocks.0.mlp.fc1.weight")]
    assert state["exp_avg"].shape == (128, 64) and float(state["step"]) == 2  # from zero
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 2)  # its own peak and schedule


def test_averages_cope_and_keep_to_the_masks(bench):
    run = started(bench)
    runner.fit(run)
    average = next(c for c in run.callbacks if isinstance(c, Ema))
    head = next(p for n, p in run.model.named_parameters() if n.endswith("head.weight"))
    trained = head.detach().clone()
    assert [a.shape for a in average.average] == [t.shape for t in average.tracked]
    with run.evaluating():
        assert not head[:, 0].any() and not torch.equal(head, trained)
    assert torch.equal(head, trained) and not head[:, 0].any()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_across_the_removal_is_exact(bench, tmp_path, stop):
    run = started(bench)
    run.dir = tmp_path / "run"
    run.callbacks.append(KeepAll(tmp_path))
    runner.fit(run)
    again = started(bench)
    again.dir = tmp_path / f"at{stop}"
    assert len(checkpoint_files(again.dir)) == 1 and load_checkpoint(again) and again.step == stop
    assert again.model.get_parameter("blocks.0.mlp.fc1.weight").shape[0] == (256 if stop <= 2 else 128)
    runner.fit(again)
    for (name, mine), theirs in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    averages = [next(c for c in r.callbacks if isinstance(c, Ema)).average for r in (run, again)]
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))


def test_nothing_that_trains_means_nothing_to_refit(bench):
    run = bench.fresh()
    run.optimizer = None
    runner.refit(run)
    assert run.optimizer is None


def test_scoring_gradients_are_means_and_leave_no_trace(bench):
    run = bench.fresh()
    run.model.get_parameter("blocks.0.mlp.fc1.weight").requires_grad_(False)
    flags = [p.requires_grad for p in run.model.parameters()]
    with mean_gradients(run, 2):
        both = [p.grad.clone() for p in run.model.parameters()]
    assert all(p.grad is None for p in run.model.parameters())
    assert [p.requires_grad for p in run.model.parameters()] == flags
    with mean_gradients(run, 1):
        one = [p.grad.clone() for p in run.model.parameters()]
    assert not all(torch.allclose(a, b) for a, b in zip(one, both, strict=True))
    with mean_gradients(run, 2):
        assert all(torch.equal(p.grad, b) for p, b in zip(run.model.parameters(), both, strict=True))


def test_a_phase_has_its_own_schedule():
    trainer = Trainer(schedule="cosine", warmup=4)
    assert lr_factor(trainer, 0, 8) == 0.25 and lr_factor(trainer, 0, 8, None, 0) == 1.0
    assert lr_factor(trainer, 4, 8, "linear", 0) == 0.5 and lr_factor(trainer, 7, 8, "constant", 0) == 1.0


def test_batch_statistics_do_not_move_while_scoring(tmp_path):
    bench = BenchRun(lambda: Full(), ["model=resnet20", "model.width=4", "model.depth=8"], tmp_path)
    run = bench.fresh()
    before = [b.clone() for b in run.model.buffers()]
    with mean_gradients(run, 1):
        assert isinstance(run.model.get_submodule("bn1"), nn.BatchNorm2d)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.buffers(), strict=True))
