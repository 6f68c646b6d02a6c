"""The runner's own hooks: logging with a NaN stop, averaged weights, and layers that start to train later."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from filtrun.errors import RunFailure
from filtrun.loggers import Loggers
from filtrun.method import Method

if TYPE_CHECKING:
    from filtrun.context import Run


UNREAD = 512
"""Losses kept apart before they are summed."""


class Log(Method):
    """Loss, speed and time left: summed on the device, read every `every` steps, written and shown.

    The run stops with a reason when the loss is not finite. The task's own loss must always be; the sum with the
    methods' terms must be unless a method sets `nan_ok`.
    """

    def __init__(self, every: int, loggers: Loggers, bar: Any = None) -> None:
        self.every, self.loggers, self.bar = every, loggers, bar
        self.task_bar: Any = None
        self.last = 0
        self.sums: Tensor | None = None
        self.unread: list[Tensor] = []
        self.images = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    slug = "_log"

    def start_phase(self, run: Run) -> None:
        self.flush(run)  # what the phase before left unread
        self.last, self.started = run.step, time.perf_counter()

    def after_step(self, run: Run) -> None:
        task_loss = run.total_loss if run.task_loss is None else run.task_loss
        assert run.total_loss is not None and task_loss is not None
        self.unread += (run.total_loss.detach(), task_loss.detach())
        if len(self.unread) >= UNREAD:
            self._add_up()
        due = run.step - self.last >= self.every or run.step == sum(p.steps for p in run.phases)
        if due or self._checkpoint_due(run):
            self.flush(run)

    def _add_up(self) -> None:
        """Sum on the device what has been kept since the last time; a kernel or two for many steps."""
        if self.unread:
            losses = torch.stack(self.unread).view(-1, 2).sum(0)
            self.sums = losses if self.sums is None else self.sums + losses
            self.unread.clear()

    def _checkpoint_due(self, run: Run) -> bool:
        every = run.trainer.checkpoint_every  # a checkpoint must never hold weights that a NaN has reached
        return bool(every) and run.step % every == 0

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images, self.seconds = state["images"], state["seconds"]

    def flush(self, run: Run) -> None:
        """Read the sums (the one device sync), check them and write a line."""
        steps = run.step - self.last
        self._add_up()
        if not steps or self.sums is None:
            return
        total, task = run.reduce(self.sums / steps, "mean").tolist()
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        first, self.last, self.started, self.sums = self.last + 1, run.step, now, None
        rate = steps * run.trainer.batch_size / seconds
        self.images += steps * run.trainer.batch_size
        self.seconds += seconds
        lr = run.optimizer.param_groups[0]["lr"] if run.optimizer is not None else 0.0
        values = {f"{run.label}/loss": total, f"{run.label}/task_loss": task, "lr": lr, "images_per_second": rate}
        self.loggers.write(run.step, {key: value for key, value in values.items() if math.isfinite(value)})
        may_be_nan = any(m.nan_ok for m in run.methods)
        if not math.isfinite(task) or not (may_be_nan or math.isfinite(total)):
            raise RunFailure(
                f"the loss became {task if not math.isfinite(task) else total} between steps {first} and {run.step} "
                f"({run.label}, learning rate {lr:.3g}); try a lower trainer.lr, trainer.clip=1 or trainer.precision=32"
            )
        if self.bar is not None:
            if self.task_bar is None:
                self.task_bar = self.bar.add_task(run.label, total=sum(p.steps for p in run.phases))
            self.bar.update(self.task_bar, completed=run.step, loss=f"{total:.4f}", rate=f"{rate:.0f}")


class Ema(Method):
    """Exponential moving average of the trained tensors and of floating buffers, in place during evaluation.

    The decay is warmed up as min(decay, (1 + t) / (10 + t)), so that early averages are not the initial weights.
    `finish` leaves the averages in the model for good.
    """

    slug = "_ema"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.tracked: list[Tensor] = []
        self.average: list[Tensor] = []

    @torch.no_grad()
    def start(self, run: Run) -> None:
        """Begin to track what trains; called when the optimizer is made and the model is on its device."""
        self.tracked = [p for p in run.model.parameters() if p.requires_grad]
        self.tracked += [b for b in run.model.buffers() if b.is_floating_point()]
        loaded = self.average
        self.average = [t.detach().clone() for t in self.tracked]
        for mine, saved in zip(self.average, loaded, strict=False):
            mine.copy_(saved)

    @torch.no_grad()
    def after_refit(self, run: Run) -> None:
        """Go on averaging what kept its shape; what has a new one starts from its present values."""
        known = {id(t): a for t, a in zip(self.tracked, self.average, strict=True)}
        self.average = []
        self.start(run)
        for i, tensor in enumerate(self.tracked):
            old = known.get(id(tensor))
            if old is not None and old.shape == tensor.shape:
                self.average[i] = old

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        decay = min(self.decay, (1 + run.step) / (10 + run.step))
        torch._foreach_lerp_(self.average, [t.detach() for t in self.tracked], 1 - decay)

    @torch.no_grad()
    def _swap(self) -> None:
        for tensor, average in zip(self.tracked, self.average, strict=True):
            kept = tensor.detach().clone()
            tensor.copy_(average)
            average.copy_(kept)

    def before_eval(self, run: Run) -> None:
        self._swap()
        for method in run.methods:
            method.constrain(run)

    def after_eval(self, run: Run) -> None:
        self._swap()

    def finish(self, run: Run) -> None:
        self._swap()
        self.tracked, self.average = [], []

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]
        if self.tracked:
            self.average = [a.to(t.device) for a, t in zip(state["average"], self.tracked, strict=True)]


class Hold(Method):
    """Keeps optimizer groups with ``hold_epochs`` as they are for that long, or for ``hold_share`` of a run if less.

    Their gradients are dropped before clipping, so the optimizer passes them over, moments and step count too, as if
    they were frozen; under DDP every gradient is still reduced.
    """

    slug = "_hold"

    def after_backward(self, run: Run) -> None:
        for group in run.optimizer.param_groups:
            share = group.get("hold_share", 1.0) * sum(phase.steps for phase in run.phases)
            if run.step < min(group.get("hold_epochs", 0) * run.steps_per_epoch, share):
                for parameter in group["params"]:
                    parameter.grad = None
