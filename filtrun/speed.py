"""How a training step is executed: memory layout, torch.compile and CUDA graphs, chosen by one key, ``speed``.

``off`` runs what ``trainer.compile`` and ``trainer.channels_last`` say. ``auto`` times a few steps of each way on a
copy of the model and keeps the fastest, the plain one unless another is clearly faster; the arithmetic stays as it is.
``max`` takes channels-last and torch.compile (with CUDA graphs on a GPU) untimed, and bfloat16 for float32.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from filtrun.context import Run

log = logging.getLogger("filtrun")

SPEEDS = ("off", "auto", "max")
FILE = "speed.json"
"""In the run folder: what was chosen, so that a resumed run goes on in the same way."""

MIN_STEPS = 200
"""A shorter run is not measured: the steps spent on it would be no small part of the run."""
GAIN = 0.93
"""A way must take at most this part of the plain step's time, on a CPU also of its CPU time; less may be noise."""
WORTH_COMPILING = {"cpu": 600.0, "cuda": 60.0}
"""Seconds of training left from which compiling, tens of seconds or minutes, is tried."""
AGREE = {"32": 1e-3, "16": 2e-2, "bf16": 2e-2}
"""How far the first loss may be from the plain step's, relative, by ``trainer.precision``; else the way is dropped."""


@dataclass(frozen=True)
class Way:
    """One way to execute a step: channels-last layout or not, and the mode of torch.compile or None."""

    channels_last: bool = False
    compile: str | None = None

    def __str__(self) -> str:
        parts = ["channels_last"] * self.channels_last + [f"compile ({self.compile})"] * bool(self.compile)
        return " + ".join(parts) or "plain"

    def lay_out(self, model: nn.Module) -> None:
        """Give the weights the layout, in place."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The module to train: `model`, or a compiled one that shares its tensors and draws the same numbers."""
        if self.compile is None:
            return model
        import torch._inductor.config

        torch._inductor.config.fallback_random = True  # dropout draws what it draws without compiling
        return torch.compile(model, mode=self.compile)  # type: ignore[return-value]


PLAIN = Way()


@dataclass
class Choice:
    """The way taken, why, and the seconds of a step that were measured by way."""

    way: Way = PLAIN
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {"chosen": str(self.way), "reason": self.reason, "step_seconds": self.seconds}


def choose(run: Run) -> Choice:
    """The way of a run whose model is edited and whose phases are planned; logged, and kept for a resumed run."""
    path = run.dir / FILE if run.dir.parts else None
    known = {"speed": run.trainer.speed, "device": run.device.type}
    if path is not None and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["for"] == known:
            return Choice(Way(**found["way"]), "as before the run was interrupted", found["seconds"])
    choice = _measured(run) if run.trainer.speed == "auto" else _fastest(run)
    log.info("speed=%s (%s): %s; %s", run.trainer.speed, run.label, choice.way, choice.reason)
    if path is not None and run.fabric.global_rank == 0:
        kept = {"for": known, "way": asdict(choice.way), "seconds": choice.seconds}
        path.write_text(json.dumps(kept), encoding="utf-8")
    return choice


def _mode(run: Run) -> str:
    # a CUDA graph writes gradients where it wrote them before: over those of the micro-batch before, too
    graphs = run.device.type == "cuda" and run.trainer.accumulate == 1
    return "reduce-overhead" if graphs else "default"


def _cannot(run: Run) -> str:
    """Why steps of this run are not timed on a copy of its model, or nothing."""
    if run.trainer.compile or run.trainer.channels_last:
        return "trainer.compile or trainer.channels_last says how"
    if run.fabric.world_size > 1:
        return "several processes might choose differently"
    if any(method.own_step is not None for method in run.methods):
        return "a method makes the steps itself"
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in run.model.modules()):
        return "a method has hooks in the model, which a copy would call too"
    steps = sum(phase.steps for phase in run.phases)
    return f"{steps} steps are too few to measure" if steps < MIN_STEPS else ""


