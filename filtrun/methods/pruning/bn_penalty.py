"""The penalty on batch norm scales that network slimming and MaskSparsity share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from filtrun.errors import Unfit

NORMS = (nn.modules.batchnorm._BatchNorm,)


def scales_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Batch norm name -> its scale gamma. Raises Unfit when the model has none."""
    found = {name: m.weight for name, m in model.named_modules() if isinstance(m, NORMS) and m.weight is not None}
    if not found:
        raise Unfit("this method judges channels by the scales of batch norms, and this model has no batch norm")
    return found


@torch.no_grad()
def penalty_gradient(gamma: Tensor, s: float, kind: str = "l1", lr: float = 0.0) -> Tensor:
    """What the penalty adds to the gradient of `gamma` (C,).

    ``l1``: s sign(gamma). ``l2``: s gamma. ``smooth_l1``: s gamma where |gamma| < lr s, else s sign(gamma): near zero
    the sign would make the scale jump over it at every step (MaskSparsity's code).
    """
    if kind == "l2":
        return s * gamma
    added = s * gamma.sign()
    return torch.where(gamma.abs() < lr * s, s * gamma, added) if kind == "smooth_l1" else added


@torch.no_grad()
def add_penalty(gamma: nn.Parameter, s: float, doomed: Tensor | None = None, kind: str = "l1", lr: float = 0.0) -> None:
    """Add the penalty's gradient to ``gamma.grad``, of the channels `doomed` (bool (C,)) only if given."""
    if gamma.grad is not None:
        added = penalty_gradient(gamma, s, kind, lr)
        gamma.grad.add_(added if doomed is None else added * doomed)
