"""Bicubic resizing as in MATLAB's ``imresize``: a = -0.5, antialiased when shrinking, borders mirrored.

Source: R. Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981, eq. 15; the antialiasing, the
pixel centres and the mirrored border follow the documented behaviour of ``imresize``. torch's own bicubic has a = -0.75
without antialiasing, and treats borders differently with it: every super-resolution table would shift.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from filtrun.errors import UserError


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5 at distances `x`: 1 at 0, 0 at the other whole numbers and beyond 2."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


@functools.lru_cache(maxsize=128)
def resize_matrix(length: int, up: int, down: int, antialias: bool = True) -> Tensor:
    """float64 (ceil(length * up / down), length): its product with a signal of `length` samples is the resized one.

    Whole numbers keep the output size exact: 510 / 3 must not become 171 through rounding.
    """
    scale, size = up / down, -(-length * up // down)
    shrink = scale if antialias and scale < 1 else 1.0  # the kernel is widened by 1 / shrink
    reach = 4 / shrink
    centre = torch.arange(1, size + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    first = torch.floor(centre - reach / 2)
    taps = first[:, None] + torch.arange(int(-(-reach // 1)) + 2, dtype=torch.float64)
    weights = shrink * cubic(shrink * (centre[:, None] - taps))
    weights = weights / weights.sum(1, keepdim=True)
    place = torch.remainder(taps.long() - 1, 2 * length)
    place = torch.where(place < length, place, 2 * length - 1 - place)
    return torch.zeros(size, length, dtype=torch.float64).scatter_add_(1, place, weights)


def imresize(x: Tensor, up: int, down: int, antialias: bool = True) -> Tensor:
    """Resize (..., H, W) of any floating type by up / down; the result is not clipped and may overshoot the range."""
    if up < 1 or down < 1:
        raise UserError(f"imresize by {up}/{down}: both numbers must be at least 1")
    if up == down:
        return x
    rows, columns = (_on(n, up, down, antialias, x.device, x.dtype) for n in x.shape[-2:])
    return rows @ x @ columns.mT


@functools.lru_cache(maxsize=128)
def _on(length: int, up: int, down: int, antialias: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    return resize_matrix(length, up, down, antialias).to(device, dtype)


def modcrop(x: Tensor, scale: int) -> Tensor:
    """(..., H, W) without the last rows and columns that exceed a multiple of `scale`."""
    height, width = (n - n % scale for n in x.shape[-2:])
    if not height or not width:
        raise UserError(f"an image of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than scale={scale}")
    return x[..., :height, :width]
