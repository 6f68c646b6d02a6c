"""Averaged weights against a slow reference; what is logged; when a run stops for NaN."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.callbacks import Ema, Log
from filtrun.checkpoint import Checkpoints, checkpoint_files
from filtrun.context import Run
from filtrun.errors import RunFailure
from filtrun.loggers import Logger, Loggers
from filtrun.method import Method
from filtrun.methods.baseline.full import Full
from filtrun.pack import load_tree
from filtrun.trainer import Phase

VIT = ["model=vit", "model.size=nano", "model.depth=1"]
RESNET = ["model=resnet20", "model.width=4"]


class Lines(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: Any) -> None:
        self.lines.append((step, dict(values)))


class Trace(Method):
    """Keeps the losses and every state the model had."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.states: list[dict[str, Tensor]] = []

    def after_step(self, run: Run) -> None:
        assert run.total_loss is not None
        self.losses.append(run.total_loss.item())
        self.states.append(copy.deepcopy(run.model.state_dict()))


def fit(run: Run, methods: list[Method], callbacks: list[Method]) -> Run:
    run.methods, run.callbacks = methods, callbacks
    runner.edit(run)
    runner.setup(run)
    for callback in callbacks:
        if isinstance(callback, Ema):
            callback.start(run)
    runner.fit(run)
    return run


# -- averaged weights


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_ema_is_the_slow_average(tmp_path: Path, decay: float) -> None:
    bench = BenchRun("full", RESNET, tmp_path)
    ema, trace = Ema(decay), Trace()
    run = fit(bench.fresh(edit=False, steps=15), [Full()], [trace, ema])
    want = {n: t.double() for n, t in bench.base.state_dict().items() if t.is_floating_point()}
    for step, state in enumerate(trace.states, start=1):
        d = min(decay, (1 + step) / (10 + step))
        want = {n: d * a + (1 - d) * state[n].double() for n, a in want.items()}
    trained = copy.deepcopy(run.model.state_dict())
    with run.evaluating():
        for name, value in want.items():
            torch.testing.assert_close(run.model.state_dict()[name].double(), value, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(trained[n], t) for n, t in run.model.state_dict().items())  # put back, bit for bit
    ema.finish(run)
    for name, value in want.items():
        torch.testing.assert_close(run.model.state_dict()[name].double(), value, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(trained[n], t) for n, t in run.model.state_dict().items())


def test_ema_follows_only_what_trains_and_the_buffers(tmp_path: Path) -> None:
    bench = BenchRun("linear_probe", RESNET, tmp_path)
    run = bench.fresh()
    runner.setup(run)
    ema = Ema(0.9)
    ema.start(run)
    names = {id(t): n for n, t in [*run.model.named_parameters(), *run.model.named_buffers()]}
    tracked = {names[id(t)] for t in ema.tracked}
    buffers = {n for n, b in run.model.named_buffers() if b.is_floating_point()}
    assert buffers and tracked == buffers | {n for n, p in run.model.named_parameters() if p.requires_grad}


# -- the log


def test_a_line_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    lines, trace = Lines(), Trace()
    run = BenchRun("full", VIT, tmp_path).fresh(edit=False, steps=7, schedule="linear", lr=0.01)
    fit(run, [Full()], [trace, Log(3, Loggers([lines]))])
    assert [step for step, _ in lines.lines] == [3, 6, 7]
    for (_, values), part in zip(lines.lines, (trace.losses[:3], trace.losses[3:6], trace.losses[6:]), strict=True):
        assert values["train/loss"] == values["train/task_loss"] == pytest.approx(sum(part) / len(part), rel=1e-6)
    assert [values["lr"] for _, values in lines.lines] == pytest.approx([0.01 * (1 - t / 7) for t in (2, 5, 6)])
    assert all(values["images_per_second"] > 0 for _, values in lines.lines)


class TwoPhases(Full):
    def phases(self, run: Run) -> list[Phase]:
        return [Phase("one", 2), Phase("two", 3)]

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        return loss + 1


