"""Look colours up in a 3D table: fast on CPU and GPU, with gradients for the image and for the table.

A table is a tensor ``lut[c, b, g, r]``: output channel first, then the node along blue, green and red, red fastest, as
in the code of Zeng et al., "Learning Image-adaptive 3D Lookup Tables" (TPAMI 2020, HuiZeng/Image-Adaptive-3DLUT) and in
.cube files. Node i of an axis with D nodes stands at the input value ``i / (D - 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from filtrun.errors import UserError, unknown
from filtrun.lut.schemes import SCHEMES, Scheme
from filtrun.lut.workers import for_pieces

CHUNK = 1 << 15
"""Pixels a thread handles at a time: the corner values of a chunk stay in the cache."""


def identity_lut(size: int, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """The table (3, D, D, D) that gives every colour in [0, 1] back, with D = `size` nodes an axis.

    Raises:
        UserError: `size` is below 2.
    """
    if size < 2:
        raise UserError(f"a 3D table needs 2 or more nodes an axis, not {size}")
    # i / (D - 1) with one rounding: linspace steps from both ends and is off by an ulp in between
    nodes = torch.arange(size, dtype=torch.float64).div(torch.tensor(size - 1, dtype=torch.float64))
    axis = nodes.to(device=device, dtype=dtype or torch.get_default_dtype())
    blue, green, red = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([red, green, blue])


def apply_lut(
    image: Tensor,
    lut: Tensor,
    interpolation: str = "trilinear",
    *,
    domain_min: Sequence[float] = (0.0, 0.0, 0.0),
    domain_max: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Replace every colour of `image` by what the table says.

    Args:
        image: (N, 3, H, W) float, channels red, green, blue. Values outside the domain are clamped to its ends (and
            get no gradient); NaN stays NaN.
        lut: (C, D, D, D) for all images or (N, C, D, D, D) for one each, ``lut[c, b, g, r]``, D >= 2. C is 3 for
            colours; any other number of output channels works too.
        interpolation: "trilinear" (eight corners of a cell) or "tetrahedral" (four of them, greys stay grey).
        domain_min, domain_max: input values, by channel, of the first and the last node of an axis (.cube files).

    Returns:
        (N, C, H, W) in the image's dtype; half precision is computed in float32. At a node the table's own value comes
        back up to the rounding of ``value * (D - 1)``: bit for bit where that product is a whole number.

    Raises:
        UserError: shapes, dtype, interpolation or domain that do not fit.
    """
    _check(image, lut, interpolation, domain_min, domain_max)
    dtype = torch.promote_types(torch.promote_types(image.dtype, lut.dtype), torch.float32)
    x, table = image.to(dtype), lut.to(dtype)
    low, high = list(domain_min), list(domain_max)
    if low != [0.0] * 3 or high != [1.0] * 3:
        start, end = (x.new_tensor(ends).view(1, 3, 1, 1) for ends in (low, high))
        x = (x - start) / (end - start)
    if x.numel() == 0:
        return x.new_empty(x.shape[0], lut.shape[-4], *x.shape[2:]).to(image.dtype)
    if interpolation == "trilinear" and x.is_cuda:
        y = grid_lookup(x, table)
    else:
        y = _Lookup.apply(x, table, interpolation)
    return y.to(image.dtype)


def _check(image: Tensor, lut: Tensor, interpolation: str, low: Sequence[float], high: Sequence[float]) -> None:
    if interpolation not in SCHEMES:
        raise unknown("interpolation", interpolation, SCHEMES)
    if image.dim() != 4 or image.shape[1] != 3:
        raise UserError(f"a 3D table needs RGB images (N, 3, H, W), not {tuple(image.shape)}")
    if not image.is_floating_point() or not lut.is_floating_point():
        raise UserError(f"a 3D table needs float images and tables, not {image.dtype} and {lut.dtype}")
    cube = lut.shape[-3:]
    if lut.dim() not in (4, 5) or len(set(cube)) != 1 or cube[0] < 2:
        raise UserError(f"a 3D table is (C, D, D, D) or (N, C, D, D, D) with D >= 2, not {tuple(lut.shape)}")
    if lut.dim() == 5 and lut.shape[0] != image.shape[0]:
        raise UserError(f"{lut.shape[0]} tables for {image.shape[0]} images: give one for each or one for all")
    if len(low) != 3 or len(high) != 3 or any(not a < b for a, b in zip(low, high, strict=True)):
        raise UserError(f"domain_min={list(low)} must be below domain_max={list(high)} in each of three channels")


def grid_lookup(image: Tensor, lut: Tensor) -> Tensor:
    """Trilinear lookup through ``grid_sample``, the fastest on a GPU; arguments as `apply_lut`, in [0, 1], one dtype.

    The cell coordinate passes through [-1, 1], which costs about one more rounding than the other path.
    """
    n, _, height, width = image.shape
    grid = image.clamp(0, 1).mul(2).sub(1).permute(0, 2, 3, 1)
    if lut.dim() == 4:  # one table: the images become one tall image, so that nothing is expanded
        grid = grid.reshape(1, 1, n * height, width, 3)
        y = F.grid_sample(lut[None], grid, mode="bilinear", padding_mode="border", align_corners=True)
        return y[0, :, 0].unflatten(1, (n, height)).transpose(0, 1)
    return F.grid_sample(lut, grid[:, None], mode="bilinear", padding_mode="border", align_corners=True)[:, :, 0]


