"""Synthetic rain: sparse bright points smeared along a direction, laid over the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from filtrun.degrade.noise import rand
from filtrun.precision import full_precision


def line_kernels(length: Tensor, angle: Tensor, width: Tensor, size: int) -> Tensor:
    """Streaks as kernels (N, 1, size, size), 1 at the centre: Gaussian across, of full brightness along `length`.

    Args:
        length, width: (N,) pixels; `width` is the standard deviation across.
        angle: (N,) radians from the vertical, positive leans to the right at the top.
        size: odd; a longer streak is cut.
    """
    t = torch.arange(size, device=length.device, dtype=torch.float32) - size // 2
    y, x = torch.meshgrid(t, t, indexing="ij")
    sin, cos = torch.sin(angle).view(-1, 1, 1), torch.cos(angle).view(-1, 1, 1)
    along, across = x * sin - y * cos, x * cos + y * sin
    inside = (length.view(-1, 1, 1) / 2 + 0.5 - along.abs()).clamp(0, 1)
    return (inside * torch.exp(-across.square() / (2 * width.view(-1, 1, 1) ** 2)))[:, None]


@full_precision
def streaks(
    n: int,
    height: int,
    width: int,
    *,
    density: tuple[float, float],
    length: tuple[float, float],
    lean: float,
    thickness: tuple[float, float],
    brightness: tuple[float, float],
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rain layers (n, 1, H, W) in [0, 1]; every image draws its own density, length, angle, thickness and brightness.

    Args:
        density: share of pixels at which a streak is centred, lowest and highest.
        length, thickness: of the streaks, pixels, lowest and highest.
        lean: largest angle from the vertical, degrees.
        brightness: of a layer's brightest streaks, lowest and highest; each streak has half of it or more.
    """
    draws = rand((5, n), device, generator)
    ranges = (density, length, (-lean, lean), thickness, brightness)
    share, long, angle, wide, bright = (low + (high - low) * d for (low, high), d in zip(ranges, draws, strict=True))
    size = int(math.ceil(length[1])) // 2 * 2 + 3
    kernels = line_kernels(long, angle * math.pi / 180, wide, size)
    points = rand((2, n, height + size - 1, width + size - 1), device, generator)
    drops = torch.where(points[0] < share.view(-1, 1, 1), 0.5 + 0.5 * points[1], 0.0)
    layer = F.conv2d(drops[None], kernels, groups=n)[0][:, None] if n else drops[:, None]
    return (layer.clamp(max=1) * bright.view(-1, 1, 1, 1)).clamp(0, 1)


def add_rain(clean: Tensor, layer: Tensor, mode: str = "additive") -> Tensor:
    """Images (N, C, H, W) in [0, 1] under a rain layer (N, 1, H, W).

    Args:
        mode: additive, min(x + r, 1), as most synthetic sets; screen, 1 - (1 - x)(1 - r), which saturates softly.
    """
    return (clean + layer).clamp(max=1) if mode == "additive" else 1 - (1 - clean) * (1 - layer)
