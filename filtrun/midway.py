"""Evaluations in the middle of training: what a curve of the metrics is drawn from, and what a search stops runs by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from filtrun.callbacks import Log
from filtrun.errors import Stopped
from filtrun.loggers import Loggers
from filtrun.method import Method
from filtrun.sweeps.watch import may_go_on

if TYPE_CHECKING:
    from filtrun.context import Run


class Midway(Method):
    """Evaluates `count` times while a run trains, evenly spread, and logs ``tuned/NAME``; changes nothing it computes.

    After each the run asks whoever watches it (`filtrun.sweeps.watch`) and raises Stopped when the answer is no.
    """

    slug = ""

    def __init__(self, count: int, log: Log, loggers: Loggers) -> None:
        self.count, self.log, self.loggers = count, log, loggers

    def after_step(self, run: Run) -> None:
        total = sum(phase.steps for phase in run.phases)
        rung = rungs(total, self.count).get(run.step)
        if rung is None:
            return
        started = time.perf_counter()
        devices = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(devices), run.evaluating():
            values = {name: float(value) for name, value in run.task.evaluate(run).items()}
        self.loggers.write(run.step, {f"tuned/{name}": value for name, value in values.items()})
        go_on = run.fabric.global_rank > 0 or may_go_on(run.dir, rung, values)
        go_on = run.fabric.broadcast(go_on)
        self.log.started += time.perf_counter() - started  # speed is that of training
        if not go_on:
            raise Stopped(f"stopped early by a search after {run.step} of {total} steps: worse than other trials")


def rungs(total: int, count: int) -> dict[int, int]:
    """Step -> number from 1 of the evaluations among `total` steps; fewer than `count` where there are few steps."""
    steps = {round(total * i / (count + 1)): i for i in range(1, count + 1)}
    return {step: i for step, i in steps.items() if 0 < step < total}
