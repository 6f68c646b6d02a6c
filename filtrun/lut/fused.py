"""Lookups in a 3D table as one compiled loop over pixels: each colour is read once and its result written once.

torch.compile makes a Triton kernel of it on a GPU and a vectorised loop on a CPU. Compiling takes seconds, so it is
for many or large images, without gradients, and only where `fused` asks for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from filtrun.errors import RunFailure

_wanted = False


@contextlib.contextmanager
def fused(on: bool = True) -> Iterator[None]:
    """Inside the block `filtrun.lut.interpolation.apply_lut` looks up in one compiled loop where it can."""
    global _wanted
    before, _wanted = _wanted, on
    try:
        yield
    finally:
        _wanted = before


def applies(image: Tensor, lut: Tensor, vertices: Tensor | None) -> bool:
    """Whether a lookup is to be fused: asked for, at the usual nodes, in float32 and without gradients."""
    gradients = torch.is_grad_enabled() and (image.requires_grad or lut.requires_grad)
    return _wanted and vertices is None and not gradients and image.dtype == lut.dtype == torch.float32


def fused_lookup(image: Tensor, lut: Tensor, interpolation: str) -> Tensor:
    """As `apply_lut`, of float32 images (N, 3, H, W) in [0, 1]: (N, C, H, W).

    Raises:
        RunFailure: nothing here compiles (no C++ compiler, no Triton).
    """
    look_up = _compiled(interpolation)
    made = image.new_empty(len(image), lut.shape[-4], *image.shape[2:])
    try:
        for i, pixels in enumerate(image):
            table = lut if lut.dim() == 4 else lut[i]
            made[i] = look_up(pixels, table.reshape(len(table), -1), lut.shape[-1])
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise RunFailure(f"lookups cannot be compiled here: {str(error).strip().splitlines()[0]}") from error
    return made


@functools.cache
def _compiled(interpolation: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    return torch.compile({"trilinear": trilinear, "tetrahedral": tetrahedral}[interpolation], dynamic=None)


def locate(image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Place of each pixel's cell in a flat table (H, W), int32, and the coordinates inside it (3, H, W)."""
    place = image.clamp(0, 1) * (size - 1)
    cell = place.nan_to_num().floor().clamp(max=size - 2)
    red, green, blue = cell.to(torch.int32)
    return (blue * size + green) * size + red, place - cell  # NaN stays in the coordinates


def trilinear(image: Tensor, tables: Tensor, size: int) -> Tensor:
    """Weighted mean of eight corners: (C, H, W) from pixels (3, H, W) and tables (C, D^3), D = `size`."""
    first, (red, green, blue) = locate(image, size)
    face = size * size

    def mixed(table: Tensor) -> Tensor:
        rows = [
            torch.lerp(table[first + offset], table[first + offset + 1], red)
            for offset in (0, size, face, face + size)
        ]  # fmt: skip
        return torch.lerp(torch.lerp(rows[0], rows[1], green), torch.lerp(rows[2], rows[3], green), blue)

    return torch.stack([mixed(table) for table in tables])


def tetrahedral(image: Tensor, tables: Tensor, size: int) -> Tensor:
    """Four corners on the way along the largest coordinate first; shapes as `trilinear`."""
    first, (red, green, blue) = locate(image, size)
    most = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    middle = red + green + blue - most - least
    face = size * size
    up = torch.where(red == most, 1, torch.where(green == most, size, face))
    last = torch.where(blue == least, face, torch.where(green == least, size, 1))
    # three equal coordinates are both largest and smallest; their order does not matter as long as it is one
    up, last = (torch.where(most == least, end, side) for side, end in ((up, 1), (last, face)))
    whole = 1 + size + face

    def mixed(table: Tensor) -> Tensor:
        here, there = table[first], table[first + whole]
        way = table[first + up], table[first + whole - last]
        return here * (1 - most) + way[0] * (most - middle) + way[1] * (middle - least) + there * least

    return torch.stack([mixed(table) for table in tables])