def _measured(run: Run) -> Choice:
    reason = _cannot(run)
    if reason:
        return Choice(PLAIN, reason)
    steps = sum(phase.steps for phase in run.phases)
    with _untouched(run):
        trials = Trials(run, rounds=min(5, steps // 100))
        trials.compare(PLAIN, Way(channels_last=True))
        if PLAIN not in trials.seconds:
            return Choice(PLAIN, f"its step could not be tried: {trials.dropped.get(PLAIN)}")
        best = trials.best()
        left = trials.seconds[best] * steps
        if left >= WORTH_COMPILING.get(run.device.type, float("inf")) and len(run.phases) == 1:
            compiled = Way(best.channels_last, _mode(run))
            trials.compare(best, compiled)
            if compiled in trials.seconds:
                saved = (trials.seconds[best] - trials.seconds[compiled]) * steps
                if saved < trials.first[compiled]:  # compiling once more, for the run itself, would not pay
                    trials.drop(compiled, "compiling takes longer than it saves")
        best = trials.best()
    seconds = {str(way): round(value, 6) for way, value in trials.seconds.items()}
    told = [f"{way} {1e3 * value:.1f} ms" for way, value in seconds.items()]
    told += [f"{way} dropped: {why}" for way, why in trials.dropped.items()]
    return Choice(best, ", ".join(told), seconds)


def _fastest(run: Run) -> Choice:
    way = Way(channels_last=True, compile=None if run.trainer.compile else _mode(run))
    if any(method.own_step is not None for method in run.methods) or run.fabric.world_size > 1:
        return Choice(way, "not tried on a copy first")
    with _untouched(run):
        trials = Trials(run, rounds=0)
        trials.compare(way)
    if way in trials.dropped:
        return Choice(Way(channels_last=True), f"{way} dropped: {trials.dropped[way]}")
    return Choice(way, f"first step {trials.first[way]:.1f} s, compiling included")


class Trials:
    """Steps (forward and backward) of several ways on copies of a run's model, all on one batch and the same draws."""

    def __init__(self, run: Run, rounds: int) -> None:
        self.run, self.rounds = run, rounds
        self.batch = run.augment(next(iter(run.batches(0, skip=0))))
        self.seconds: dict[Way, float] = {}
        self.work: dict[Way, float] = {}  # CPU time: what other programs on the machine do does not count
        self.first: dict[Way, float] = {}
        self.dropped: dict[Way, str] = {}
        self.loss: float | None = None

    def best(self) -> Way:
        """The fastest way, the plain one unless another is faster by more than noise."""
        plain, work = self.seconds.get(PLAIN, 0.0), self.work.get(PLAIN, 0.0)
        faster = [way for way, seconds in self.seconds.items() if seconds < GAIN * plain]
        if self.run.device.type == "cpu":  # less time and less work; one of them alone may be chance
            faster = [way for way in faster if self.work[way] < GAIN * work]
        return min(faster, key=lambda way: self.seconds[way], default=PLAIN)

    def drop(self, way: Way, reason: str) -> None:
        """Leave a way out."""
        self.seconds.pop(way, None)
        self.dropped[way] = reason

    def compare(self, *ways: Way) -> None:
        """Time each way's first step, then `rounds` more of each in turn; the least of them counts."""
        nets: dict[Way, nn.Module] = {}
        for way in ways:
            try:
                model = copy.deepcopy(self.run.model).to(self.run.device)
                way.lay_out(model)
                nets[way] = way.wrapped(model)
                self.first[way], _, loss = self._step(nets[way])
            except Exception as error:  # whatever a compiler or a copy may raise: this way is not taken
                self._give_up(way, nets, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                continue
            if self.loss is None:
                self.loss = loss
            allowed = AGREE[self.run.trainer.precision]
            if not abs(loss - self.loss) <= allowed * abs(self.loss):
                self._give_up(way, nets, f"its first loss is {loss:.6g}, not {self.loss:.6g}")
        for _ in range(self.rounds):
            for way, net in list(nets.items()):
                seconds, work, _ = self._step(net)
                self.seconds[way] = min(seconds, self.seconds.get(way, float("inf")))
                self.work[way] = min(work, self.work.get(way, float("inf")))
        nets.clear()
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()

    def _give_up(self, way: Way, nets: dict[Way, nn.Module], reason: str) -> None:
        nets.pop(way, None)
        self.drop(way, reason)
        log.info("%s: %s", way, reason)

    def _step(self, net: nn.Module) -> tuple[float, float, float]:
        """(seconds, seconds of CPU time, loss) of one forward and backward."""
        run = self.run
        net.train()
        run.net = net
        run.seed_step(1)
        self._wait()
        start, work = time.perf_counter(), time.process_time()
        with run.fabric.autocast():
            loss = run.task.loss(run, self.batch)
        loss.backward()
        self._wait()
        seconds, work = time.perf_counter() - start, time.process_time() - work
        net.zero_grad(set_to_none=True)
        return seconds, work, float(loss.detach())

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


@contextmanager
def _untouched(run: Run) -> Iterator[None]:
    """Leave the run and torch's generators as they were."""
    devices = [run.device] if run.device.type == "cuda" else []
    net, shared, epoch, training = run.net, dict(run.shared), run.epoch, run.model.training
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        run.net, run.epoch = net, epoch
        run.shared.clear()
        run.shared.update(shared)
        run.model.train(training)
