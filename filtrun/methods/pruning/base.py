"""What all pruning methods share: masks kept in force, channels removed for good, both stored and brought back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from filtrun import runner
from filtrun.context import mix_seed, seed_generators
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.methods.pruning.masks import MaskSet
from filtrun.methods.pruning.removal import Removal, tensors_of

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.methods.pruning.channel_groups import Group


@dataclass
class Pruning(Method):
    """Base of pruning methods: `masks` act after every step, after loading and before evaluation.

    A method sets masks with ``self.masks.set(name, parameter, keep, granularity)`` whenever it decides them, and takes
    channels out with ``self.remove(run, removal)``; storing, resuming and reloading then need no further code. Names
    are those of ``run.weights``.

    Attributes:
        masks: what is zeroed now.
        removals: what has been taken out physically, in order.
    """

    trains: ClassVar = "all"

    def __post_init__(self) -> None:
        self.masks = MaskSet()
        self.removals: list[Removal] = []
        self.measured: dict[str, float] = {}
        self.model: nn.Module | None = None
        self.weights: dict[str, nn.Parameter] = {}
        self.beside: list[str] = []

    # -- for the methods ---------------------------------------------------------------------------------------------
    def remove(self, run: Run, removal: Removal) -> None:
        """Take channels out of the run's model now and go on with a new optimizer (from `start_phase` only)."""
        if not removal.empty:
            self.take_out(run.model, removal)
            runner.refit(run)

    def take_out(self, model: nn.Module, removal: Removal) -> None:
        """Take channels out of `model` and note them; `remove` without the new optimizer."""
        removal.apply(model)
        self.removals.append(removal)

    @contextmanager
    def naming_others(self) -> Iterator[None]:
        """Where a model does not run without some channels, say which methods changed its layers, if any did."""
        try:
            yield
        except UserError as error:
            if not self.beside or "does not run without" not in str(error):
                raise
            others = " and ".join(f"method={slug}" for slug in self.beside)
            raise UserError(
                f"method={self.slug} cannot take channels out of the layers as {others} changed them; method=lora goes "
                f"with the removal of channels\n{error}"
            ) from error

    def claim_channels(self, run: Run, groups: Iterable[Group], slim: bool = True) -> None:
        """Say that this method decides which channels of these groups stay (before the model is edited).

        `slim`: whether the others are taken out; else they become zero and nobody may add to them.
        """
        layers = {part.layer for group in groups for part in group.parts}
        run.claim(self, [p for name in layers for p in run.model.get_submodule(name).parameters(recurse=False)],
                  "mask" if slim else "entries")  # fmt: skip

    def judge(self, run: Run) -> None:
        """Note what the model is worth right after pruning, where that is quick: metrics ``pruned/NAME``."""
        if run.trainer.evaluate and run.task.kind == "classify":
            with run.plainly():
                self.measured = {f"pruned/{name}": value for name, value in run.task.evaluate(run).items()}

    # -- hooks -------------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        self.model, self.weights = run.model, run.weights
        self.beside = [m.slug for m in run.methods if m is not self and m.trains == "part"]

    def after_step(self, run: Run) -> None:
        self.masks.apply()

    def before_eval(self, run: Run) -> None:
        self.masks.apply()

    def constrain(self, run: Run) -> None:
        self.masks.apply()

    def finish(self, run: Run) -> None:
        self.masks.apply()

    def report(self, run: Run) -> dict[str, float | int | str]:
        run.measured |= self.measured
        return {"slim_gap": max(removal.gap for removal in self.removals)} if self.removals else {}

    def verify(self, run: Run) -> None:
        """Raise ValueError unless masked entries are zero and layers have the channels the removals leave."""
        for mask in self.masks:
            if mask.parameter.detach()[~mask.keep.expand_as(mask.parameter)].any():
                raise ValueError(f"{mask.name} has entries that are masked and not zero")
        sizes: dict[tuple[str, int], int] = {}
        for removal in self.removals:
            sizes |= {(name, dim): int(keep.sum()) for name, dims in removal.keep.items() for dim, keep in dims.items()}
        for (name, dim), left in sizes.items():
            shape = tuple(tensors_of(run.model)[name].shape)
            if shape[dim] != left:
                raise ValueError(f"{name} has shape {shape}, but {left} channels were left in dimension {dim}")

    def state_dict(self) -> dict[str, Any]:
        removals = [removal.to_json() for removal in self.removals]
        return {"masks": self.masks.state_dict(), "removals": removals, "measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.model is not None
        self.measured = dict(state.get("measured", {}))
        for node in state.get("removals", [])[len(self.removals) :]:
            removal = Removal.from_json(node)
            removal.apply(self.model)
            self.removals.append(removal)
        self.masks.load_state_dict(state.get("masks", {}), {**dict(self.model.named_parameters()), **self.weights})


def total_steps(run: Run) -> int:
    """Optimizer steps of the whole run, by its trainer: what a method that plans phases shares out."""
    return run.trainer.total_steps(len(run.train_split) if run.train_split is not None else 0)


SCORING_EPOCH = 1_000_000
"""Batches for scores are those of an epoch that no training reaches: the same ones for every method and step."""


@contextmanager
def mean_gradients(run: Run, batches: int) -> Iterator[None]:
    """Inside, every parameter's ``.grad`` holds the gradient of the task loss, averaged over `batches` batches.

    Frozen parameters included. Batch norm sees the batches as in training; its running statistics do not move. The
    mean is over all processes too. Random draws of the loss follow from the run's seed.
    """
    net, training = run.net, run.model.training
    flags = [p.requires_grad for p in run.model.parameters()]
    buffers = [b.detach().clone() for b in run.model.buffers()]
    run.net = run.model.train()
    run.model.zero_grad(set_to_none=True)
    try:
        for parameter in run.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for i in range(batches):
            epoch, position = divmod(i, run.steps_per_epoch)
            batch = next(iter(run.batches(SCORING_EPOCH + epoch, skip=position)))
            seed_generators(mix_seed(run.seed, SCORING_EPOCH, i, run.fabric.global_rank), run.device)
            with run.fabric.autocast():
                loss = run.task.loss(run, batch)
            (loss / batches).backward()
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad = run.reduce(parameter.grad, "mean")
        yield
    finally:
        run.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, kept in zip(run.model.buffers(), buffers, strict=True):
                if buffer.shape == kept.shape:  # channels may have been removed inside
                    buffer.copy_(kept)
        for parameter, flag in zip(run.model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        run.net = net
        run.model.train(training)
