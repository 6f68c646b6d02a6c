"""RED-diff: A Variational Perspective on Solving Inverse Problems with Diffusion Models.

ICLR 2024, arXiv 2305.04391; official code NVlabs/RED-diff. The image is a variable mu, moved by Adam: each step noises
it to one level, asks the denoiser for the noise, and follows the difference to the noise that was added, beside the
gradient of the misfit to the measurement. The denoiser is only evaluated, never differentiated.

With x = x0 + sigma eps in place of the paper's sqrt(a) x0 + sqrt(1 - a) eps, sigma is the paper's 1 / SNR and nothing
else changes. Both terms are means, the misfit over all that is measured and the regulariser over all pixels of the
batch, as in the official code: lambda means the same for any image size, and not the same for another operator, and
Adam's 1e-8 damps small gradients more the larger the batch. What differs from the official code: mu is returned, and
not the variable of one step before, which its function returns first and its program keeps.

On any denoise callable and operator:

>>> problem = Measurement(y, Mask(keep))                             # doctest: +SKIP
>>> x = red_diff(denoise, like, linear_grid(100), measurement=problem)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.diffusion.noise import DiscreteLevels, NoiseLevels
from filtrun.diffusion.stepping import Callback, checked_grid, fresh_noise
from filtrun.errors import UserError, unknown
from filtrun.inverse.measurement import Measurement
from filtrun.method import Method
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "sqrt": lambda u: u.sqrt(),
    "square": lambda u: u.square(),
    "log": lambda u: (u + 1).log(),
    "trunc_linear": lambda u: u.clamp(max=1),
    "power2over3": lambda u: u ** (2 / 3),
    "const": torch.ones_like,
}
"""Weight of the regulariser by u = 1 / SNR = sigma."""
WEIGHTING_NAMES = ("linear", "sqrt", "square", "log", "trunc_linear", "power2over3", "const")


def regulariser_weight(sigma: Tensor, weighting: str = "linear") -> Tensor:
    """f(1 / SNR) at noise levels `sigma` of any shape (paper, section 4.2). UserError: unknown weighting."""
    if weighting not in WEIGHTINGS:
        raise unknown("weighting", weighting, WEIGHTINGS)
    return WEIGHTINGS[weighting](sigma)


def red_diff_gradient(
    x0: Tensor, eps: Tensor, noise: Tensor, measurement: Measurement, weight: Tensor | float, obs_weight: float = 1.0
) -> Tensor:
    """Gradient in mu of  weight * mean((eps - noise) x0) + obs_weight * mean((H x0 - y)^2) / 2, of x0's shape.

    Args:
        x0: mu, with its own noise where it has any (N, C, H, W).
        eps: the denoiser's noise at x0 + sigma * noise; no gradient goes through it.
    """
    gradient = weight * (eps - noise) / x0.numel()
    if obs_weight:
        misfit = measurement.operator.adjoint(measurement.residual(x0)) / max(1, measurement.count)
        gradient = gradient + obs_weight * misfit
    return gradient


def linear_grid(steps: int, low: float = 0.0, high: float = float("inf")) -> Tensor:
    """The paper's noise levels (steps + 1,) float64, falling to 0: evenly spaced times of the linear schedule of 1000.

    Only times whose level lies in [low, high], what a denoiser knows, are used. UserError: fewer of them than `steps`.
    """
    levels = DiscreteLevels("linear")
    if not 1 <= steps <= levels.steps:
        raise UserError(f"steps={steps} is out of range; the linear schedule has {levels.steps}")
    known = levels.t_to_sigma(torch.arange(levels.steps, dtype=torch.float64))
    known = known[(known >= low * (1 - 1e-6)) & (known <= high * (1 + 1e-6))]
    if len(known) < steps:
        raise UserError(f"only {len(known)} levels of the linear schedule lie in [{low}, {high}]; asked for {steps}")
    return torch.cat([known[torch.arange(steps) * len(known) // steps].flip(0), known.new_zeros(1)])


def red_diff(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    measurement: Measurement,
    lam: float = 0.25,
    weighting: str = "linear",
    obs_weight: float = 1.0,
    sigma_x0: float = 0.0,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    order: str = "descending",
    start: Tensor | None = None,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Solve an inverse problem (paper, Algorithm 1): one evaluation and one step of Adam for each noise level.

    Args:
        x: gives shape, dtype and device of the solution; its values are not used.
        sigmas: (S + 1,), falling; the last one ends the grid and is not visited.
        lam: weight lambda of the regulariser; `weighting` its dependence on the noise level.
        obs_weight: weight of the misfit.
        sigma_x0: standard deviation of the noise mu gets itself in every step.
        order: "descending" noise levels (the method), "ascending" or "random" ones (its ablation).
        start: where mu starts (N, C, H, W); None: H^+ y.

    Returns:
        mu (N, C, H, W) after the last step.
    """
    sigmas, _ = checked_grid(sigmas, x)
    visited = sigmas[:-1]
    if order == "ascending":
        visited = visited.flip(0)
    elif order == "random":
        device = x.device if generator is None else generator.device
        picks = torch.randint(len(visited), (len(visited),), generator=generator, device=device)
        visited = visited[picks.to(x.device)]
    elif order != "descending":
        raise unknown("order", order, ("descending", "ascending", "random"))
    begin(denoise, sigmas)
    mu = (measurement.operator.pinv(measurement.y) if start is None else start).to(x).detach().clone().requires_grad_()
    adam = torch.optim.Adam([mu], lr=lr, betas=betas, weight_decay=0.0)
    with torch.no_grad():
        for i, sigma in enumerate(visited):
            x0 = mu + sigma_x0 * fresh_noise(mu, generator) if sigma_x0 else mu.detach()
            noise = fresh_noise(mu, generator)
            noised = begin_step(denoise, i, x0 + sigma * noise, cond)
            now = denoise(noised, sigma, cond)
            if callback is not None:
                callback(i, sigma, mu.detach(), now)
            weight = lam * regulariser_weight(sigma, weighting)
            mu.grad = red_diff_gradient(x0, now.eps, noise, measurement, weight, obs_weight)
            adam.step()
    return mu.detach()