def test_a_new_phase_starts_a_new_line(tmp_path: Path) -> None:
    lines, trace = Lines(), Trace()
    fit(BenchRun("full", VIT, tmp_path).fresh(edit=False), [TwoPhases()], [trace, Log(20, Loggers([lines]))])
    means = [sum(trace.losses[:2]) / 2, sum(trace.losses[2:]) / 3]
    assert [step for step, _ in lines.lines] == [2, 5]
    assert [values["train/loss"] for _, values in lines.lines] == pytest.approx(means, rel=1e-6)
    assert [v["train/loss"] - v["train/task_loss"] for _, v in lines.lines] == pytest.approx([1, 1], abs=1e-5)


def test_images_and_seconds_are_counted_over_a_resume(tmp_path: Path) -> None:
    log = Log(1, Loggers())
    fit(BenchRun("full", VIT, tmp_path).fresh(edit=False, steps=3, batch_size=16), [Full()], [log])
    assert log.images == 48 and log.seconds > 0
    later = Log(1, Loggers())
    later.load_state_dict(log.state_dict())
    fit(BenchRun("full", VIT, tmp_path).fresh(edit=False, steps=2, batch_size=16), [Full()], [later])
    assert later.images == 80 and later.seconds > log.seconds


# -- NaN


class Poison(Full):
    """Its term is not finite at one step; `share` decides whether the gradient is."""

    def __init__(self, step: int, value: float, nan_ok: bool = False) -> None:
        self.step, self.value, self.nan_ok = step, value, nan_ok  # type: ignore[misc]

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        return loss + self.value if run.step == self.step else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_steps(tmp_path: Path, value: float) -> None:
    lines = Lines()
    run = BenchRun("full", VIT, tmp_path).fresh(edit=False, steps=20, lr=0.125)
    with pytest.raises(RunFailure) as error:
        fit(run, [Poison(6, value)], [Log(4, Loggers([lines]))])
    assert str(error.value) == (
        f"the loss became {value} between steps 5 and 8 (train, learning rate 0.125); "
        "try a lower trainer.lr, trainer.clip=1 or trainer.precision=32"
    )
    assert run.step == 8 and [step for step, _ in lines.lines] == [4, 8]
    assert "train/loss" not in lines.lines[1][1] and math.isfinite(lines.lines[1][1]["train/task_loss"])


def test_a_methods_own_term_may_be_nan_if_it_says_so(tmp_path: Path) -> None:
    run = BenchRun("full", VIT, tmp_path).fresh(edit=False, steps=8)
    fit(run, [Poison(3, math.nan, nan_ok=True)], [Log(4, Loggers())])
    assert run.step == 8


def test_the_tasks_own_loss_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BenchRun("full", VIT, tmp_path).fresh(edit=False, steps=8)
    plain = run.task.loss
    monkeypatch.setattr(run.task, "loss", lambda r, b: plain(r, b) * (math.nan if r.step == 5 else 1))
    with pytest.raises(RunFailure, match="the loss became nan between steps 5 and 8"):
        fit(run, [Poison(99, 0, nan_ok=True)], [Log(4, Loggers())])


class Breaks(Full):
    """Makes every gradient of step 5 NaN."""

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        return loss * math.nan if run.step == 4 else loss


def test_no_checkpoint_holds_a_nan(tmp_path: Path) -> None:
    run = BenchRun("full", VIT, tmp_path).fresh(edit=False, steps=20, checkpoint_every=2)
    run.dir = tmp_path / "run"
    with pytest.raises(RunFailure, match="between steps 5 and 6"):  # read early: a checkpoint was due
        fit(run, [Breaks()], [Log(100, Loggers()), Checkpoints(2)])
    files = checkpoint_files(run.dir)
    assert [f.name for f in files] == ["step-000000002.safetensors", "step-000000004.safetensors"]
    state, _ = load_tree(files[-1])
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["model"].values())
    assert any(not p.isfinite().all() for p in run.model.parameters())
