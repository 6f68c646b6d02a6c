"""Gaussian and Laplacian pyramids whose reconstruction is exact for every size.

``down(x) = (x * k)[::2, ::2]`` and ``up(x) = zero_insert(x) * 4k`` with the 5x5 binomial kernel k = b b^T / 256,
b = [1, 4, 6, 4, 1], reflect padding of 2 pixels: Burt & Adelson, "The Laplacian Pyramid as a Compact Image Code",
IEEE Trans. Communications 1983, as in the code of LLF-LUT (fengzhang427/LLF-LUT, models/PPB.py). A level is
``L_i = G_i - up(G_{i+1})``, so adding back gives G_i whatever `up` does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from filtrun.errors import UserError


def smallest_side(levels: int) -> int:
    """The least height and width that `levels` halvings allow: the coarsest level must keep two pixels."""
    return 2**levels + 1


def down(x: Tensor) -> Tensor:
    """Blur and keep every other pixel: (N, C, H, W) to (N, C, ceil(H/2), ceil(W/2)); H, W >= 3."""
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    return _halve(_halve(x, 2), 3)  # rows first: whole rows stream through the cache


def _halve(x: Tensor, dim: int) -> Tensor:
    """[1, 4, 6, 4, 1] / 16 along `dim` (2 or 3) of a padded tensor, at every other place."""
    reach = (x.shape[dim] - 3) // 2 * 2 - 1
    parts = [x.narrow(dim, first, reach) for first in range(5)]
    a, b, c, d, e = (part[:, :, ::2] if dim == 2 else part[..., ::2] for part in parts)
    return torch.add(a + e, b + d, alpha=4).add(c, alpha=6) / 16


def up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Double the resolution of x (N, C, h, w >= 2), then take the nearest pixels if `size` is not twice as large."""
    y = _double(_double(x, 3), 2)
    return y if y.shape[2:] == size else F.interpolate(y, size=size, mode="nearest")


def _double(x: Tensor, dim: int) -> Tensor:
    """Zero insertion and the filter along `dim`, without the products with zeros.

    Reflection of the spread signal [x0, 0, x1, 0, ...] puts x1 before its start and the last value behind its end.
    """
    count = x.shape[dim]
    after = torch.cat([x.narrow(dim, 1, count - 1), x.narrow(dim, count - 1, 1)], dim=dim)
    before = torch.cat([x.narrow(dim, 1, 1), x.narrow(dim, 0, count - 1)], dim=dim)
    even = torch.add(before + after, x, alpha=6) / 8
    odd = (x + after) / 2
    return torch.stack([even, odd], dim=dim + 1).flatten(dim, dim + 1)


def gaussian_pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """[G_0 = image, ..., G_levels], each level half as large, sides rounded up.

    Raises:
        UserError: the image is smaller than `smallest_side(levels)`.
    """
    least = smallest_side(levels)
    if min(image.shape[2:]) < least:
        size = "x".join(map(str, image.shape[2:]))
        raise UserError(f"{levels} pyramid levels need {least}x{least} pixels or more, the image has {size}")
    pyramid = [image]
    for _ in range(levels):
        pyramid.append(down(pyramid[-1]))
    return pyramid


def laplacian_levels(gaussian: list[Tensor]) -> list[Tensor]:
    """[L_0, ..., L_{n-1}, G_n] from a Gaussian pyramid [G_0, ..., G_n]."""
    details = [fine - up(coarse, _size(fine)) for fine, coarse in zip(gaussian[:-1], gaussian[1:], strict=True)]
    return [*details, gaussian[-1]]


def laplacian_pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """[L_0, ..., L_{levels-1}, G_levels] of (N, C, H, W); raises as `gaussian_pyramid`."""
    return laplacian_levels(gaussian_pyramid(image, levels))


def reconstruct(pyramid: list[Tensor]) -> Tensor:
    """The image of a Laplacian pyramid: exactly what it was made from, up to rounding."""
    image = pyramid[-1]
    for detail in reversed(pyramid[:-1]):
        image = up(image, _size(detail)) + detail
    return image


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]
