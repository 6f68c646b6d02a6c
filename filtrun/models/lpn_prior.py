"""What a learned proximal network knows: its inverse, the prior it stands for, and inverse problems solved with it.

Fang, Buchanan, Sulam, ICLR 2024 (arXiv 2310.14344), sections 3 and 4; official code ``lpn/utils/prior.py``,
``invert_model``, ``admm.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _flat_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def invert(model: Any, x: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The z with ``model.prox(z) = x``, the minimiser of the convex function ``potential(z) - <x, z>``.

    L-BFGS from z = x over the whole batch (the problem separates). An x outside the network's range has no inverse:
    then z is where the search stopped, which ``model.prox(z) - x`` shows.

    Args:
        model: an `LPN` or `ScalarLPN`; in double precision the result is exact to about `tolerance`.
        x: (N, ...), as the model takes it.
    """
    z = x.detach().clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [z], max_iter=steps, tolerance_grad=tolerance, tolerance_change=1e-14, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        value = (model.potential(z) - _flat_dot(x, z)).sum()
        (z.grad,) = torch.autograd.grad(value, z)
        return value.detach()

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[arg-type]
    return z.detach()


@torch.no_grad()
def prior_value(model: Any, x: Tensor, z: Tensor | None = None, steps: int = 100) -> Tensor:
    """The regulariser the network is the proximal operator of, at x: ``<z, x> - |x|^2 / 2 - potential(z)``, (N,).

    Args:
        z: the inverse of x, if it is known (``x = model.prox(z)``); else found by `invert`.
    """
    if z is None:
        z = invert(model, x, steps)
    return _flat_dot(z, x) - 0.5 * _flat_dot(x, x) - model.potential(z)


@dataclass(frozen=True)
class Solution:
    """Result of `pnp_admm`: the image u, and the norms of x - z after each step, averaged over the batch."""

    image: Tensor
    residuals: list[float]


@torch.no_grad()
def pnp_admm(
    denoise: Callable[[Tensor], Tensor],
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    rho: float = 0.1,
    scale: float = 0.5,
    steps: int = 20,
    inner: int = 30,
    tolerance: float = 1e-5,
    start: Tensor | None = None,
) -> Solution:
    """Solve ``min_u scale * |A u - y|^2 + R(u)`` with a proximal network in place of R's proximal operator.

    Plug-and-play ADMM in the official order: the linear step by conjugate gradients, then the dual variable, then the
    network. The defaults are those of the CelebA deblurring experiments.

    Args:
        denoise: the proximal operator, e.g. ``model`` or ``model.prox``.
        forward, adjoint: A and its adjoint, (N, C, H, W) to measurements (N, ...) and back.
        y: the measurements.
        rho: weight of the coupling.
        steps, inner: iterations, and conjugate-gradient steps in each at most.
        tolerance: relative residual at which conjugate gradients stop.
        start: first guess of u; None: A^T y.
    """
    back = adjoint(y)
    x = back.clone() if start is None else start.clone()
    z, dual, residuals = x.clone(), torch.zeros_like(x), []
    for _ in range(steps):
        x = conjugate_gradients(
            lambda v: 2 * scale * adjoint(forward(v)) + rho * v,
            2 * scale * back + rho * (z - dual),
            x,
            inner,
            tolerance,
        )
        dual = dual + x - z
        z = denoise(x + dual)
        residuals.append((x - z).flatten(1).norm(dim=1).mean().item())
    return Solution(x, residuals)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, start: Tensor, steps: int, tolerance: float
) -> Tensor:
    """Solve ``apply(x) = b`` for a symmetric positive definite operator, separately for each row of the batch."""
    shape = (-1, *[1] * (b.ndim - 1))
    x = start
    r = b - apply(x)
    p, rr, enough = r, _flat_dot(r, r), tolerance**2 * _flat_dot(b, b)
    for _ in range(steps):
        if bool((rr <= enough).all()):
            break
        ap = apply(p)
        alpha = torch.where(rr > enough, rr / _flat_dot(p, ap).clamp(min=1e-30), 0.0)
        x, r = x + alpha.view(shape) * p, r - alpha.view(shape) * ap
        new = _flat_dot(r, r)
        p, rr = r + (new / rr.clamp(min=1e-30)).view(shape) * p, new
    return x
