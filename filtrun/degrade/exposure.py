"""Photographic adjustments with a known inverse: exposure, gamma, contrast."""

from __future__ import annotations

import torch
from torch import Tensor


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
