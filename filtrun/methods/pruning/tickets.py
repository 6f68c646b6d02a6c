"""Sparse networks of trained weights: masks over convolutions (one-shot, iterative, SynFlow), training inside a mask.

What "Model Sparsity Can Simplify Machine Unlearning" prunes with before it unlearns (arXiv 2304.04934; official code
OPTML-Group/Unlearn-Sparse, pruner/ and main_imp.py): all Conv2d weights are ranked together, linear layers, biases and
norms stay whole, and the net is then trained with its mask from early weights on (Frankle et al., ICML 2020).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.methods.pruning.base import Pruning, total_steps
from filtrun.options import opt
from filtrun.trainer import Phase, lr_factor

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Split


def conv_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of every Conv2d of `model`, in definition order."""
    return {
        f"{name}.weight".lstrip("."): cast(nn.Parameter, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def prune_more(
    scores: Mapping[str, Tensor], amount: float | int, keep: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Masks (bool) without the smallest of all scores that are still alive.

    Args:
        scores: name -> score of every entry, higher = keep.
        amount: the share of the living entries that goes, round(share x alive); a whole number is a count.
        keep: the masks so far; None: everything lives.
    """
    before = {n: torch.ones_like(s, dtype=torch.bool) if keep is None else keep[n].clone() for n, s in scores.items()}
    alive = torch.cat([before[n].flatten() for n in scores]).nonzero().flatten()
    count = amount if isinstance(amount, int) else round(amount * len(alive))
    values = torch.cat([s.flatten() for s in scores.values()])[alive]
    flat = torch.cat([before[n].flatten() for n in scores])
    flat[alive[values.topk(count, largest=False).indices]] = False
    parts = flat.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def imp_shares(rate: float, step: float) -> list[float]:
    """Shares of the living weights that go in each round, `step` a round, until the share `rate` of all is gone."""
    rounds = max(1, math.ceil(math.log(1 - rate) / math.log(1 - step) - 1e-9)) if rate > 0 else 0
    last = 1 - (1 - rate) / (1 - step) ** (rounds - 1)
    return [step] * (rounds - 1) + [last] if rounds else []


def synflow_scores(model: nn.Module, shape: tuple[int, ...], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w dR/dw| of every Conv2d weight inside its mask, R the sum of outputs for ones through |weights|.

    Tanaka et al., NeurIPS 2020 (arXiv 2006.05467); batch norm in evaluation mode; in float64, as products of many
    layers overflow.

    Args:
        model: not changed.
        shape: (C, H, W) of one input.
        keep: masks of the Conv2d weights.
    """
    linear = copy.deepcopy(model).double().eval()
    weights = conv_weights(linear)
    with torch.no_grad():
        for tensor in [*linear.parameters(), *linear.buffers()]:
            tensor.abs_()
        for name, weight in weights.items():
            weight.masked_fill_(~keep[name], 0)
    ones = torch.ones(1, *shape, dtype=torch.float64, device=next(linear.parameters()).device)
    with torch.enable_grad():
        gradients = torch.autograd.grad(linear(ones).sum(), list(weights.values()))
    return {
        name: (weight.detach() * gradient).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def synflow_masks(
    model: nn.Module, shape: tuple[int, ...], rate: float, rounds: int = 100, official: bool = False
) -> dict[str, Tensor]:
    """Masks of the Conv2d weights of an untrained model: `rounds` times the same share of what still lives.

    The count left is rounded once; the `official` code rounds what goes in every round, which adds up in small nets.
    """
    keep = {name: torch.ones_like(w, dtype=torch.bool) for name, w in conv_weights(model).items()}
    total = sum(k.numel() for k in keep.values())
    for i in range(1, rounds + 1):
        alive = sum(int(k.sum()) for k in keep.values())
        count = alive - round(total * (1 - rate) ** (i / rounds))
        if official:
            count = round((1 - (1 - rate) ** (1 / rounds)) * alive)
        keep = prune_more(synflow_scores(model, shape, keep), count, keep)
    return keep


@dataclass
class MaskedTraining(Pruning):
    """Plain training inside a given mask, on a given part of the images, after `rewind` steps without the mask.

    The mask then acts on the weights of that step, with a new optimizer and the learning rates that would come next
    anyway: weights and schedule are rewound (Renda et al., ICLR 2020, arXiv 2003.02389).
    """

    rewind: int = opt(0, "steps of dense training before the mask comes in", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep: Mapping[str, Tensor] = {}
        self.part: Split | None = None

    def within(self, keep: Mapping[str, Tensor], part: Split | None = None) -> MaskedTraining:
        """Set the masks by name of weight, and the images to train on (None: the run's own); returns self."""
        self.keep, self.part = keep, part
        return self

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        if self.part is not None:
            run.train_split = self.part

    def phases(self, run: Run) -> list[Phase] | None:
        total = total_steps(run)
        early = min(self.rewind, total)
        return [Phase(f"{run.label}: early", early), Phase(run.label, total - early)]

    def start_phase(self, run: Run) -> None:
        if run.phase is run.phases[1]:
            for name, mask in self.keep.items():
                self.masks.set(name, self.weights[name], mask)
            self.masks.apply()
            if self.rewind:
                runner.refit(run)

    def after_backward(self, run: Run) -> None:
        self.masks.apply_to_gradients()
        factor = lr_factor(run.trainer, run.step, sum(phase.steps for phase in run.phases))
        for group in run.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
