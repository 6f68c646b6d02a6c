"""The conformance check that ordinary training steps leave the host free to run ahead of a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.callbacks import Ema
from filtrun.conformance_checks import Failed, Skip
from filtrun.context import Run
from filtrun.method import Method
from filtrun.waits import DEVICE, Event, Watch

STEPS = 20
"""Steps of a run of several phases, which share them."""


def enough(epoch: int) -> int:
    """Steps of a run of one phase that hold two ordinary ones running, with `epoch` steps an epoch."""
    return 6 if epoch > 4 else 10


class Steps(Method):
    """Callback that tells a watch which step its events belong to; the last callback of a run."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def after_step(self, run: Run) -> None:
        self.watch.step = run.step


def steps_do_not_wait(bench: BenchRun) -> None:
    """No line waits for the device in two ordinary steps running; nothing mixes tensors of host and device.

    Ordinary steps are all but a phase's first two and last and an epoch's first and last. So a method may wait every
    few steps (a new mask), and at phases and epochs. A class may allow a function of its to wait in every step, with
    a reason: ``waits = {"function": "why"}``.
    """
    run, events = watched(bench)
    if run.optimizer is None:
        raise Skip("trains nothing")
    if mixed := [event for event in events if event.kind != "waits"]:
        raise Failed(str(mixed[0]))
    if found := in_every_step(run, events):
        raise Failed(str(found[0]))


def on_stand_in(precision: str = "32") -> Any:
    """Lightning Fabric with one process on the device that stands for a GPU."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import SingleDeviceStrategy

    kind: Any = {"32": "32-true", "bf16": "bf16-mixed"}[precision]
    return Fabric(accelerator="cpu", strategy=SingleDeviceStrategy(DEVICE), precision=kind)


def watched(bench: BenchRun, callbacks: Sequence[Method] = (), **trainer: Any) -> tuple[Run, list[Event]]:
    """A run edited and trained on the device that stands for a GPU, and what was seen meanwhile.

    Waits before the first step are left out. Averages among `callbacks` are started.
    """
    with Watch() as watch:
        fabric = on_stand_in(trainer.get("precision", "32"))
        run = bench.fresh(edit=False, fabric=fabric, **{"steps": STEPS, **trainer})
        run.model.to(run.device)
        runner.edit(run)
        runner.setup(run)
        if run.optimizer is None:
            return run, watch.events
        if len(run.phases) == 1:
            run.phases[0].steps = min(enough(run.steps_per_epoch), run.phases[0].steps)
        for callback in callbacks:
            if isinstance(callback, Ema):
                callback.start(run)
        run.callbacks += [*callbacks, Steps(watch)]
        watch.events = [event for event in watch.events if event.kind != "waits"]
        runner.fit(run)
    return run, watch.events


def in_every_step(run: Run, events: Iterable[Event]) -> list[Event]:
    """The waits of lines that wait in two ordinary steps running and are not allowed to, the first of each line."""
    allowed = {name for owner in (*run.methods, run.task, run.model) for name in getattr(type(owner), "waits", {})}
    ordinary = ordinary_steps([phase.steps for phase in run.phases], run.steps_per_epoch)
    steps: dict[str, set[int]] = {}
    first: dict[str, Event] = {}
    for event in events:
        if event.kind == "waits" and event.step in ordinary and event.function.rpartition(".")[2] not in allowed:
            steps.setdefault(event.place, set()).add(event.step)
            first.setdefault(event.place, event)
    return [first[place] for place, seen in steps.items() if any(step + 1 in seen for step in seen)]


def ordinary_steps(phases: list[int], epoch: int) -> set[int]:
    """Numbers of the steps, from 0, that are neither a phase's first two or last nor an epoch's first or last."""
    ends = list(accumulate(phases))
    found = {step for end, length in zip(ends, phases, strict=True) for step in range(end - length + 2, end - 1)}
    return {step for step in found if step % epoch and (step + 1) % epoch}
