"""Unlearning without training steps: noise by the Fisher information, and one step along the influence direction.

The mathematics is in `unlearners`; here it meets a run's images and a model in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.context import mix_seed, seed_generators
from filtrun.methods.pruning import unlearners
from filtrun.methods.pruning.unlearn_metrics import batches

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Split

NOISE = 71  # keeps the draws of the noise apart from those of the steps


def _logits(run: Run) -> Callable[[Tensor], Tensor]:
    from filtrun.tasks.classify import Classify

    task = cast(Classify, run.task)
    return lambda x: task.logits(run, x).float()


def _alive(values: Sequence[Tensor], parameters: Sequence[nn.Parameter], dead: Mapping[int, Tensor]) -> list[Tensor]:
    """The values without those of pruned entries, which have no gradient; `dead` holds masks by id of parameter."""
    pairs = zip(values, parameters, strict=True)
    return [v.masked_fill(dead[id(p)], 0) if id(p) in dead else v for v, p in pairs]


@torch.no_grad()
def add_noise(run: Run, retained: Split, alpha: float, classes: Sequence[int], dead: Mapping[int, Tensor]) -> None:
    """Fisher forgetting, in place: noise where retained images do not mind; whole `classes` leave the head."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    images = (x for x, _ in batches(run, retained, 32))
    fisher = _alive(unlearners.fisher_diagonal(_logits(run), parameters, images), parameters, dead)
    head = {id(p) for p in run.task.head(run.model)}
    for i, p in enumerate(parameters):
        last = id(p) in head
        seed_generators(mix_seed(run.seed, NOISE, i), run.device)
        spread = unlearners.fisher_variance(fisher[i], alpha, last, classes).sqrt()
        p.copy_(unlearners.fisher_mean(p, last, classes) + spread * torch.randn_like(p))


@torch.no_grad()
def add_influence(
    run: Run, forgotten: Split, retained: Split, alpha: float, samples: int, exact: bool, dead: Mapping[int, Tensor]
) -> None:
    """Influence unlearning, in place: theta += alpha F^-1 v, F over `samples` single retained images in order."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    logits = _logits(run)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            found = torch.autograd.grad(F.cross_entropy(logits(x), y), parameters)
        return torch.cat([g.flatten() for g in _alive(found, parameters, dead)])

    def mean(part: Split) -> Tensor:
        total = torch.zeros(sum(p.numel() for p in parameters), device=run.device)
        for x, y in batches(run, part, run.trainer.batch_size):
            total += gradient(x, y) * len(y)
        return total / len(part)

    v = unlearners.influence(mean(forgotten), mean(retained), len(forgotten), len(retained))
    singles = (gradient(x, y) for x, y in batches(run, retained, 1))
    if exact:
        step = unlearners.woodbury(v, islice(singles, samples))
    else:
        step = unlearners.woodfisher(v, singles, samples)
    for p, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
        p.add_(alpha * part.view_as(p))