class RedDiffSolver:
    """`red_diff` with the options of a `REDDiff`, and its grid."""

    def __init__(self, options: REDDiff) -> None:
        self.options = options

    def grid(self, levels: NoiseLevels, steps: int) -> Tensor:
        """The noise levels (steps + 1,) a run visits."""
        spacing = self.options.spacing
        return (
            linear_grid(steps, levels.sigma_min, levels.sigma_max)
            if spacing == "linear"
            else levels.sigmas(steps, spacing)
        )

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        cond: Tensor | None = None,
        *,
        measurement: Measurement,
        callback: Callback | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        o = self.options
        return red_diff(
            denoise, x, sigmas, cond, measurement=measurement, lam=o.lam, weighting=o.weighting,
            obs_weight=o.obs_weight, sigma_x0=o.sigma_x0, lr=o.lr, betas=(o.beta1, o.beta2), order=o.order,
            callback=callback, generator=generator,
        )  # fmt: skip


@dataclass
class REDDiff(Method):
    """Optimise the image itself: misfit to the measurement, and a regulariser from denoising it at every noise level.

    ``task.sample_steps`` is the number of steps, each one network evaluation (paper: 100 to 1000). With ``task.clip``
    null the noise is the network's own (official ``awd: True``); a number recomputes it from the clipped image.
    """

    lam: float = opt(0.25, "weight lambda of the regulariser", low=0, source="official configuration")
    weighting: str = opt("linear", "its dependence on u = 1 / SNR", choices=WEIGHTING_NAMES, 
                         source="paper, section 4.2")  # fmt: skip
    obs_weight: float = opt(1.0, "weight of the misfit to the measurement", low=0, source="official configuration")
    lr: float = opt(0.1, "step size of Adam, for images in [-1, 1]", low=0,
                    source="official configuration (its README: 0.5)")  # fmt: skip
    beta1: float = opt(0.9, "Adam's decay of the mean gradient", low=0, high=0.999999, source="official code")
    beta2: float = opt(0.99, "Adam's decay of the squared gradient", low=0, high=0.999999, source="official code")
    sigma_x0: float = opt(0.0, "noise added to the image in every step", low=0, source="official configuration")
    order: str = opt("descending", "order in which noise levels are visited; random: drawn with replacement",
                     choices=("descending", "ascending", "random"), source="paper, Algorithm 1")  # fmt: skip
    spacing: str = opt("linear", "noise levels: times of the linear schedule of 1000, or a grid of the task's levels",
                       choices=("linear", "karras", "log", "uniform_t"), source="official configuration")  # fmt: skip

    tasks: ClassVar[tuple[str, ...]] = ("inverse",)
    paper: ClassVar[str] = "RED-diff, arXiv 2305.04391 (ICLR 2024)"

    def __post_init__(self) -> None:
        check_options(self, "method.red_diff")

    def sampler(self, run: Run) -> Callable[..., Tensor]:
        return RedDiffSolver(self)

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {"lam": self.lam, "weighting": self.weighting, "lr": self.lr}
