"""DPM-Solver++ of second order in single steps: two evaluations a step, with fresh noise or without."""

from __future__ import annotations

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.diffusion.stepping import Callback, ancestral_step, checked_grid, fresh_noise


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
    eta: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, Algorithm 1), with ancestral noise as in k-diffusion.

    A first-order step to the geometric mean of sigma and sigma_down, an evaluation there, the whole step with it, then
    noise of sigma_up (`ancestral_step`; eta = 0: none, sigma_down = sigma', second order). The step to sigma = 0 is
    one of Euler's: S steps cost 2S - 1 evaluations when the grid ends in 0, else 2S.

    With predictions whose x0 and eps disagree (CFG++), the state in the middle follows the x0 that eps stands for, and
    the whole step goes to x0 while it leaves what eps stands for: x' = D - e^-h D_eps + e^-h x.
    """
    sigmas, values = checked_grid(sigmas, x)
    begin(denoise, sigmas)
    for i in range(len(sigmas) - 1):
        x = begin_step(denoise, i, x, cond)
        now = denoise(x, sigmas[i], cond)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        down, up = ancestral_step(values[i], values[i + 1], eta)
        if down == 0:
            x = now.x0
        else:
            middle, decay = (sigmas[i] * down).sqrt(), down / values[i]
            half = decay**0.5
            inside = half * x + (1 - half) * now.x0_of_eps(x, sigmas[i])
            then = denoise(inside, middle, cond)
            x = then.x0 + decay * (x - then.x0_of_eps(inside, middle))
        if up > 0:
            x = x + up * fresh_noise(x, generator)
    return x
