"""Canny edges of a grey image, with the settings and conventions of the routine LLF-LUT calls (kornia 0.7).

Source: Canny, "A Computational Approach to Edge Detection", PAMI 1986. Gaussian blur 5x5 with sigma 1, Sobel
derivatives that are not normalised, magnitude ``sqrt(gx^2 + gy^2 + 1e-6)``, suppression of what is not the strict
maximum along the gradient (rounded to 45 degrees; nothing lies beyond the border), thresholds, hysteresis.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from filtrun.constants import constant

LUMA = (0.299, 0.587, 0.114)
"""BT.601 weights of red, green and blue."""

GROWTHS = 8
"""Pixels that edges grow by before it is looked whether they still do."""

# row and column step to the neighbour at k * 45 degrees, rows counted downwards as the gradient's y is
NEIGHBOURS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


def luma(image: Tensor) -> Tensor:
    """Grey (N, 1, H, W) of an RGB image (N, 3, H, W)."""
    weights = constant(LUMA, image.dtype, image.device).view(1, 3, 1, 1)
    return (image * weights).sum(dim=1, keepdim=True)


@functools.cache
def _bell() -> tuple[float, ...]:
    """Five taps of a Gaussian with a standard deviation of one pixel."""
    bell = torch.exp(-torch.arange(-2, 3, dtype=torch.float64).square() / 2)
    return tuple((bell / bell.sum()).tolist())


def _gradient(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel derivatives along x and y of the blurred image."""
    bell = constant(_bell(), grey.dtype, grey.device)
    # reflect needs more pixels than it adds; a side of one or two pixels repeats its border instead
    mode = "reflect" if min(grey.shape[2:]) > 2 else "replicate"
    blurred = F.conv2d(F.pad(grey, (2, 2, 2, 2), mode=mode), bell.view(1, 1, 1, 5))
    blurred = F.conv2d(blurred, bell.view(1, 1, 5, 1))
    smooth, slope = (constant(taps, grey.dtype, grey.device) for taps in ((1.0, 2.0, 1.0), (-1.0, 0.0, 1.0)))
    padded = F.pad(blurred, (1, 1, 1, 1), mode="replicate")
    gx = F.conv2d(F.conv2d(padded, slope.view(1, 1, 1, 3)), smooth.view(1, 1, 3, 1))
    gy = F.conv2d(F.conv2d(padded, smooth.view(1, 1, 1, 3)), slope.view(1, 1, 3, 1))
    return gx, gy


@torch.no_grad()
def canny(grey: Tensor, low: float = 0.1, high: float = 0.2) -> Tensor:
    """Edge map of `grey`: 1 on edges, 0 elsewhere, without gradient.

    Args:
        grey: (N, 1, H, W) float, about [0, 1]; half precision is computed in float32.
        low, high: magnitudes above which a pixel is a weak and a strong edge; weak ones stay where a chain of weak
            pixels, each touching the next by side or corner, leads to a strong one.

    Returns:
        (N, 1, H, W) in the dtype of `grey`.
    """
    image = grey.to(torch.promote_types(grey.dtype, torch.float32))
    gx, gy = _gradient(image)
    magnitude = (gx * gx + gy * gy + 1e-6).sqrt()
    padded = F.pad(magnitude, (1, 1, 1, 1))
    height, width = magnitude.shape[2:]
    around = torch.cat([padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in NEIGHBOURS], dim=1)
    direction = torch.nan_to_num(torch.atan2(gy, gx) * (4 / math.pi)).round().to(torch.int64)
    ahead, behind = (around.gather(1, (direction + half) % 8) for half in (0, 4))
    ridge = (magnitude > ahead) & (magnitude > behind)
    return hysteresis(ridge & (magnitude > low), ridge & (magnitude > high)).to(grey.dtype)


def hysteresis(weak: Tensor, strong: Tensor) -> Tensor:
    """The weak pixels (N, 1, H, W), bool, that chains of weak ones join to strong ones, which are weak ones too.

    Grows until nothing is added: whether that is so has to be read, and a GPU waited for.
    """
    edges, found = strong, -1
    while (now := int(edges.sum())) != found:
        found = now
        for _ in range(GROWTHS):
            edges = weak & (F.max_pool2d(edges.to(torch.float32), 3, stride=1, padding=1) > 0)
    return edges
