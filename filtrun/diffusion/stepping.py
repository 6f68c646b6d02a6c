"""What all samplers share: the callback, the check of the grid, and the order a multistep method may use at a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Prediction
from filtrun.errors import UserError

#: Called once per step, before the update, as callback(step, sigma, x, prediction).
Callback = Callable[[int, Tensor, Tensor, Prediction], None]


def checked_grid(sigmas: Tensor, x: Tensor) -> tuple[Tensor, list[float]]:
    """Levels on x's device and, read once, as numbers (the only wait for the device).

    Raises UserError unless there are two levels or more that fall strictly and end at 0 or above.
    """
    values = sigmas.tolist()
    if len(values) < 2 or any(a <= b for a, b in zip(values, values[1:], strict=False)) or values[-1] < 0:
        raise UserError(f"sigmas must fall strictly and end at 0 or above; got {values[:8]}")
    return sigmas.to(device=x.device, dtype=x.dtype), values


def multistep_order(step: int, steps: int, order: int, lower_order_final: bool) -> int:
    """Order of step number `step` (from 0) of `steps`: as many points as there are, fewer again towards the end.

    With `lower_order_final` the last step is of first order, the one before it of second: a polynomial through few
    distant points would be carried to where the denoiser changes fastest.
    """
    usable = min(order, step + 1)
    return min(usable, steps - step) if lower_order_final else usable


def ancestral_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up) of an ancestral step: the posterior's noise q(x' | x, x0), at most sigma_next."""
    up = min(sigma_next, eta * sigma_next * (max(sigma**2 - sigma_next**2, 0.0)) ** 0.5 / sigma)
    return (sigma_next**2 - up**2) ** 0.5, up


def fresh_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like x; `generator` may live on another device, None is torch's global one."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
