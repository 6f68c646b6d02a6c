"""Photographic adjustments: exposure, gamma and contrast, which can be undone, and weaker detail."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from filtrun.precision import full_precision


def to_linear(x: Tensor) -> Tensor:
    """sRGB in [0, 1] -> linear light (IEC 61966-2-1); values above 1 go on along the curve."""
    return torch.where(x > 0.04045, ((x.clamp(min=0) + 0.055) / 1.055) ** 2.4, x / 12.92)


def to_srgb(x: Tensor) -> Tensor:
    """Linear light -> sRGB, the inverse of `to_linear`."""
    return torch.where(x > 0.0031308, 1.055 * x.clamp(min=1e-12) ** (1 / 2.4) - 0.055, x * 12.92)


def adjust(x: Tensor, stops: Tensor, gamma: Tensor, contrast: Tensor) -> Tensor:
    """sRGB images (N, C, H, W) in [0, 1] with another exposure, gamma and contrast, each (N,), clipped to [0, 1].

    Linear light is multiplied by 2^stops; in sRGB the value is raised to `gamma` and its distance from 1/2 multiplied
    by `contrast`. A contrast below 1 and stops below 0 lose nothing, so `restore` brings the image back.
    """
    stops, gamma, contrast = (t.view(-1, 1, 1, 1) for t in (stops, gamma, contrast))
    x = to_srgb(to_linear(x) * 2**stops).clamp(0, 1)
    return (0.5 + contrast * (x**gamma - 0.5)).clamp(0, 1)


def restore(x: Tensor, stops: Tensor, gamma: Tensor, contrast: Tensor) -> Tensor:
    """Inverse of `adjust` where nothing was clipped."""
    stops, gamma, contrast = (t.view(-1, 1, 1, 1) for t in (stops, gamma, contrast))
    x = ((x - 0.5) / contrast + 0.5).clamp(min=0) ** (1 / gamma)
    return to_srgb(to_linear(x) / 2**stops)


@full_precision
def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of images (N, C, H, W), `sigma` in pixels, three sigma wide; edges are repeated."""
    reach = max(1, round(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(x.shape[1], 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), taps[:, :, None], groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), taps[..., None], groups=x.shape[1])


def scale_detail(x: Tensor, factor: Tensor, sigma: float) -> Tensor:
    """Blurred image plus `factor` (N,) times what the blur took away, clipped to [0, 1]; no curve of values does this.

    What it does to a pixel depends on the pixels around it, so that a table of colours cannot undo it and a local
    filter can.
    """
    base = blur(x, sigma)
    return (base + factor.view(-1, 1, 1, 1) * (x - base)).clamp(0, 1)
