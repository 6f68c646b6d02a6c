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
from filtrun.precision import full_precision


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5 at distances `x`: 1 at 0, 0 at the other whole numbers and beyond 2."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


def resize_taps(length: int, up: int, down: int, antialias: bool = True) -> tuple[Tensor, Tensor]:
    """(index int64, weight float64), both (taps, ceil(length * up / down)): ``sum_t weight[t] * signal[index[t]]`` is
    the resized signal of `length` samples.

    There are 6 taps, and about ``4 * down / up + 2`` when shrinking with antialiasing. Whole numbers keep the output
    size exact: 510 / 3 must not become 171 through rounding.
    """
    scale, size = up / down, -(-length * up // down)
    shrink = scale if antialias and scale < 1 else 1.0  # the kernel is widened by 1 / shrink
    reach = 4 / shrink
    centre = torch.arange(1, size + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    first = torch.floor(centre - reach / 2)
    taps = first + torch.arange(int(-(-reach // 1)) + 2, dtype=torch.float64)[:, None]
    weight = shrink * cubic(shrink * (centre - taps))
    weight = weight / weight.sum(0)
    place = torch.remainder(taps.long() - 1, 2 * length)
    place = torch.where(place < length, place, 2 * length - 1 - place)
    used = (weight != 0).any(1)  # the outermost ones mostly lie where the kernel is 0
    return place[used], weight[used]


def resize_matrix(length: int, up: int, down: int, antialias: bool = True) -> Tensor:
    """float64 (ceil(length * up / down), length): its product with a signal of `length` samples is the resized one."""
    place, weight = resize_taps(length, up, down, antialias)
    dense = torch.zeros(weight.shape[1], length, dtype=torch.float64)
    return dense.scatter_add_(1, place.mT, weight.mT)


@full_precision
def imresize(x: Tensor, up: int, down: int, antialias: bool = True) -> Tensor:
    """Resize (..., H, W) of any floating type by up / down; the result is not clipped and may overshoot the range."""
    if up < 1 or down < 1:
        raise UserError(f"imresize by {up}/{down}: both numbers must be at least 1")
    if up == down:
        return x
    for dim in (-2, -1):
        x = _along(x, dim, up, down, antialias)
    return x


SHORT = 256
"""Sides up to this are resized by one product with a dense matrix, which takes a single call for a batch of crops."""
PIECE = 1 << 18
"""Pixels of longer sides that are computed at once, so that the sum over the taps stays in the processor's cache."""


def _along(x: Tensor, dim: int, up: int, down: int, antialias: bool) -> Tensor:
    length = x.shape[dim]
    if length <= SHORT:
        matrix = _short(length, up, down, antialias, x.device, x.dtype)
        return matrix @ x if dim == -2 else x @ matrix.mT
    place, weight = resize_taps(length, up, down, antialias)
    place, weight = place.to(x.device), weight.to(x.device, x.dtype)
    size, learns = place.shape[1], x.requires_grad and torch.is_grad_enabled()
    if dim == -1:
        parts, step = x.reshape(-1, length), max(1, PIECE // size)
        if learns:
            return torch.cat([_gathered(p, -1, place, weight) for p in parts.split(step)]).view(*x.shape[:-1], size)
        out = x.new_empty(*x.shape[:-1], size)
        for part, rows in zip(parts.split(step), out.view(-1, size).split(step), strict=True):
            rows.copy_(_gathered(part, -1, place, weight))
        return out
    weight = weight[..., None]
    if learns:  # going back, each piece would need a gradient of the whole image
        return _gathered(x, -2, place, weight)
    out = x.new_empty(*x.shape[:-2], size, x.shape[-1])
    step = max(1, PIECE * length // max(1, x.numel()))
    for first in range(0, size, step):
        rows = slice(first, first + step)
        out[..., rows, :] = _gathered(x, -2, place[:, rows], weight[:, rows])
    return out


def _gathered(x: Tensor, dim: int, place: Tensor, weight: Tensor) -> Tensor:
    total = x.index_select(dim, place[0]) * weight[0]
    for row, share in zip(place[1:], weight[1:], strict=True):
        total = total.addcmul_(x.index_select(dim, row), share)
    return total


@functools.lru_cache(maxsize=64)
def _short(length: int, up: int, down: int, antialias: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    return resize_matrix(length, up, down, antialias).to(device, dtype)


def modcrop(x: Tensor, scale: int) -> Tensor:
    """(..., H, W) without the last rows and columns that exceed a multiple of `scale`."""
    height, width = (n - n % scale for n in x.shape[-2:])
    if not height or not width:
        raise UserError(f"an image of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than scale={scale}")
    return x[..., :height, :width]
