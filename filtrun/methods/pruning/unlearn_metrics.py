"""How well a classifier has forgotten: accuracies and membership attacks on forgotten, retained and test images.

The measures of "Model Sparsity Can Simplify Machine Unlearning" (arXiv 2304.04934); images are not augmented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from filtrun.methods.pruning import mia
from filtrun.task import normalizer

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Split


def measures(
    run: Run,
    model: Callable[[Tensor], Tensor],
    forgotten: Split,
    retained: Split,
    test: Split,
    attack: str = "confidence",
    official: bool = False,
) -> dict[str, float]:
    """Five numbers in [0, 1]; every process measures all images.

    ``ua`` is 1 - accuracy on the forgotten images, ``ra`` and ``ta`` are the accuracy on retained and test images,
    ``mia`` the share of forgotten images the attack takes for unseen ones, ``mia_privacy`` its accuracy on retained
    against test images.

    Args:
        model: normalised images (N, C, H, W) -> logits (N, K); in evaluation mode.
        attack, official: see `mia.feature`.
    """
    found = [predict(run, model, part) for part in (forgotten, retained, test)]
    accuracy = [float((p.argmax(1) == y).float().mean()) for p, y in found]
    gone, kept, unseen = (mia.feature(p, y, attack, official) for p, y in found)
    return {
        "ua": 1 - accuracy[0], "ra": accuracy[1], "ta": accuracy[2],
        "mia": mia.efficacy(kept, unseen, gone), "mia_privacy": mia.privacy(kept, unseen),
    }  # fmt: skip


def gaps(mine: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """``unlearn/gap_NAME``, the distance of every number to the retrained network's, and their mean ``unlearn/gap``."""
    found = {f"unlearn/gap_{name}": abs(value - reference[name]) for name, value in mine.items()}
    return {**found, "unlearn/gap": sum(found.values()) / len(found)}


def batches(run: Run, split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (N, C, H, W) in [0, 1] and labels (N,) of a split in its order, not augmented, on the run's device."""
    rows = torch.arange(len(split))
    for part in rows.split(size):
        batch = split.batch(part).to(run.device)
        yield batch.x, batch.y


@torch.no_grad()
def predict(run: Run, model: Callable[[Tensor], Tensor], split: Split) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, K) and labels (N,) of a split, on the CPU; the model is in evaluation mode."""
    mean, std = normalizer(run)
    found = [(model((x - mean) / std).float().softmax(-1).cpu(), y.cpu()) for x, y in batches(run, split, 250)]
    return torch.cat([p for p, _ in found]), torch.cat([y for _, y in found])
