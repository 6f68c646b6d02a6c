"""Magnitude pruning: the smallest weights, or the filters of the smallest norm, go; the rest is trained on.

Single weights: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (arXiv
1506.02626). Filters: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (arXiv 1608.08710); here the norm
is over all layers that share the channels, as torch-pruning takes it (DepGraph, CVPR 2023, arXiv 2301.12900).

Alone, on any model, in two lines:

>>> method = Magnitude(amount=0.9, granularity="weight").prune(model)  # doctest: +SKIP
>>> optimizer.step(); method.masks.apply()  # after every step, so that zeros stay zero  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from filtrun.methods.pruning.by_score import ScorePruning
from filtrun.methods.pruning.scores import magnitude
from filtrun.options import opt


@dataclass
class Magnitude(ScorePruning):
    """Remove what is smallest. For single weights both norms rank alike; for filters they do not."""

    norm: str = opt("l2", "norm of a filter", choices=("l1", "l2"), source="torch-pruning; l1: Li et al. 2017")

    paper: ClassVar[str] = "baseline: magnitude pruning, arXiv 1506.02626 (2015), 1608.08710 (2017)"

    @property
    def channel_kind(self) -> str:  # type: ignore[override]
        return self.norm

    def weight_scores(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        return {name: magnitude(weight, 1 if self.norm == "l1" else 2) for name, weight in weights.items()}
