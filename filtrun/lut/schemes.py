"""The two ways to interpolate inside a cell of a 3D table: which corners count, and how much.

Corners are numbered ``k = r + 2 g + 4 b`` with r, g, b in {0, 1}. A scheme works on planar tensors, one row per corner,
so that every operation streams over contiguous memory; `fractions` are the three coordinates inside the cell in [0, 1].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from filtrun.constants import constant


class Scheme(Protocol):
    """What the lookup needs of a way to interpolate with K corners a pixel."""

    def corners(self, fractions: Tensor, size: int) -> Tensor:
        """Offsets of the corners from the cell's first node in a flat table: int32 (K, P) or (K, 1)."""

    def blend(self, fractions: Tensor) -> Tensor:
        """What `mix` takes beside the values; worked out once for all output channels."""

    def mix(self, values: Tensor, blend: Tensor) -> Tensor:
        """Interpolated (P,) from corner values (K, P)."""

    def weights(self, fractions: Tensor) -> Tensor:
        """What each corner counts: (K, P), non-negative, columns add up to one."""

    def slopes(self, values: Tensor, fractions: Tensor) -> Tensor:
        """Derivatives (3, P) of the interpolated value by the fractions."""


class Trilinear:
    """Weighted mean of all eight corners; continuous, with kinks at the cell faces."""

    def corners(self, fractions: Tensor, size: int) -> Tensor:
        line = torch.arange(2, dtype=torch.int32, device=fractions.device)
        face = torch.cat([line, line + size])
        return torch.cat([face, face + size * size])[:, None]

    def blend(self, fractions: Tensor) -> Tensor:
        return fractions

    def mix(self, values: Tensor, blend: Tensor) -> Tensor:
        red, green, blue = blend  # lerp gives its ends back exactly
        values = torch.lerp(values[0::2], values[1::2], red)
        values = torch.lerp(values[0::2], values[1::2], green)
        return torch.lerp(values[0], values[1], blue)

    def weights(self, fractions: Tensor) -> Tensor:
        red, green, blue = torch.stack([1 - fractions, fractions], dim=1)  # each (2, P): far from, near to
        return (blue[:, None, None] * green[None, :, None] * red[None, None]).flatten(0, 2)

    def slopes(self, values: Tensor, fractions: Tensor) -> Tensor:
        red, green, blue = fractions
        along_red = values[1::2] - values[0::2]  # (g + 2 b, P)
        along_red = torch.lerp(along_red[0::2], along_red[1::2], green)
        values = torch.lerp(values[0::2], values[1::2], red)
        along_green = values[1::2] - values[0::2]  # (b, P)
        values = torch.lerp(values[0::2], values[1::2], green)
        return torch.stack(
            [
                torch.lerp(along_red[0], along_red[1], blue),
                torch.lerp(along_green[0], along_green[1], blue),
                values[1] - values[0],
            ]
        )


class Tetrahedral:
    """Linear in one of six tetrahedra around the grey diagonal of the cell: four corners, greys stay grey.

    The path from the first corner to the last goes along the axis with the largest fraction first, the smallest last.
    Source: Kasson, Nin, Plouffe & Hafner, "Performing color space conversions with three-dimensional linear
    interpolation", Journal of Electronic Imaging 4(3), 1995.
    """

    # by [red >= green] + 2 [green >= blue] + 4 [red >= blue]; two of the eight cannot be, and NaN falls on 0
    FIRST = (2, 2, 1, 2, 2, 0, 1, 0)
    LAST = (0, 1, 0, 2, 0, 1, 2, 2)

    def _path(self, fractions: Tensor, by_axis: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """``by_axis[first]`` and ``by_axis[last]``, (P,) int32, for the axes the path takes first and last."""
        red, green, blue = fractions
        case = (red >= green).to(torch.int32)
        case = case.add_(green >= blue, alpha=2).add_(red >= blue, alpha=4)
        tables = tuple(tuple(by_axis[axis] for axis in axes) for axes in (self.FIRST, self.LAST))
        first, last = constant(tables, torch.int32, fractions.device)
        return first.index_select(0, case), last.index_select(0, case)

    def corners(self, fractions: Tensor, size: int) -> Tensor:
        steps = (1, size, size * size)
        first, last = self._path(fractions, steps)
        return torch.stack([torch.zeros_like(first), first, sum(steps) - last, torch.full_like(first, sum(steps))])

    def blend(self, fractions: Tensor) -> Tensor:
        return self.weights(fractions)

    def mix(self, values: Tensor, blend: Tensor) -> Tensor:
        return (values * blend).sum(dim=0)

    def weights(self, fractions: Tensor) -> Tensor:
        red, green, blue = fractions
        low, high = torch.minimum(red, green), torch.maximum(red, green)
        middle = torch.maximum(low, torch.minimum(high, blue))
        high, low = torch.maximum(high, blue), torch.minimum(low, blue)
        return torch.stack([1 - high, high - middle, middle - low, low])

    def slopes(self, values: Tensor, fractions: Tensor) -> Tensor:
        first, last = self._path(fractions, (0, 1, 2))
        steps = values[1:] - values[:-1]  # along the first, the middle and the last axis
        axes = torch.stack([first, 3 - first - last, last]).to(torch.int64)
        return torch.empty_like(steps).scatter_(0, axes, steps)


SCHEMES: dict[str, Scheme] = {"trilinear": Trilinear(), "tetrahedral": Tetrahedral()}
