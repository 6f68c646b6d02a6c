"""Random draws for degradations, and camera noise. Noisy images are not clipped."""

from __future__ import annotations

import torch
from torch import Tensor


def rand(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform float32 in [0, 1) on `device`, drawn on the generator's own device so that every device sees the same."""
    if generator is None:
        return torch.rand(shape, device=device)
    return torch.rand(shape, device=generator.device, generator=generator).to(device)


def uniform(n: int, low: float, high: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(n,) uniform in [low, high)."""
    return low + (high - low) * rand((n,), device, generator)


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal draws of the shape of `x`, on its device."""
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, device=generator.device, generator=generator).to(x)


def gaussian(x: Tensor, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x + sigma * n, not clipped; `sigma` (N,) is on the scale of x: 25 / 255 for the usual level 25."""
    return x + sigma.view(-1, 1, 1, 1) * randn_like(x, generator)


def row_noise(x: Tensor, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """x plus one draw of N(0, sigma^2) for each row of each channel, as read-out electronics leave it.

    The noise of neighbouring pixels in a row is the same, so a network that sees them can copy it: white noise is no
    good model of it.
    """
    return x + sigma * randn_like(x[..., :1], generator)


def poisson_gaussian(x: Tensor, peak: float, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Photon and read noise: Poisson(peak * x) / peak + sigma * n; its variance is x / peak + sigma^2.

    Foi et al., "Practical Poissonian-Gaussian Noise Modeling and Fitting for Single-Image Raw-Data", 2008, eq. 3.

    Args:
        peak: photons at x = 1.
        sigma: (N,), on the scale of x.
    """
    rates = x.clamp(min=0) * peak
    if generator is None:
        counts = torch.poisson(rates)
    else:
        counts = torch.poisson(rates.to(generator.device), generator=generator).to(x.device)
    return gaussian(counts / peak, sigma, generator)
