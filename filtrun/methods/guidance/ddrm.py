"""Denoising diffusion restoration models (Kawar et al., NeurIPS 2022, arXiv 2201.11793): a baseline without gradients.

Sampling in the basis of the operator's right singular vectors: coordinates that are measured better than the noise
level of the step are set to the measurement, others are denoised. One evaluation a step, no gradient.

>>> x = ddrm(denoise, start, sigmas, measurement=Measurement(y, operator, noise=0.1))  # doctest: +SKIP
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
from filtrun.diffusion.stepping import Callback, checked_grid, fresh_noise
from filtrun.inverse.measurement import Measurement
from filtrun.method import Method
from filtrun.options import check_options, opt
from filtrun.precision import full_precision

if TYPE_CHECKING:
    from filtrun.context import Run


@full_precision
def ddrm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    measurement: Measurement,
    eta: float = 0.85,
    eta_b: float = 1.0,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample from x (N, C, H, W), plain noise at sigmas[0], under a measurement (paper, eq. 7 and 8).

    The coordinates of a step to sigma', with singular value s, measured value u = U^T y and noise sigma_y of y:
    s sigma' > sigma_y: (1 - eta_b) x0 + eta_b u / s + sqrt(sigma'^2 - (eta_b sigma_y / s)^2) noise;
    0 < s sigma' < sigma_y: x0 + sqrt(1 - eta^2) sigma' (u - s x0) / sigma_y + eta sigma' noise;
    not measured: x0 + sqrt(1 - eta^2) sigma' eps + eta sigma' noise. The last step, to 0, ends at x0 (for y with noise
    too, as in the official code).
    """
    sigmas, values = checked_grid(sigmas, x)
    operator, sigma_y = measurement.operator, measurement.noise
    s = operator.spectrum(x).expand_as(x)
    seen = s > 0
    divisor = s.where(seen, 1)
    known = operator.measured(measurement.y) / divisor  # u / s
    error = (sigma_y / divisor).square()
    begin(denoise, sigmas)

    def fresh() -> Tensor:
        return operator.basis(fresh_noise(x, generator))

    better = s * values[0] > sigma_y
    spread = (values[0] ** 2 - error).clamp(min=0).sqrt()
    start = operator.basis(x)
    x = operator.image(torch.where(better, known + spread * start / values[0], start))
    for i in range(len(sigmas) - 1):
        x = begin_step(denoise, i, x, cond)
        now = denoise(x, sigmas[i], cond)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        below = values[i + 1]
        clean, noise = operator.basis(now.x0), fresh()
        kept, added = (1 - eta**2) ** 0.5 * below, eta * below
        z = clean + kept * operator.basis(now.eps) + added * noise
        if sigma_y:
            worse = clean + kept * s * (known - clean) / sigma_y + added * noise
            z = torch.where(seen & (s * below < sigma_y), worse, z)
        spread = (below**2 - eta_b**2 * error).clamp(min=0).sqrt()
        z = torch.where(s * below > sigma_y, (1 - eta_b) * clean + eta_b * known + spread * noise, z)
        x = operator.image(z)
    return x


@dataclass
class DDRM(Method):
    """Sampling in the operator's singular basis, measured coordinates replaced (baseline for inverse problems).

    Uses the noise of the measurement, which it is told. ``task.clip`` bounds the denoised images.
    """

    eta: float = opt(0.85, "share of fresh noise where nothing is measured, or worse than the step's noise", low=0,
                     high=1, source="paper, section 5")  # fmt: skip
    eta_b: float = opt(1.0, "weight of the measurement where it is better than the step's noise", low=0, high=1,
                       source="paper, section 5")  # fmt: skip

    tasks: ClassVar[tuple[str, ...]] = ("inverse",)
    paper: ClassVar[str] = "Denoising Diffusion Restoration Models, arXiv 2201.11793 (NeurIPS 2022, baseline)"

    def __post_init__(self) -> None:
        check_options(self, "method.ddrm")

    def sampler(self, run: Run) -> Callable[..., Tensor]:
        return partial(ddrm, eta=self.eta, eta_b=self.eta_b)

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {"eta": self.eta, "eta_b": self.eta_b}
