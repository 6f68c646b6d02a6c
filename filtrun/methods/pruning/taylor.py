"""Taylor pruning: what changes the loss least, to first order, when it goes.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019 (arXiv 1906.10771): |w dL/dw|, from one
pass over some training batches; for filters summed over the filter (torch-pruning's GroupTaylorImportance).

Alone, on any model, in two lines:

>>> criterion(model(images), labels).backward()  # doctest: +SKIP
>>> method = Taylor(amount=0.5).prune(model, images[:1])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from filtrun.errors import UserError
from filtrun.methods.pruning.by_score import ScorePruning
from filtrun.methods.pruning.scores import taylor
from filtrun.options import opt


@dataclass
class Taylor(ScorePruning):
    """Remove the weights or filters whose removal changes the loss least, judged by one gradient."""

    batches: int = opt(10, "training batches the gradient is averaged over", low=1)

    paper: ClassVar[str] = "baseline: Taylor pruning, arXiv 1906.10771 (CVPR 2019)"
    channel_kind: ClassVar[str] = "taylor"

    def scoring_batches(self) -> int:
        return self.batches

    def weight_scores(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        return {name: taylor(weight, gradient(name, weight)) for name, weight in weights.items()}


def gradient(name: str, weight: Tensor) -> Tensor:
    """The gradient that lies in a tensor. Raises UserError when there is none."""
    if weight.grad is None:
        raise UserError(f"{name} has no gradient: call backward() on the loss before pruning, or name it in ignore")
    return weight.grad
