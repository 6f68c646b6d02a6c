"""Samplers: functions that carry a noisy state down a grid of noise levels through a denoise callable.

All take (denoise, x, sigmas, cond) with x (N, C, H, W) the state at sigmas[0] (`NoiseLevels.start`), sigmas (S + 1,)
falling, its last value possibly 0, and cond (N,) int64 or None. Each step denoises towards the prediction's `x0` and
renoises along its `eps`; the two are interchangeable for a plain denoiser and differ under CFG++-like guidance.
Nothing here waits for the device between steps. Call them under ``torch.no_grad()`` unless gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.diffusion.multistep import dpmpp, unipc
from filtrun.diffusion.second_order_ancestral import dpmpp_2s_ancestral
from filtrun.diffusion.stepping import Callback, ancestral_step, checked_grid, fresh_noise
from filtrun.errors import unknown


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
    sigmas, _ = checked_grid(sigmas, x)
    begin(denoise, sigmas)
    for i in range(len(sigmas) - 1):
        x = begin_step(denoise, i, x, cond)
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
    sigmas, values = checked_grid(sigmas, x)
    begin(denoise, sigmas)
    for i in range(len(sigmas) - 1):
        x = begin_step(denoise, i, x, cond)
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
    sigmas, values = checked_grid(sigmas, x)
    begin(denoise, sigmas)
    for i in range(len(sigmas) - 1):
        x = begin_step(denoise, i, x, cond)
        now = denoise(x, sigmas[i], cond)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        down, up = ancestral_step(values[i], values[i + 1], eta)
        x = now.x0 + down * now.eps
        if up > 0:
            x = x + up * fresh_noise(x, generator)
    return x


SAMPLER_NAMES = (
    "ddim", "euler", "heun", "ancestral", "dpmpp_1m", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_2s_ancestral",
    "unipc", "unipc_1", "unipc_2", "unipc_3", "unipc_bh1", "unipc_bh1_1", "unipc_bh1_2", "unipc_bh1_3",
)  # fmt: skip
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "ancestral": ancestral,
    **{f"dpmpp_{order}m": partial(dpmpp, order=order) for order in (1, 2, 3)},
    "dpmpp_2s": partial(dpmpp_2s_ancestral, eta=0.0),
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "unipc": unipc,
    **{f"unipc_{order}": partial(unipc, order=order) for order in (1, 2, 3)},
    "unipc_bh1": partial(unipc, variant="bh1"),
    **{f"unipc_bh1_{order}": partial(unipc, order=order, variant="bh1") for order in (1, 2, 3)},
}


def sampler(name: str) -> Callable[..., Tensor]:
    """The sampler called `name`; UserError names the closest one otherwise."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]
