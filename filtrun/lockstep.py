"""Train runs that differ in their seed only at once: their weights stacked, one vectorised step for all of them.

The loop is the ordinary one (`filtrun.runner.fit`), which sees the runs as a single one. A step of a small network
leaves most of a GPU idle and takes as long for ten networks as for one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from filtrun import runner
from filtrun.context import Run
from filtrun.data.split import Batch
from filtrun.errors import RunFailure, UserError
from filtrun.method import Method
from filtrun.speed import PLAIN
from filtrun.stack import Apart, Stack, clip_each, state_of
from filtrun.trainer import MATRIX_RULES, make_optimizer

IN_THE_LOOP = ("own_step", "phases", "start_phase", "loss", "after_backward", "after_step", "after_epoch")
"""Hooks of methods that act while the network trains, on one run at a time."""

CLOSE = 1e-3
"""How far a loss of the vectorised step may be from that of the run alone, relative to 1 + loss."""


def why_apart(runs: Sequence[Run]) -> str:
    """Why runs have to be trained one after the other, as far as that can be known beforehand; empty if it cannot."""
    first = runs[0]
    for method in first.methods:
        for hook in IN_THE_LOOP:
            if getattr(type(method), hook) is not getattr(Method, hook):
                return f"method={method.slug} acts while the network trains ({hook})"
    trainer = first.trainer
    limits = {
        f"task={first.task.kind} draws at random in its loss": first.task.loss_draws,
        f"trainer.accumulate={trainer.accumulate}": trainer.accumulate > 1,
        f"trainer.precision={trainer.precision}": trainer.precision != "32",
        f"trainer.optimizer={trainer.optimizer} is for single matrices": trainer.optimizer in MATRIX_RULES,
        "trainer.compile=true": trainer.compile,
        "trainer.checkpoint_activations=true": trainer.checkpoint_activations,
        f"speed={trainer.speed} takes another way": any(r.speed is not None and r.speed.way != PLAIN for r in runs),
        "the runs have several processes": first.fabric.world_size > 1,
        "nothing trains": first.optimizer is None,
        "they have come to different steps": len({run.step for run in runs}) > 1,
        "layers that train later or shorter": first.optimizer is not None
        and any({"hold_epochs", "lr_share"} & set(group) for group in first.optimizer.param_groups),
    }
    return next((reason for reason, holds in limits.items() if holds), "")


def fit(runs: Sequence[Run]) -> list[Exception | KeyboardInterrupt | None]:
    """Train runs to the end of their phases as `runner.fit` would each; gives what ended each early, or None.

    Args:
        runs: set up (`runner.setup`), of one configuration but for the seed.

    Raises:
        Apart: they cannot be trained at once; they are as they were.
    """
    reason = why_apart(runs)
    if reason:
        raise Apart(reason)
    stack = Stack([run.model for run in runs])
    try:
        together: Any = Together(runs, stack)
        try:
            runner.fit(together)
        except _AllEnded:
            pass
        return together.errors
    finally:
        stack.release([run.optimizer for run in runs])


class _AllEnded(Exception):
    """No run is left to train."""


class _Step(Method):
    """Takes the training step over for all runs."""

    slug = "lockstep"

    def own_step(self, together: Any, batches: Sequence[Batch]) -> Tensor:  # type: ignore[override]
        return together.joint_step(batches)  # type: ignore[no-any-return]


class Together:
    """Several runs as the loop sees one: what it asks for is done for each, and the step for all at once."""

    def __init__(self, runs: Sequence[Run], stack: Stack) -> None:
        first = runs[0]
        self.runs, self.stack = runs, stack
        self.methods = [_Step()]
        self.callbacks = [callback for run in runs for callback in run.callbacks]
        self.trainer, self.phases, self.fabric = first.trainer, first.phases, first.fabric
        self.phase: Any = None
        self.step, self.epoch = first.step, first.epoch
        self.steps_per_epoch = first.steps_per_epoch
        self.augmentation = first.augment  # the loop seeds, as one of the runs may draw
        self.total_loss: Tensor | None = None
        self.errors: list[Any] = [None] * len(runs)
        self.checked = self.mirrored = False
        self.optimizer = make_optimizer(self.trainer, [self._group(g) for g in first.optimizer.param_groups])
        for mine, group in zip(self.optimizer.param_groups, first.optimizer.param_groups, strict=True):
            mine["base_lr"] = group["base_lr"]
        if first.step:
            self._load()

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        names = (self.stack.places[id(p)][0] for p in group["params"])
        return {**group, "params": [self.stack.trained[name] for name in names]}

    def _pairs(self, run: Run) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(a run's parameter, the stacked one, the run's place in it)."""
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                name, place = self.stack.places[id(p)]
                yield p, self.stack.trained[name], place

    def _load(self) -> None:
        """Take the optimizers' state over, of runs that go on from a checkpoint."""
        states = [[state_of(run.optimizer)[p] for p, _, _ in self._pairs(run)] for run in self.runs]
        for (_, stacked, _), each in zip(self._pairs(self.runs[0]), zip(*states, strict=True), strict=True):
            self.optimizer.state[stacked] = {
                key: torch.stack([state[key] for state in each]) if value.ndim else value.clone()
                for key, value in each[0].items()
            }

    def _mirror(self) -> None:
        """Let the runs' own optimizers see their state, for checkpoints."""
        for run in self.runs:
            for p, stacked, place in self._pairs(run):
                state = self.optimizer.state[stacked]
                state_of(run.optimizer)[p] = {k: v[place] if v.ndim else v for k, v in state.items()}

    # -- what the loop asks for ------------------------------------------------------------------------------------
    def batches(self, epoch: int, skip: int) -> Iterator[list[Batch]]:
        """The batches of all runs side by side."""
        for batches in zip(*(run.batches(epoch, skip=skip) for run in self.runs), strict=True):
            yield list(batches)

    def seed_step(self, micro: int = 0) -> None:
        """Each run is seeded before its own draws."""

    def augment(self, batches: list[Batch]) -> list[Batch]:
        """Each run's batch as it would augment it alone."""
        made = []
        for run, batch in zip(self.runs, batches, strict=True):
            run.step, run.epoch = self.step, self.epoch
            run.seed_step()
            made.append(run.augment(batch))
        return made

    def each(self, hook: str, *args: Any) -> None:
        """Call a hook of the callbacks of every run that goes on. Raises _AllEnded when none does."""
        losses = self.total_loss.unbind() if self.total_loss is not None else [None] * len(self.runs)
        if hook == "after_step" and not self.mirrored:
            self._mirror()
            self.mirrored = True
        for i, (run, loss) in enumerate(zip(self.runs, losses, strict=True)):
            if self.errors[i] is not None:
                continue
            run.step, run.epoch, run.phase = self.step, self.epoch, self.phase
            run.total_loss = run.task_loss = loss
            for group, mine in zip(run.optimizer.param_groups, self.optimizer.param_groups, strict=True):
                group["lr"] = mine["lr"]
            try:
                run.each(hook, *args)
            except (RunFailure, UserError, KeyboardInterrupt) as error:
                self.errors[i] = error
        if all(error is not None for error in self.errors):
            raise _AllEnded

    def joint_step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step of every run; returns their losses (S,). Raises Apart before the first, see `check`."""
        if not self.checked:
            self.check(batches)
        losses = self._losses(batches)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        if self.trainer.clip:
            clip_each([p for group in self.optimizer.param_groups for p in group["params"]], self.trainer.clip)
        self.optimizer.step()
        return losses.detach()

    def _losses(self, batches: Sequence[Batch]) -> Tensor:
        view = copy.copy(self.runs[0])

        def loss(network: Callable[..., Any], batch: Batch) -> Tensor:
            view.net = network
            return view.task.loss(view, batch)

        return self.stack.each(loss, batches)

    @torch.no_grad()
    def check(self, batches: Sequence[Batch]) -> None:
        """Raise Apart when the losses are not those of the runs alone, or the network cannot be vectorised."""
        kept = {name: buffer.clone() for name, buffer in self.stack.buffers.items()}

        def restore() -> None:
            for name, buffer in self.stack.buffers.items():
                buffer.copy_(kept[name])

        alone = torch.stack([run.task.loss(run, b) for run, b in zip(self.runs, batches, strict=True)])
        restore()
        try:
            joint = self._losses(batches)
        except (RuntimeError, NotImplementedError) as error:
            raise Apart(f"the network cannot be vectorised: {str(error).splitlines()[0]}") from error
        finally:
            restore()
        if not torch.allclose(alone, joint, rtol=CLOSE, atol=CLOSE, equal_nan=True):
            raise Apart("trained at once their losses are not what they are alone")
        self.checked = True
