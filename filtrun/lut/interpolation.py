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

from filtrun.constants import constant
from filtrun.errors import UserError, unknown
from filtrun.lut import fused
from filtrun.lut.lattice import Lattice
from filtrun.lut.schemes import SCHEMES
from filtrun.lut.workers import for_pieces


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
    vertices: Tensor | None = None,
) -> Tensor:
    """Replace every colour of `image` by what the table says.

    Args:
        image: (N, 3, H, W) float, channels red, green, blue. Values outside the domain are clamped to its ends (and
            get no gradient); NaN stays NaN.
        lut: (C, D, D, D) for all images or (N, C, D, D, D) for one each, ``lut[c, b, g, r]``, D >= 2. C is 3 for
            colours; any other number of output channels works too.
        interpolation: "trilinear" (eight corners of a cell) or "tetrahedral" (four of them, greys stay grey).
        domain_min, domain_max: input values, by channel, of the first and the last node of an axis (.cube files).
        vertices: where the nodes stand instead of at i / (D - 1): (3, D) for all images or (N, 3, D), rows for red,
            green and blue, increasing (not checked); gradients flow to them too (AdaInt, CVPR 2022).

    Returns:
        (N, C, H, W) in the image's dtype; half precision is computed in float32. At a node the table's own value comes
        back up to the rounding of ``value * (D - 1)``: bit for bit where that product is a whole number, and always
        at `vertices`.

    Raises:
        UserError: shapes, dtype, interpolation, domain or vertices that do not fit.
    """
    _check(image, lut, interpolation, domain_min, domain_max)
    dtype = torch.promote_types(torch.promote_types(image.dtype, lut.dtype), torch.float32)
    low, high = list(domain_min), list(domain_max)
    if vertices is not None:
        _check_vertices(image, lut, vertices, low + high)
        dtype = torch.promote_types(dtype, vertices.dtype)
        vertices = vertices.to(dtype)
    x, table = image.to(dtype), lut.to(dtype)
    if low != [0.0] * 3 or high != [1.0] * 3:
        start, end = (constant(tuple(ends), x.dtype, x.device).view(1, 3, 1, 1) for ends in (low, high))
        x = (x - start) / (end - start)
    if x.numel() == 0:
        return x.new_empty(x.shape[0], lut.shape[-4], *x.shape[2:]).to(image.dtype)
    if fused.applies(x, table, vertices):
        y = fused.fused_lookup(x, table, interpolation)
    elif interpolation == "trilinear" and x.is_cuda and vertices is None:
        y = grid_lookup(x, table)
    else:
        y = _Lookup.apply(x, table, vertices, interpolation)
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


def _check_vertices(image: Tensor, lut: Tensor, vertices: Tensor, domain: list[float]) -> None:
    if not vertices.is_floating_point() or vertices.dim() not in (2, 3) or vertices.shape[-2:] != (3, lut.shape[-1]):
        raise UserError(
            f"vertices of a 3D table with D={lut.shape[-1]} are float (3, D) or (N, 3, D), "
            f"not {vertices.dtype} {tuple(vertices.shape)}"
        )
    if vertices.dim() == 3 and vertices.shape[0] != image.shape[0]:
        raise UserError(f"{len(vertices)} sets of vertices for {len(image)} images: give one for each or one for all")
    if domain != [0.0] * 3 + [1.0] * 3:
        raise UserError("give either vertices or domain_min and domain_max: vertices say where an axis starts and ends")


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
    def forward(ctx: Any, image: Tensor, lut: Tensor, vertices: Tensor | None, interpolation: str) -> Tensor:
        ctx.save_for_backward(image, lut, vertices)
        ctx.interpolation = interpolation
        scheme, lattice = SCHEMES[interpolation], Lattice(image, lut, vertices)
        tables, pixels = _flat_tables(lut), _flat_pixels(image)
        out = image.new_empty(len(tables), pixels.shape[1])

        def look_up(start: int, end: int) -> None:
            cell, fractions = lattice.locate(pixels, start, end)
            index = lattice.corners(cell, fractions, start, scheme)
            blend, flat = scheme.blend(fractions), index.view(-1)
            for table, row in zip(tables, out, strict=True):
                row[start:end] = scheme.mix(table.index_select(0, flat).view(index.shape), blend)

        for_pieces(look_up, pixels.shape[1], lattice.step, parallel=not image.is_cuda)
        return out.view(len(tables), image.shape[0], *image.shape[2:]).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, lut, vertices = ctx.saved_tensors
        scheme, lattice = SCHEMES[ctx.interpolation], Lattice(image, lut, vertices)
        wants_image, wants_lut, wants_vertices = ctx.needs_input_grad[:3]
        tables, pixels = _flat_tables(lut), _flat_pixels(image)
        upstream = grads[0].transpose(0, 1).reshape(len(tables), -1)
        to_pixels = torch.empty_like(pixels)
        count = pixels.shape[1]
        # every thread adds up its own share of the gradients of table and vertices
        share = count if image.is_cuda else max(lattice.step, -(-count // torch.get_num_threads()))
        shares = -(-count // share)
        to_tables = tables.new_zeros(shares, *tables.shape)
        to_vertices = None if lattice.vertices is None else tables.new_zeros(shares, *lattice.vertices.shape)

        def spread(first: int, last: int) -> None:
            for start in range(first, last, lattice.step):
                end = min(start + lattice.step, last)
                cell, fractions = lattice.locate(pixels, start, end)
                index = lattice.corners(cell, fractions, start, scheme)
                incoming, flat = upstream[:, start:end], index.view(-1)
                if wants_image or wants_vertices:
                    # slopes are linear in the values, so the upstream gradient can be mixed in before
                    values = torch.zeros(index.shape, dtype=pixels.dtype, device=pixels.device)
                    for table, grad in zip(tables, incoming, strict=True):
                        values.addcmul_(table.index_select(0, flat).view(index.shape), grad)
                    slopes = lattice.slopes_in_colour(scheme.slopes(values, fractions), pixels, cell, start)
                    to_pixels[:, start:end] = slopes
                    if to_vertices is not None and wants_vertices:
                        lattice.add_to_vertices(to_vertices[first // share], slopes, cell, fractions, start)
                if wants_lut:
                    weights = scheme.weights(fractions)
                    for row, grad in zip(to_tables[first // share], incoming, strict=True):
                        row.index_add_(0, flat, (weights * grad).view(-1))

        for_pieces(spread, count, share, parallel=not image.is_cuda)
        grad_image = to_pixels.view(3, image.shape[0], *image.shape[2:]).transpose(0, 1) if wants_image else None
        grad_lut = grad_vertices = None
        if wants_lut:
            total = to_tables.sum(dim=0)
            grad_lut = total.view(lut.shape) if lut.dim() == 4 else total.view(-1, *lut.shape[:1], *lut.shape[2:])
            grad_lut = grad_lut if lut.dim() == 4 else grad_lut.transpose(0, 1)
        if to_vertices is not None and wants_vertices:
            grad_vertices = to_vertices.sum(dim=0).view(vertices.shape)
        return grad_image, grad_lut, grad_vertices, None


def _flat_pixels(image: Tensor) -> Tensor:
    """(3, N H W), without a copy for one image."""
    return image.transpose(0, 1).reshape(3, -1)


def _flat_tables(lut: Tensor) -> Tensor:
    """(C, D^3), or (C, N D^3) with the tables of all images one after the other."""
    return (lut if lut.dim() == 4 else lut.transpose(0, 1)).reshape(lut.shape[-4], -1)
