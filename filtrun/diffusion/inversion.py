"""From an image back to the noise that a deterministic sampler would draw it from."""

from __future__ import annotations

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.diffusion.stepping import checked_grid


def ddim_inversion(denoise: Denoise, x: Tensor, sigmas: Tensor, cond: Tensor | None = None) -> Tensor:
    """DDIM walked from an image to noise (Song et al. 2021, arXiv 2010.02502, section 4.3).

    Each step up from sigma' to sigma evaluates the network for sigma at the state of sigma', rescaled as the
    variance-preserving process would (z = x / sqrt(1 + sigma^2) stays), takes sigma' times the one noise off and puts
    sigma times the other on. For a prediction with one noise both are the same. When x0 and eps disagree, eps comes
    off and the noise that belongs to x0 goes on, the roles of sampling swapped: under CFG++ that is the inversion of
    its paper (arXiv 2406.08070, Algorithm 2), where the guided noise is not amplified.

    Args:
        denoise: plain or guided, as for sampling.
        x: images (N, C, H, W) in [-1, 1], or the state at ``sigmas[-1]``.
        sigmas: (S + 1,) falling, the grid the sampler would walk; its last value may be 0.
        cond: (N,) int64 or None.

    Returns:
        The state at sigmas[0], (N, C, H, W); S evaluations of the guided denoiser.
    """
    sigmas, _ = checked_grid(sigmas, x)
    begin(denoise, sigmas)
    steps = len(sigmas) - 1
    for i in range(steps):
        below, above = sigmas[steps - i], sigmas[steps - i - 1]
        x = begin_step(denoise, i, x, cond)
        seen = x * ((1 + above**2) / (1 + below**2)).sqrt()
        now = denoise(seen, above, cond)
        x = x - below * now.eps + (seen - now.x0)
    return x


def reconstruction_error(
    denoise: Denoise, x: Tensor, sigmas: Tensor, cond: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Invert images with DDIM and draw them again: (reconstructions, RMSE of each image (N,))."""
    from filtrun.diffusion.samplers import ddim

    with torch.no_grad():
        again = ddim(denoise, ddim_inversion(denoise, x, sigmas, cond), sigmas, cond)
    return again, (again - x).square().flatten(1).mean(1).sqrt()
