"""Look colours up in a curve per channel: a 1D table of D values at i / (D - 1), linear in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from filtrun.errors import UserError
from filtrun.lut.lattice import CHUNK
from filtrun.lut.workers import for_pieces


def apply_curves(image: Tensor, curves: Tensor) -> Tensor:
    """Put every channel of `image` through its own curve.

    Args:
        image: (N, C, H, W) float. Values outside [0, 1] are clamped (and get no gradient); NaN stays NaN.
        curves: (C, D) for all images or (N, C, D) for one set each, D >= 2; gradients flow to them.

    Returns:
        (N, C, H, W) in the image's dtype; half precision is computed in float32.

    Raises:
        UserError: shapes or dtypes that do not fit.
    """
    fits = curves.dim() in (2, 3) and image.dim() == 4 and curves.shape[-2] == image.shape[1] and curves.shape[-1] >= 2
    if not fits or (curves.dim() == 3 and curves.shape[0] != image.shape[0]):
        raise UserError(
            "curves are (C, D) or (N, C, D) with D >= 2 for images (N, C, H, W), "
            f"not {tuple(curves.shape)} for {tuple(image.shape)}"
        )
    if not image.is_floating_point() or not curves.is_floating_point():
        raise UserError(f"curves need float images and tables, not {image.dtype} and {curves.dtype}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, curves.dtype), torch.float32)
    x = image.to(dtype)
    own = curves.to(dtype).expand(x.shape[0], -1, -1)
    return x.to(image.dtype) if x.numel() == 0 else _Curves.apply(x, own).to(image.dtype)


class _Curves(torch.autograd.Function):
    """One row of pixels per image and channel, a chunk at a time; the backward pass looks the cells up again."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, curves: Tensor) -> Tensor:
        ctx.save_for_backward(image, curves)
        rows, tables = _rows(image), _rows(curves)
        out = torch.empty_like(rows)

        def look_up(row: int, start: int, end: int) -> None:
            cell, fraction = _locate(rows[row, start:end], tables.shape[1])
            near = tables[row].index_select(0, cell)
            out[row, start:end] = torch.lerp(near, tables[row].index_select(0, cell.add_(1)), fraction)

        _for_rows(look_up, rows)
        return out.view(image.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, curves = ctx.saved_tensors
        rows, tables, upstream = _rows(image), _rows(curves), _rows(grads[0])
        to_rows, to_tables = torch.empty_like(rows), torch.zeros_like(tables)
        last = tables.shape[1] - 1

        def spread(row: int, start: int, end: int) -> None:
            x, grad = rows[row, start:end], upstream[row, start:end]
            cell, fraction = _locate(x, last + 1)
            far = cell + 1
            if ctx.needs_input_grad[0]:
                slope = tables[row].index_select(0, far) - tables[row].index_select(0, cell)
                to_rows[row, start:end] = slope.mul_(last).mul_((x >= 0) & (x <= 1)).mul_(grad)
            if ctx.needs_input_grad[1]:
                share = fraction * grad
                to_tables[row].index_add_(0, far, share)
                to_tables[row].index_add_(0, cell, grad - share)

        _for_rows(spread, rows, whole=True)
        wants = ctx.needs_input_grad
        return (to_rows.view(image.shape) if wants[0] else None, to_tables.view(curves.shape) if wants[1] else None)


def _rows(tensor: Tensor) -> Tensor:
    """(N, C, ...) to (N C, the rest)."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1)


def _locate(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cells (P,) int32 and fractions in them of colours (P,)."""
    place = x.clamp(0, 1).mul_(size - 1)
    cell = place.to(torch.int32).clamp_(0, size - 2)  # NaN lands in some cell and its fraction carries it on
    return cell, place.sub_(cell)


def _for_rows(work: Any, rows: Tensor, whole: bool = False) -> None:
    """Call ``work(row, start, end)`` for pieces of every row of (R, P); `whole`: a thread does all of a row."""
    count, width = rows.shape
    step = CHUNK if not rows.is_cuda else 1 << 24
    each = -(-width // step)

    def piece(first: int, last: int) -> None:
        for number in range(first, last):
            start = number % each * step
            work(number // each, start, min(start + step, width))

    for_pieces(piece, count * each, each if whole else 1, parallel=not rows.is_cuda)
