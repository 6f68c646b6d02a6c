"""The optimizer of FTWT's predictors, which steps beside the model's own: between backward and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from filtrun.context import Run


def loss_scale(run: Run) -> float:
    """What 16-bit training has multiplied the loss by; 1 in other precisions."""
    scaler = getattr(run.fabric._precision, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def step_apart(sgd: torch.optim.SGD, scale: float = 1.0) -> None:
    """Take the step and drop the gradients, so that clipping and the optimizer of the rest find none.

    Args:
        scale: what the loss was multiplied by; where that is not 1, a step with a gradient that is not finite is left
            out, as 16-bit training does.
    """
    parameters = _parameters(sgd)
    found = [p.grad for p in parameters if p.grad is not None]
    if scale != 1.0:
        torch._foreach_mul_(found, 1 / scale)
    if scale == 1.0 or all(g.isfinite().all() for g in found):
        sgd.step()
    for parameter in parameters:
        parameter.grad = None


def momenta_of(sgd: torch.optim.SGD) -> list[Tensor]:
    """The momentum of each parameter, in order; empty before the first step."""
    momenta = [sgd.state[p].get("momentum_buffer") for p in _parameters(sgd)]
    return [m for m in momenta if m is not None]


def load_momenta(sgd: torch.optim.SGD, momenta: Sequence[Tensor]) -> None:
    """Take what `momenta_of` gave."""
    for parameter, momentum in zip(_parameters(sgd), momenta, strict=True):
        sgd.state[parameter]["momentum_buffer"] = momentum.to(parameter.device).clone()


def _parameters(sgd: torch.optim.SGD) -> list[nn.Parameter]:
    return [p for group in sgd.param_groups for p in group["params"]]
