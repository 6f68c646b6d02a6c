"""Network slimming: push all batch norm scales towards zero, remove the channels of the smallest, fine-tune.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017 (arXiv 1708.06519). During
the first part of the training the sub-gradient of s |gamma| is added to the gradient of every scale; then one global
threshold over all scales removes channels, and the slim network is trained on.

Alone, on any model with batch norms, in three lines:

>>> method = Slimming(amount=0.5)
>>> loss.backward(); method.regularise(model); optimizer.step()  # while it trains  # doctest: +SKIP
>>> method.prune(model, images[:1])  # then fine-tune with a new optimizer  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.methods.pruning.bn_penalty import add_penalty, scales_of
from filtrun.methods.pruning.by_score import ScorePruning
from filtrun.methods.pruning.scale_masks import mean_scales
from filtrun.methods.pruning.slim import Channels
from filtrun.options import opt

if TYPE_CHECKING:
    from filtrun.context import Run


@dataclass
class Slimming(ScorePruning):
    """Sparsity training on batch norm scales, a global threshold, removal, fine-tuning.

    Coupled layers (residual sums, depthwise convolutions) are judged by the mean of their scales.
    """

    s: float = opt(1e-4, "weight of the penalty on the scales", low=0, source="paper: 1e-4 (VGG), 1e-5 (ResNet)")
    start: float = opt(0.5, "share of the steps that train with the penalty; the rest is fine-tuning", low=0, high=1)
    granularity: str = opt("filter", "the paper removes whole channels", choices=("filter",))

    paper: ClassVar[str] = "Network Slimming, arXiv 1708.06519 (ICCV 2017)"
    channel_kind: ClassVar[str] = "bn_scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.numbers: dict[str, float] = {}

    def regularise(self, model: nn.Module) -> None:
        """Add the penalty to the gradients of all scales; between backward and the optimizer step."""
        for gamma in scales_of(model).values():
            add_penalty(gamma, self.s)

    def note(self, channels: Channels, drop: Sequence[Tensor]) -> None:
        keeps = [~torch.isin(torch.arange(g.size), gone) for g, gone in zip(channels.groups, drop, strict=True)]
        self.numbers = mean_scales(channels.groups, keeps)

    def prepare(self, run: Run) -> None:
        scales_of(run.model)
        super().prepare(run)

    def after_backward(self, run: Run) -> None:
        if run.phase is not None and run.phase.name == "dense":
            self.regularise(run.model)

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {**super().report(run), **self.numbers}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "numbers": self.numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.numbers = dict(state["numbers"])
