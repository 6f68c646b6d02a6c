"""Empirical model statistics of DPM-Solver-v3 (Zheng et al., NeurIPS 2023, arXiv 2310.13268, section 3.1 and C.1).

With f(lam) = sigma * eps - l x, lam = -ln sigma, the probability-flow ODE is rewritten so that what a solver has to
guess, the part of df/dlam that s f + b does not explain, varies least over the data:

    l = E[diag(sigma d eps / dx)],   s = Cov(f, df/dlam) / Var(f),   b = E[df/dlam] - s E[f]

for each pixel and noise level, over noisy training images. The official code that computes them was never published.
In variables x = x0 + sigma * eps everything follows from the denoiser D alone: with a = sigma * eps = x - D and D' the
derivative of D along the ODE (direction -a in x, -sigma in sigma),

    l = 1 - E[diag(dD / dx)],   f = a - l x,   df/dlam = (l - 1) a - D' - (dl/dlam) x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.errors import UserError, unknown

DERIVATIVES = ("forward", "difference")


@dataclass(frozen=True)
class ModelStatistics:
    """Coefficients on a grid of noise levels.

    sigmas: (N + 1,) float64, falling, uniform in ln sigma. l, s, b: (N + 1, C, H, W) float64 (any shape after the
    first axis that broadcasts with a state).
    """

    sigmas: Tensor
    l: Tensor  # noqa: E741 (the paper's letter)
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if len(self.sigmas) < 3 or not len(self.sigmas) == len(self.l) == len(self.s) == len(self.b):
            raise UserError("model statistics need l, s and b at each of three noise levels or more")
        gaps = self.sigmas.double().log().diff()
        if (gaps >= 0).any() or (gaps - gaps.mean()).abs().max() > 1e-3 * gaps.mean().abs():
            raise UserError("the noise levels of model statistics must fall and be uniform in ln sigma")

    @classmethod
    def degenerate(cls, sigmas: Tensor, shape: tuple[int, ...]) -> ModelStatistics:
        """l = 1, s = b = 0 (appendix A.2): the solver then expands D itself, as DPM-Solver++ does."""
        one = torch.ones(len(sigmas), *shape, dtype=torch.float64)
        return cls(sigmas.double(), one, torch.zeros_like(one), torch.zeros_like(one))


def estimate(
    denoise: Denoise,
    images: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    draws: int = 1024,
    batch: int = 256,
    seed: int = 0,
    derivative: str = "forward",
) -> ModelStatistics:
    """Estimate the statistics of a denoiser, guided or not.

    The same images, noises and probes serve at all noise levels, which keeps dl/dlam free of most Monte Carlo noise.
    Two evaluations of the denoiser, with their derivatives, per draw and noise level.

    Args:
        denoise: the callable that will be sampled from. Its x0 counts; a rule that renoises along another direction
            (CFG++) is refused.
        images: clean training images (M, C, H, W) in [-1, 1].
        sigmas: noise levels (N + 1,), falling, uniform in ln sigma, the last above 0.
        cond: their class ids (M,), or None.
        draws: noisy images K per noise level; images are used in turn, in random order.
        batch: how many of them at a time.
        seed: of images, noises and probes.
        derivative: "forward": forward-mode derivatives of the network; "difference": central differences, for networks
            that have none or that round the noise level to a time step.

    Raises:
        UserError: no images, draws < 2, an unknown derivative, or a denoiser whose x0 and eps disagree.
    """
    if len(images) == 0 or draws < 2:
        raise UserError(f"model statistics need images and at least 2 draws; got {len(images)} and {draws}")
    if derivative not in DERIVATIVES:
        raise unknown("derivative", derivative, DERIVATIVES)
    levels = sigmas.double()
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(-(-draws // len(images)))])
    shape = (len(levels), *images.shape[1:])
    jacobian = torch.zeros(shape, dtype=torch.float64, device=images.device)
    means = torch.zeros(3, *shape, dtype=torch.float64, device=images.device)  # of x, a and D'
    products = torch.zeros(3, 3, *shape, dtype=torch.float64, device=images.device)
    for rows in order[:draws].to(images.device).split(batch):
        size = (len(rows), *images.shape[1:])
        noise = torch.randn(size, generator=generator, dtype=torch.float64).to(images.device)
        probe = torch.randint(2, size, generator=generator).double().to(images.device) * 2 - 1
        clean, classes = images[rows].double(), None if cond is None else cond[rows]
        middle = levels[len(levels) // 2].to(images.device)
        _check_agrees(denoise, clean + middle * noise, middle, classes)
        for i, sigma in enumerate(levels.to(images.device)):
            x = clean + sigma * noise
            denoised, along_probe, along_ode = _derivatives(denoise, x, sigma, classes, probe, derivative)
            jacobian[i] += (probe * along_probe).sum(0)
            parts = torch.stack([x, x - denoised, along_ode])
            means[:, i] += parts.sum(1)
            products[:, :, i] += torch.einsum("pn...,qn...->pq...", parts, parts)
    means, products = means / draws, products / draws
    return coefficients(levels, 1 - jacobian / draws, means, products - means[:, None] * means[None])


def coefficients(sigmas: Tensor, l: Tensor, means: Tensor, covariances: Tensor) -> ModelStatistics:  # noqa: E741
    """l, s and b from l and the moments of (x, a, D').

    Args:
        sigmas: (N + 1,), uniform in ln sigma.
        l: (N + 1, ...).
        means: (3, N + 1, ...). covariances: (3, 3, N + 1, ...).
    """
    step = -sigmas.double().log().diff().mean().item()
    (slope,) = torch.gradient(l, spacing=step, dim=0)
    f = torch.stack([-l, torch.ones_like(l), torch.zeros_like(l)])  # f and its derivative over (x, a, D')
    f1 = torch.stack([-slope, l - 1, -torch.ones_like(l)])
    mean, mean1 = (f * means).sum(0), (f1 * means).sum(0)
    with_f = (covariances * f[None]).sum(1)
    variance, shared = (with_f * f).sum(0), (with_f * f1).sum(0)
    # a pixel that never changes has neither: what is left there is rounding
    steady = variance <= 1e-12 * (mean.square() + covariances[0, 0] * l.square()) + 1e-30
    s = torch.where(steady, 0.0, shared / torch.where(steady, 1.0, variance))
    cpu = [t.cpu() for t in (sigmas.double(), l, s, mean1 - s * mean)]
    return ModelStatistics(*cpu)


def _announce(denoise: Denoise, x: Tensor, sigma: Tensor, cond: Tensor | None) -> None:
    """Make the next call a run of its own, of one step: rules that remember earlier steps have none to remember.

    A rule that moves the state between steps is left out: it is no part of the ODE that a step solves.
    """
    begin(denoise, torch.stack([sigma, torch.zeros_like(sigma)]))
    begin_step(denoise, 0, x, cond)


def _check_agrees(denoise: Denoise, x: Tensor, sigma: Tensor, cond: Tensor | None) -> None:
    _announce(denoise, x, sigma, cond)
    now = denoise(x, sigma, cond)
    if not torch.allclose(now.x0, now.x0_of_eps(x, sigma), rtol=1e-3, atol=1e-3 * (1 + sigma.item())):
        raise UserError(
            "dpm_solver_v3 cannot sample with a guidance that renoises along another direction than it denoises "
            "(as cfgpp does): there is no ODE to take statistics of; use sampler=dpmpp_2m or unipc with it"
        )


def _derivatives(
    denoise: Denoise, x: Tensor, sigma: Tensor, cond: Tensor | None, probe: Tensor, derivative: str
) -> tuple[Tensor, Tensor, Tensor]:
    """D(x, sigma), its derivative in x along `probe`, and the one along the ODE, each (N, C, H, W)."""

    def clean(state: Tensor, level: Tensor) -> Tensor:
        _announce(denoise, x, sigma, cond)
        return denoise(state, level, cond).x0

    with torch.autocast(x.device.type, enabled=False):
        if derivative == "difference":
            denoised, small = clean(x, sigma), 1e-3 * (1 + sigma**2) ** 0.5  # of the state's spread
            towards = denoised - x
            in_x = _central(lambda t: clean(x + t * small * probe, sigma)) / small
            return denoised, in_x, _central(lambda t: clean(x + 0.02 * t * towards, sigma * (1 - 0.02 * t))) / 0.02
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
                denoised, in_x = _forward(lambda: clean(make_dual(x, probe), sigma))
                along = _forward(lambda: clean(make_dual(x, denoised - x), make_dual(sigma, -sigma)))[1]
                return denoised, in_x, along
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error).lower() and "jvp" not in str(error).lower():
                raise
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"this network has no forward-mode derivative; use derivative=difference\n{reason}"
            ) from error


def _forward(at: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Value and tangent of what `at` computes from dual tensors."""
    with dual_level():
        value, tangent = unpack_dual(at())
    return value, torch.zeros_like(value) if tangent is None else tangent


def _central(at: Callable[[float], Tensor]) -> Tensor:
    return (at(1.0) - at(-1.0)) / 2