class _Lookup(torch.autograd.Function):
    """Gather the corners and mix them, a chunk of pixels at a time; the backward pass gathers them again."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, lut: Tensor, interpolation: str) -> Tensor:
        ctx.save_for_backward(image, lut)
        ctx.interpolation = interpolation
        scheme, cells = SCHEMES[interpolation], _Cells(image, lut)
        tables, pixels = _flat_tables(lut), _flat_pixels(image)
        out = image.new_empty(len(tables), pixels.shape[1])

        def look_up(start: int, end: int) -> None:
            index, fractions = cells.corners(pixels, start, end, scheme)
            blend, flat = scheme.blend(fractions), index.view(-1)
            for table, row in zip(tables, out, strict=True):
                row[start:end] = scheme.mix(table.index_select(0, flat).view(index.shape), blend)

        for_pieces(look_up, pixels.shape[1], cells.step, parallel=not image.is_cuda)
        return out.view(len(tables), image.shape[0], *image.shape[2:]).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, lut = ctx.saved_tensors
        scheme, cells = SCHEMES[ctx.interpolation], _Cells(image, lut)
        wants_image, wants_lut = ctx.needs_input_grad[:2]
        tables, pixels = _flat_tables(lut), _flat_pixels(image)
        upstream = grads[0].transpose(0, 1).reshape(len(tables), -1)
        to_pixels = torch.empty_like(pixels)
        count = pixels.shape[1]
        # every thread adds up its own share of the table's gradient
        share = count if image.is_cuda else max(cells.step, -(-count // torch.get_num_threads()))
        to_tables = torch.zeros(-(-count // share), *tables.shape, dtype=lut.dtype, device=lut.device)

        def spread(first: int, last: int) -> None:
            for start in range(first, last, cells.step):
                end = min(start + cells.step, last)
                index, fractions = cells.corners(pixels, start, end, scheme)
                incoming, flat = upstream[:, start:end], index.view(-1)
                if wants_image:
                    # slopes are linear in the values, so the upstream gradient can be mixed in before
                    values = torch.zeros(index.shape, dtype=pixels.dtype, device=pixels.device)
                    for table, grad in zip(tables, incoming, strict=True):
                        values.addcmul_(table.index_select(0, flat).view(index.shape), grad)
                    part = pixels[:, start:end]
                    inside = (part >= 0) & (part <= 1)
                    to_pixels[:, start:end] = scheme.slopes(values, fractions).mul_(cells.size - 1).mul_(inside)
                if wants_lut:
                    weights = scheme.weights(fractions)
                    for row, grad in zip(to_tables[first // share], incoming, strict=True):
                        row.index_add_(0, flat, (weights * grad).view(-1))

        for_pieces(spread, count, share, parallel=not image.is_cuda)
        grad_image = to_pixels.view(3, image.shape[0], *image.shape[2:]).transpose(0, 1) if wants_image else None
        grad_lut = None
        if wants_lut:
            total = to_tables.sum(dim=0)
            grad_lut = total.view(lut.shape) if lut.dim() == 4 else total.view(-1, *lut.shape[:1], *lut.shape[2:])
            grad_lut = grad_lut if lut.dim() == 4 else grad_lut.transpose(0, 1)
        return grad_image, grad_lut, None


def _flat_pixels(image: Tensor) -> Tensor:
    """(3, N H W), without a copy for one image."""
    return image.transpose(0, 1).reshape(3, -1)


def _flat_tables(lut: Tensor) -> Tensor:
    """(C, D^3), or (C, N D^3) with the tables of all images one after the other."""
    return (lut if lut.dim() == 4 else lut.transpose(0, 1)).reshape(lut.shape[-4], -1)


class _Cells:
    """Where the pixels of `image` lie in the table or tables `lut`."""

    def __init__(self, image: Tensor, lut: Tensor):
        self.size = lut.shape[-1]
        self.step = CHUNK if not image.is_cuda else 1 << 22
        self.own_tables = lut.dim() == 5 and lut.shape[0] > 1
        self.area = image.shape[2] * image.shape[3]
        self.kind = torch.int64 if lut.numel() >= 2**31 else torch.int32

    def corners(self, pixels: Tensor, start: int, end: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """For pixels `start` to `end`: corner index (K, P) into the flat tables, fractions in the cell (3, P)."""
        place = pixels[:, start:end].clamp(0, 1).mul_(self.size - 1)
        # NaN has no cell: the clamp of the integers keeps the index in bounds, and the fraction carries the NaN on
        cell = place.to(torch.int32).clamp_(0, self.size - 2)
        fractions = place.sub_(cell)
        first = (cell[2] * self.size + cell[1]).mul_(self.size).add_(cell[0]).to(self.kind)
        if self.own_tables:
            owner = torch.arange(start, end, device=pixels.device).div_(self.area, rounding_mode="floor")
            first += (owner * self.size**3).to(self.kind)
        return scheme.corners(fractions, self.size) + first, fractions
