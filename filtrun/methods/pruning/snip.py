"""SNIP: prune once, before training, the connections whose removal would change the loss least.

Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019 (arXiv 1810.02340): the
score of a weight is |dL/dc| for a multiplicative mask c at 1, so |w dL/dw|, divided by its sum over all weights. The
network is then trained from scratch with the mask.

Alone, on any model, in two lines:

>>> criterion(model(images), labels).backward()  # doctest: +SKIP
>>> method = Snip(amount=0.9).prune(model)  # then method.masks.apply() after every step  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from filtrun.methods.pruning.by_score import ScorePruning
from filtrun.methods.pruning.scores import snip
from filtrun.methods.pruning.taylor import gradient
from filtrun.options import opt


@dataclass
class Snip(ScorePruning):
    """Prune single weights at initialisation by connection sensitivity, then train what is left."""

    amount: float = opt(0.9, "share of the weights to remove", low=0, high=1, source="paper, section 5.1: 0.9-0.99")
    granularity: str = opt("weight", "the paper prunes single weights", choices=("weight",))
    batches: int = opt(1, "training batches the sensitivity is measured on", low=1,
                       source="paper, section 5.1: one batch")  # fmt: skip

    paper: ClassVar[str] = "baseline: SNIP, arXiv 1810.02340 (ICLR 2019)"

    def scoring_batches(self) -> int:
        return self.batches

    def weight_scores(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        return snip(weights, {name: gradient(name, weight) for name, weight in weights.items()})
