"""Samplers: functions that carry a noisy state down a grid of noise levels through a denoise callable.

All take (denoise, x, sigmas, cond) with x (N, C, H, W) the state at sigmas[0] (`NoiseLevels.start`), sigmas (S + 1,)
falling, its last value possibly 0, and cond (N,) int64 or None. Each step denoises towards the prediction's `x0` and
renoises along its `eps`; the two are interchangeable for a plain denoiser and differ under CFG++-like guidance.
Nothing here waits for the device between steps. Call them under ``torch.no_grad()`` unless gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise, Prediction
from filtrun.errors import UserError, unknown

#: Called once per step, before the update, as callback(step, sigma, x, prediction).
Callback = Callable[[int, Tensor, Tensor, Prediction], None]


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0) = Euler's method in sigma.

    x' = x0 + sigma' * eps: first order, one evaluation per step. `generator` is not used.
    """
    sigmas, _ = _grid(sigmas, x)
    for i in range(len(sigmas) - 1):
        now = denoise(x, sigmas[i], cond)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        x = now.x0 + sigmas[i + 1] * now.eps
    return x


euler = ddim


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, arXiv 2206.00364, Algorithm 1, no churn).

    An Euler step to sigma', a second evaluation there, then the step again with the mean of the two directions. The
    step to sigma = 0 stays an Euler step: S steps cost 2S - 1 evaluations when the grid ends in 0, else 2S.
    With predictions whose x0 and eps disagree, the denoising direction is averaged from x0 and the renoising one from
    eps. `generator` is not used.
    """
    sigmas, values = _grid(sigmas, x)
    for i in range(len(sigmas) - 1):
        sigma, below = sigmas[i], sigmas[i + 1]
        now = denoise(x, sigma, cond)
        if callback is not None:
            callback(i, sigma, x, now)
        euler_x = now.x0 + below * now.eps
        if values[i + 1] == 0:
            return euler_x
        then = denoise(euler_x, below, cond)
        clean = (x - now.x0) / sigma + (euler_x - then.x0) / below
        x = x - sigma * clean / 2 + below * (now.eps + then.eps) / 2
    return x


def ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
    eta: float = 1.0,
) -> Tensor:
    """Euler ancestral sampling: DDIM with eta = 1 (Song et al. 2021, eq. 16), in sigma as k-diffusion writes it.

    Each step goes down to sigma_down and adds fresh noise of sigma_up, with sigma_down^2 + sigma_up^2 = sigma'^2.
    One evaluation per step. `generator` lives on any device; None draws from torch's global one. eta scales sigma_up;
    0 is `ddim`.
    """
    sigmas, values = _grid(sigmas, x)
    for i in range(len(sigmas) - 1):
        now = denoise(x, sigmas[i], cond)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        down, up = ancestral_step(values[i], values[i + 1], eta)
        x = now.x0 + down * now.eps
        if up > 0:
            x = x + up * _noise(x, generator)
    return x


def ancestral_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up) of an ancestral step: the posterior's noise q(x' | x, x0), at most sigma_next."""
    up = min(sigma_next, eta * sigma_next * (max(sigma**2 - sigma_next**2, 0.0)) ** 0.5 / sigma)
    return (sigma_next**2 - up**2) ** 0.5, up


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddim": ddim, "euler": euler, "heun": heun, "ancestral": ancestral}


def sampler(name: str) -> Callable[..., Tensor]:
    """The sampler called `name`; UserError names the closest one otherwise."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _grid(sigmas: Tensor, x: Tensor) -> tuple[Tensor, list[float]]:
    """Levels on x's device and, read once, as numbers (the only wait for the device)."""
    values = sigmas.tolist()
    if len(values) < 2 or any(a <= b for a, b in zip(values, values[1:], strict=False)) or values[-1] < 0:
        raise UserError(f"sigmas must fall strictly and end at 0 or above; got {values[:8]}")
    return sigmas.to(device=x.device, dtype=x.dtype), values
