"""ISS-P: Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution (ICCV 2023, arXiv 2303.09650).

Wang et al.; official code Jiamian-Wang/Iterative-Soft-Shrinkage-SR (``basicsr/pruner/ist_pruner.py``). From random
weights on, every optimizer step is followed by a new ranking of each layer's weights, and the smallest are multiplied
by a factor just below one: what is small fades unless its gradient brings it back. Late in training the selection is
frozen as a mask, and the weights that are left are trained on.

The official length of the first phase follows from a counter that has no effect on the loss (about 100,000 steps of
200,000 to come); here it is a share of the run's steps, or that counter's length with `shrink_steps`.

Alone, on any model, in two lines:

>>> method = ISSP(ratio=0.9).attach(model)  # doctest: +SKIP
>>> optimizer.step(); method.shrink()  # after every step; method.freeze() once, later  # doctest: +SKIP
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.context import mix_seed
from filtrun.cost import layer_macs, sparse_macs
from filtrun.errors import UserError
from filtrun.methods.pruning.base import Pruning, total_steps
from filtrun.methods.pruning.scores import prunable_weights
from filtrun.methods.pruning.soft_shrink import (
    fitting_groups,
    shrink,
    smallest,
    smallest_fast,
    smallest_in_groups,
)
from filtrun.options import opt
from filtrun.trainer import Phase

if TYPE_CHECKING:
    from filtrun.context import Run


@dataclass
class ISSP(Pruning):
    """Unstructured sparsity from scratch by soft shrinkage; alpha=0 is iterative hard thresholding (IHT)."""

    ratio: float = opt(0.9, "share of every layer's weights that shrinks and in the end goes", low=0, high=1,
                       source="README: 0.9, 0.95, 0.99")  # fmt: skip
    alpha: float = opt(0.95, "what the smallest weights are multiplied by after every step", low=0, high=1,
                       source="README commands; options.py: 0.99")  # fmt: skip
    groups: str | None = opt(None, "D:S shrinks D of every S consecutive weights instead; null: ranks a whole layer",
                             source="19:20 for SwinIR")  # fmt: skip
    shrink_share: float = opt(0.33, "share of the steps that shrink; the rest trains what is left", low=0, high=1,
                              source="about 100,000 of 300,000")  # fmt: skip
    shrink_steps: int | None = opt(None, "steps that shrink, in place of shrink_share", low=0)
    shrink_lr: float | None = opt(None, "constant learning rate of the shrinking phase; null: the trainer's", low=0)
    fast: bool = opt(False, "rank large layers by a threshold from 32,400 random weights", source="fast_ist_pruner.py")
    ignore: list[str] = opt([], "layers that stay dense", source="mean and tail for SwinIR")

    paper: ClassVar[str] = "ISS-P: Iterative Soft Shrinkage Learning, ICCV 2023 (arXiv 2303.09650)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.drop: tuple[int, int] | None = None
        if self.groups is not None:
            found = re.fullmatch(r"(\d+):(\d+)", self.groups)
            if found is None or not 0 < int(found[1]) < int(found[2]):
                raise UserError(f"groups={self.groups!r} must read D:S with 0 < D < S, such as 19:20")
            self.drop = int(found[1]), int(found[2])
        self.prunable: dict[str, nn.Parameter] = {}
        self.chosen: dict[str, Tensor] = {}
        self.overlap: list[Tensor] = []
        self.step = 0

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> ISSP:
        """Take every convolution and linear layer of `model`, first and last included, but `ignore`; returns self."""
        self.prunable = prunable_weights(model, self.ignore)
        if self.drop is not None:
            try:
                self.drop = fitting_groups(*self.drop, [p.numel() for p in self.prunable.values()])
            except ValueError as error:
                raise UserError(f"groups={self.groups}: {error}; leave some out with ignore, or set ratio") from error
        return self

    def select(self, name: str, weight: Tensor, seed: int = 0) -> Tensor:
        """Bool mask of the weights of a layer that shrink now."""
        if self.drop is not None:
            return smallest_in_groups(weight, *self.drop)
        if self.fast:
            generator = torch.Generator().manual_seed(mix_seed(seed, self.step, sorted(self.prunable).index(name)))
            return smallest_fast(weight, self.ratio, generator)
        return smallest(weight, self.ratio)

    def shrink(self, seed: int = 0) -> None:
        """Rank every layer anew and shrink its smallest weights: call it after an optimizer step."""
        self.step += 1
        for name, weight in self.prunable.items():
            self.chosen[name] = self.select(name, weight, seed)
            shrink(weight, self.chosen[name], self.alpha)

    def freeze(self) -> None:
        """Make the last selection a mask; from then on call ``masks.apply()`` after every step."""
        for name, weight in self.prunable.items():
            chosen = self.chosen.get(name)
            self.masks.set(name, weight, ~(self.select(name, weight) if chosen is None else chosen))
        self.masks.apply()

    # -- hooks -------------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self.attach(run.model)
        run.claim(self, self.prunable.values(), "entries")

    def phases(self, run: Run) -> list[Phase] | None:
        total = total_steps(run)
        first = min(total, int(self.shrink_share * total) if self.shrink_steps is None else self.shrink_steps)
        return [Phase("shrink", first, self.shrink_lr, schedule="constant"), Phase("masked", total - first)]

    def start_phase(self, run: Run) -> None:
        if run.phase is not None and run.phase.name == "masked":
            self.freeze()
            self.judge(run)

    def after_step(self, run: Run) -> None:
        if run.phase is None or run.phase.name != "shrink":
            super().after_step(run)
            return
        before = self.chosen
        self.chosen = dict(before)
        self.shrink(run.seed)
        if before and self.step % 50 == 0:
            pairs = [(before[name], now) for name, now in self.chosen.items()]
            both, either = (torch.stack([f(a, b).sum() for a, b in pairs]).sum() for f in
                            (torch.logical_and, torch.logical_or))  # fmt: skip
            self.overlap.append(both / either)

    def report(self, run: Run) -> dict[str, float | int | str]:
        with run.plainly():
            layers = layer_macs(run.model, lambda: run.task.probe(run))
        found = {**super().report(run), "sparsity": self.masks.sparsity(),
                 "macs": sparse_macs(layers, self.masks.shares())}  # fmt: skip
        if self.overlap:  # of the selections of two steps in a row: the mask settles
            found |= {"overlap_first": self.overlap[0].item(), "overlap_last": self.overlap[-1].item()}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step = state["step"]
