"""Optimizer groups that a model asks for: other learning rates, and layers that start to train later."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.callbacks import Hold, Log
from filtrun.checkpoint import Checkpoints, load_checkpoint
from filtrun.context import Run
from filtrun.data.loader import epoch_order
from filtrun.loggers import Loggers
from filtrun.method import Method
from filtrun.methods.baseline.full import Full
from filtrun.trainer import Phase, Trainer, grouped, make_optimizer

VIT = ["model=vit", "model.size=nano", "model.depth=1"]


def sizes(groups: list[dict[str, Any]]) -> list[list[int]]:
    return [[p.numel() for p in group["params"]] for group in groups]


def test_groups_of_methods_come_first_and_those_of_the_model_last() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(n)) for n in (1, 2, 3, 4))
    frozen = nn.Parameter(torch.zeros(9))
    asked = [{"params": [b, c, frozen], "lr_factor": 0.5}, {"params": [c]}]
    groups = grouped([a, b, c, d], [{"params": [b], "lr": 3.0}], asked)
    assert sizes(groups) == [[2], [1, 4], [3]]
    assert groups[-1]["lr_factor"] == 0.5 and "lr_factor" not in groups[1]
    assert asked[0]["params"] == [b, c, frozen]  # left as it was
    assert sizes(grouped([c], [], asked)) == [[3]]


def test_factors_multiply_the_rate() -> None:
    a, b, c = (nn.Parameter(torch.zeros(n)) for n in (1, 2, 3))
    asked = [{"params": [b], "lr_factor": 0.1}, {"params": [c], "lr": 5.0, "weight_decay": 0.0}]
    optimizer = make_optimizer(Trainer(lr=0.2, weight_decay=0.3), grouped([a, b, c], [], asked))
    made = [(g["lr"], g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert made == [(0.2, 0.2, 0.3), pytest.approx((0.02, 0.02, 0.3)), (5.0, 5.0, 0.0)]


def head(model: Any) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.startswith("head")]


def asking(bench: BenchRun, options: dict[str, Any], **trainer: Any) -> Run:
    """A run whose model asks for a group of its head."""
    run = bench.fresh(edit=False, batch_size=400, **trainer)  # three steps an epoch
    run.model.param_groups = lambda: [{"params": head(run.model), **options}]  # type: ignore[assignment]
    runner.edit(run)
    return run


def test_it_is_what_bare_torch_computes(tmp_path: Path) -> None:
    """Head at a tenth of the rate and frozen for two of seven steps; clipping must not see its gradient before."""
    bench = BenchRun("full", VIT, tmp_path)
    run = asking(bench, {"lr_factor": 0.1, "hold_epochs": 9, "hold_share": 2 / 7}, steps=7, clip=0.05)
    runner.setup(run)
    runner.fit(run)

    model = copy.deepcopy(bench.base).train()
    train = bench.data.split("train", "all")
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in bench.data.mean_std())
    late = head(model)
    rest = [p for p in model.parameters() if all(p is not q for q in late)]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": late, "lr": 5e-4}], lr=5e-3, weight_decay=0.0, fused=True
    )
    for step in range(7):
        for p in late:
            p.requires_grad_(step >= 2)
        epoch, position = divmod(step, 3)
        batch = train.batch(epoch_order(len(train), 0, epoch)[position * 400 : (position + 1) * 400])
        F.cross_entropy(model((batch.x - mean) / std), batch.y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(run.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)


class Watch(Method):
    """After which steps the head had changed, and the rates in use."""

    slug = "_watch"

    def __init__(self, run: Run) -> None:
        self.before = [p.detach().clone() for p in head(run.model)]
        self.changed: list[bool] = []
        self.rates: list[list[float]] = []

    def after_step(self, run: Run) -> None:
        self.changed.append(any(not torch.equal(a, b) for a, b in zip(self.before, head(run.model), strict=True)))
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])


@pytest.mark.parametrize(
    ("options", "first"),
    [({}, 1), ({"hold_epochs": 1}, 4), ({"hold_epochs": 0.5}, 3), ({"hold_epochs": 1, "hold_share": 0.25}, 3),
     ({"hold_epochs": 1, "hold_share": 0.0}, 1), ({"hold_epochs": 99}, 9)],
)  # fmt: skip
def test_a_held_group_starts_later(tmp_path: Path, options: dict[str, Any], first: int) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    run = asking(bench, options, steps=8)
    watch = Watch(run)
    run.callbacks = [watch]
    runner.setup(run)
    runner.fit(run)
    assert watch.changed == [step >= first for step in range(1, 9)]
    assert sum(isinstance(c, Hold) for c in run.callbacks) == (1 if options.get("hold_epochs") else 0)


class TwoPhases(Full):
    """The second phase has a rate of its own."""

    def phases(self, run: Run) -> list[Phase]:
        return [Phase("one", 1), Phase("two", 1, lr=0.2)]


def test_a_phase_with_its_own_rate_keeps_the_factor(tmp_path: Path) -> None:
    run = asking(BenchRun(TwoPhases, VIT, tmp_path), {"lr_factor": 0.1}, lr=0.01)
    watch = Watch(run)
    run.callbacks = [watch]
    runner.setup(run)
    runner.fit(run)
    assert watch.rates == [pytest.approx([0.01, 0.001]), pytest.approx([0.2, 0.02])]


def test_a_method_that_trains_a_part_leaves_the_others_out(tmp_path: Path) -> None:
    run = asking(BenchRun("lora", VIT, tmp_path), {"lr_factor": 0.1})
    runner.setup(run)
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in run.model.parameters() if p.requires_grad}
    assert len(trained) == len({id(p) for p in trained})


@pytest.mark.parametrize("every", [1, 4])
def test_resuming_in_the_hold_and_after_it(tmp_path: Path, every: int) -> None:
    bench = BenchRun("full", VIT, tmp_path)

    def train(folder: Path, steps: int, every: int) -> Run:
        run = asking(bench, {"hold_epochs": 1}, steps=6)
        run.dir, run.callbacks = folder, [Log(2, Loggers()), Checkpoints(every)]
        runner.setup(run)
        load_checkpoint(run)
        run.phases = [Phase("train", steps)]
        runner.fit(run)
        return run

    want = train(tmp_path / "whole", 6, 0)
    train(tmp_path / "cut", every + 1, every)
    again = train(tmp_path / "cut", 6, every)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), want.model.parameters(), strict=True))


def test_adaint_trains_its_intervals_slowly_and_late(tmp_path: Path) -> None:
    options = [
        "model=adaint",
        "model.lut_size=3",
        "model.hold_share=0.5",
        "data=photos",
        "data.patches=16",
        "task.crop=16",
    ]
    bench = BenchRun("full", options, tmp_path)
    run = bench.fresh(steps=4, batch_size=4, optimizer="sgd")
    own = run.model.adaint.intervals_generator.weight  # type: ignore[union-attr]
    before, seen = own.detach().clone(), []

    class Look(Method):
        def after_step(self, run: Run) -> None:
            seen.append(torch.equal(own, before))

    run.callbacks.append(Look())
    runner.setup(run)
    runner.fit(run)
    assert seen == [True, True, False, False]
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([5e-3, 5e-4])
