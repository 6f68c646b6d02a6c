"""Diffusion posterior sampling (Chung et al., ICLR 2023, arXiv 2209.14687): the baseline that differentiates the net.

Ancestral sampling, with one gradient step in every step: down the misfit of the denoised image to the measurement, by
its gradient in the noisy image, through the network. One evaluation and one backward pass a step.

>>> x = dps(denoise, start, sigmas, measurement=Measurement(y, operator))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.diffusion.stepping import Callback, ancestral_step, checked_grid, fresh_noise
from filtrun.inverse.measurement import Measurement
from filtrun.method import Method
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run


def dps(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    measurement: Measurement,
    scale: float = 1.0,
    normalise: bool = True,
    eta: float = 1.0,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample from x (N, C, H, W) at sigmas[0] under a measurement (paper, Algorithm 1).

    In x = x0 + sigma eps a step is  x' = x0 + sigma_down eps + sigma_up noise - step * grad_x |H x0(x) - y|^2  with
    step = scale sqrt(1 + sigma^2) sqrt(1 + sigma'^2) / |H x0 - y|, the roots from the paper's variables (its state is
    x / sqrt(1 + sigma^2)). Without `normalise`: step = scale, the other rule of the RED-diff authors' code (its
    coefficient sqrt(a_s a_t) in these variables). eta = 0 is deterministic.
    """
    sigmas, values = checked_grid(sigmas, x)
    begin(denoise, sigmas)
    for i in range(len(sigmas) - 1):
        x = begin_step(denoise, i, x, cond)
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            now = denoise(state, sigmas[i], cond)
            misfit = measurement.residual(now.x0).flatten(1).square().sum(1)
            (gradient,) = torch.autograd.grad(misfit.sum(), state)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        step = torch.full_like(misfit, scale)
        if normalise:
            turn = ((1 + values[i] ** 2) * (1 + values[i + 1] ** 2)) ** 0.5
            # an exact fit has no gradient either
            step = step * turn / misfit.detach().sqrt().clamp(min=torch.finfo(misfit.dtype).tiny ** 0.5)
        down, up = ancestral_step(values[i], values[i + 1], eta)
        x = (now.x0 + down * now.eps).detach()
        if up > 0:
            x = x + up * fresh_noise(x, generator)
        x = x - step.detach().view(-1, 1, 1, 1) * gradient
    return x


@dataclass
class DPS(Method):
    """Posterior sampling by the gradient of the misfit through the network (baseline for inverse problems)."""

    scale: float = opt(1.0, "step size zeta'", low=0, source="paper, appendix D; 0.1 for inpainting in RED-diff's code")
    normalise: bool = opt(True, "divide the step by the misfit's norm", source="paper, eq. 16 and Algorithm 1")
    eta: float = opt(1.0, "share of the ancestral noise; 0: deterministic", low=0, high=1, source="paper, Algorithm 1")

    tasks: ClassVar[tuple[str, ...]] = ("inverse",)
    paper: ClassVar[str] = "Diffusion Posterior Sampling, arXiv 2209.14687 (ICLR 2023, baseline)"

    def __post_init__(self) -> None:
        check_options(self, "method.dps")

    def sampler(self, run: Run) -> Callable[..., Tensor]:
        return partial(dps, scale=self.scale, normalise=self.normalise, eta=self.eta)

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {"scale": self.scale, "eta": self.eta}
