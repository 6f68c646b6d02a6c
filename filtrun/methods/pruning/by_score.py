"""Prune what scores lowest, at once or in rounds, then train on: the frame of the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.context import mix_seed
from filtrun.cost import layer_macs, sparse_macs
from filtrun.errors import UserError
from filtrun.methods.pruning.base import Pruning, mean_gradients, total_steps
from filtrun.methods.pruning.forward_inputs import example_inputs
from filtrun.methods.pruning.scores import keep_masks, prunable_weights
from filtrun.methods.pruning.selection import select_counts, select_macs
from filtrun.methods.pruning.slim import Channels
from filtrun.options import opt
from filtrun.trainer import Phase

if TYPE_CHECKING:
    from typing import Self

    from filtrun.context import Run


@dataclass
class ScorePruning(Pruning):
    """Base of methods that rank weights or channels by a score, remove the lowest, and train on.

    A method says how single weights are scored (`weight_scores`), how channels are (`channel_kind`), and over how many
    batches it needs the gradient of the loss (`scoring_batches`).
    """

    amount: float = opt(0.5, "share to remove: of the weights, of the channels, or of the multiply-adds (see measure)",
                        low=0, high=1)  # fmt: skip
    granularity: str = opt("filter", "remove single weights, or whole filters with all that belongs to them",
                           choices=("weight", "filter"))  # fmt: skip
    scope: str = opt("global", "rank all layers together, or prune each by the same share", choices=("global", "local"))
    measure: str = opt("channels", "what amount is a share of, for filters; macs: multiply-adds of the whole model",
                       choices=("channels", "macs"))  # fmt: skip
    slim: bool = opt(True, "take filters out of the model physically; false: only zero them")
    rounds: int = opt(1, "prune in this many equal rounds, training in between", low=1)
    start: float = opt(0.0, "share of the steps before the first round", low=0, high=1)
    end: float = opt(0.5, "share of the steps before the last of several rounds", low=0, high=1)
    most: float = opt(0.9, "largest share of one layer's filters that may go", low=0, high=1)
    ignore: list[str] = opt([], "layers (or parts of the model) that stay as they are")

    channel_kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds > 1 and self.end < self.start:
            raise UserError(f"end={self.end} must not be below start={self.start}: rounds are in between")
        self.level = 0.0
        self.dense = 0.0  # channels or multiply-adds before the first round
        self.sizes: dict[str, int] = {}  # channels of each group then
        self.gone: dict[str, list[int]] = {}  # channels zeroed in each group, when they are not taken out
        self.left: dict[str, int] = {}
        self.macs: float | None = None
        self.prunable: dict[str, nn.Parameter] = {}

    # -- what a method defines ---------------------------------------------------------------------------------------
    def weight_scores(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Scores of every entry of `weights`, higher = keep; gradients, where asked for, lie in the tensors."""
        raise NotImplementedError

    def scoring_batches(self) -> int:
        """Training batches whose mean gradient lies in the tensors when they are scored; 0 for none."""
        return 0

    def note(self, channels: Channels, drop: Sequence[Tensor]) -> None:
        """Keep numbers for the report about the channels that are about to go; nothing by default."""

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def prune(self, model: nn.Module, *inputs: Any, amount: float | None = None, seed: int = 0, **named: Any) -> Self:
        """Prune `model` in place now, to `amount` of what it had before the first call; returns self.

        Args:
            model: any module; the loss's gradients must lie in it for a method that needs them.
            inputs, named: those of one forward pass, to find the coupled layers (filters only).
            amount: other than the option's.
            seed: of random scores.

        With single weights, or ``slim=False``, call ``masks.apply()`` after every optimizer step from then on.
        """
        self.model = model
        level = self.amount if amount is None else amount
        if self.granularity == "weight":
            self.prunable = self.prunable or prunable_weights(model, self.ignore)
            self._cut_weights(level, seed)
        else:
            self._cut_channels(model, inputs, named, level, seed)
        self.level = level
        return self

    def _cut_weights(self, level: float, seed: int) -> None:
        scores = self.weight_scores(self.prunable, seed)
        for mask in self.masks:  # what has gone stays gone
            scores[mask.name] = scores[mask.name].masked_fill(~mask.keep, -math.inf)
        for name, keep in keep_masks(scores, 1 - level, self.scope).items():
            self.masks.set(name, self.prunable[name], keep)
        self.masks.apply()

    def _cut_channels(
        self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], level: float, seed: int
    ) -> None:
        channels = Channels(model, *inputs, kwargs=named, ignore=self.ignore)
        layers = channels.layer_macs()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            scores = channels.importance(self.channel_kind)
        for group, score in zip(channels.groups, scores, strict=True):
            self.sizes.setdefault(group.name, group.size)
            score[self.gone.get(group.name, [])] = -math.inf
        now = sum(layers.values()) if self.measure == "macs" else sum(group.size for group in channels.groups)
        self.dense = self.dense or now
        sizes = [self.sizes[group.name] for group in channels.groups]
        least = [math.ceil((1 - self.most) * n) for n in sizes]
        if self.measure == "macs":
            share = max(0.0, 1 - (1 - level) * self.dense / now)  # of what is there now
            drop = select_macs(channels, scores, share, layers, scope=self.scope, least=least)
        elif self.scope == "local":
            left = [n - int(level * n) for n in sizes]
            counts = [max(0, g.size - n) for g, n in zip(channels.groups, left, strict=True)]
            drop = select_counts(scores, counts, least)
        else:
            drop = select_counts(scores, max(0, int(now - self.dense) + int(level * self.dense)), least)
        self.macs = channels.macs(drop, layers)
        self.left = {g.name: g.size - len(rows) for g, rows in zip(channels.groups, drop, strict=True)}
        self.note(channels, drop)
        with self.naming_others():
            removal = channels.remove(drop)
        if self.slim:
            self.take_out(model, removal)
            return
        self.gone = {g.name: rows.tolist() for g, rows in zip(channels.groups, drop, strict=True)}
        names = {id(p): name for name, p in self.weights.items()}
        for name, (keep, parameter) in removal.keep_masks(model).items():
            self.masks.set(names.get(id(parameter), name), parameter, keep, "filter")
        self.masks.apply()

    # -- hooks -------------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        super().prepare(run)
        if self.granularity == "weight":
            self.prunable = prunable_weights(run.model, self.ignore)
            run.claim(self, self.prunable.values(), "entries")
        else:
            args, kwargs = example_inputs(run)
            self.claim_channels(run, Channels(run.model, *args, kwargs=kwargs, ignore=self.ignore).groups, self.slim)

    def phases(self, run: Run) -> list[Phase] | None:
        total = total_steps(run)
        first, last = int(self.start * total), int(max(self.start, self.end) * total)
        at = [first + (last - first) * i // max(1, self.rounds - 1) for i in range(self.rounds)]
        planned = [Phase("dense", first)] if first else []
        planned += [Phase(f"prune {i + 1}", b - a) for i, (a, b) in enumerate(zip(at, [*at[1:], total], strict=True))]
        return planned

    def start_phase(self, run: Run) -> None:
        assert run.phase is not None
        kind, _, number = run.phase.name.partition(" ")
        if kind != "prune" or not number:
            return
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        if self.granularity == "filter":
            inputs = example_inputs(run)
        batches = self.scoring_batches()
        with mean_gradients(run, batches) if batches else nullcontext():
            level = self.amount * int(number) / self.rounds
            self.prune(run.model, *inputs[0], amount=level, seed=mix_seed(run.seed, int(number)), **inputs[1])
        if self.granularity == "filter" and self.slim:
            runner.refit(run)
        if int(number) == self.rounds:
            self.judge(run)

    def report(self, run: Run) -> dict[str, float | int | str]:
        found = super().report(run)
        if self.granularity == "weight":
            with run.plainly():
                layers = layer_macs(run.model, lambda: run.task.probe(run))
            return {**found, "sparsity": self.masks.sparsity(), "macs": sparse_macs(layers, self.masks.shares())}
        found |= {"channels": sum(self.sizes.values()), "channels_left": sum(self.left.values())}
        return found if self.slim or self.macs is None else {**found, "macs": self.macs}

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("level", "dense", "sizes", "gone", "left", "macs")}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("level", "dense", "sizes", "gone", "left", "macs"):
            setattr(self, name, state[name])
