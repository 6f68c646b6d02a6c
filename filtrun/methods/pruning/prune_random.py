"""Random pruning: the neutral baseline. Weights or filters go by the draw of a seed, then the rest is trained on.

Alone, on any model, in two lines (`images` finds the layers that share channels):

>>> method = PruneRandom(amount=0.5).prune(model, images[:1])  # doctest: +SKIP
>>> loss = criterion(model(images), labels)  # the model is smaller now  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from filtrun.methods.pruning.by_score import ScorePruning
from filtrun.methods.pruning.scores import random_scores


@dataclass
class PruneRandom(ScorePruning):
    """Remove weights or filters at random (baseline; filters with torch-pruning's RandomImportance)."""

    paper: ClassVar[str] = "baseline: random pruning"
    channel_kind: ClassVar[str] = "random"

    def weight_scores(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        return random_scores(weights, seed)
