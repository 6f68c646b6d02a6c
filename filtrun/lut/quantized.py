"""SepLUT in 8-bit integers: quantised layers that make the tables, and lookups without floating point.

Source: code of ImCharlesY/SepLUT (``quantize``, ``seplut_transform_cpu_forward_uint8_impl``), whose layers go through
torch's dynamic quantisation; `quantized_linear` computes what that does. For 9 or 17 nodes, so that a shift of the
8-bit colour gives the cell. Everything divides downwards, as the integers there do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.lut.lattice import CHUNK
from filtrun.lut.schemes import SCHEMES
from filtrun.lut.workers import for_pieces

SHIFTS = {9: 5, 17: 4}
"""Bits of an 8-bit colour that lie inside a cell, by nodes along an axis."""
TINY = 6.1e-5
"""Scales of activations are at least this large."""


def quantized_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` on rows x (N, F) with 8-bit symmetric weights and 7-bit inputs, as torch's x86 kernels do for one row.

    Every row is quantised to its own range, so that an image's tables do not depend on the others of the batch.
    """
    weight = layer.weight.float()
    step = torch.clamp(weight.abs().amax() / 127.5, min=torch.finfo(torch.float32).eps)
    weight = (weight * (1 / step)).round().clamp(-128, 127)  # as there: a division can round to the other side
    low, high = x.float().amin(1, keepdim=True).clamp(max=0), x.float().amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 127
    scale = torch.where(scale > 0, scale.clamp(min=TINY), 0.1)
    zero = (-low / scale).round().clamp(0, 127)
    inputs = (x.float() * (1 / scale) + zero).round().clamp(0, 127) - zero
    return F.linear(inputs * scale, weight * step, layer.bias)


def to_8bit(values: Tensor) -> Tensor:
    """[0, 1] to uint8."""
    return values.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def apply_8bit(image: Tensor, curves: Tensor, lut: Tensor) -> Tensor:
    """Curves, then a 3D table, in integers.

    Args:
        image: uint8 (N, 3, H, W).
        curves: uint8 (N, 3, D), D is 9 or 17.
        lut: uint8 (N, 3, D, D, D) with the same D.

    Returns:
        uint8 (N, 3, H, W).
    """
    size, out = lut.shape[-1], torch.empty_like(image)
    shift = SHIFTS[size]
    area = image.shape[2] * image.shape[3]
    scheme = SCHEMES["trilinear"]
    for pixels, rows, tables, result in zip(image, curves, lut, out, strict=True):
        flat, into = pixels.reshape(3, -1), result.view(3, -1)
        nodes, values = rows.to(torch.int32), tables.reshape(3, -1).to(torch.int32)

        def look_up(start: int, end: int, flat=flat, into=into, nodes=nodes, values=values) -> None:  # type: ignore[no-untyped-def]
            cell, inside = _split(flat[:, start:end].to(torch.int32), shift)
            near, far = (nodes.gather(1, (cell + k).long()) for k in (0, 1))
            cell, inside = _split(((255 - inside) * near + inside * far) // 255, shift)
            first = (cell[2] * size + cell[1]) * size + cell[0]
            corners = scheme.corners(inside, size) + first
            red, green, blue = torch.stack([255 - inside, inside], dim=1).to(torch.int64)
            weights = (blue[:, None, None] * green[None, :, None] * red[None, None]).flatten(0, 2)
            for table, row in zip(values, into, strict=True):
                found = table.index_select(0, corners.view(-1)).view(corners.shape)
                row[start:end] = ((weights * found).sum(dim=0) // 255**3).to(torch.uint8)

        for_pieces(look_up, area, CHUNK, parallel=not image.is_cuda)
    return out


def _split(colour: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Cells of 8-bit colours and how far inside they lie, in 255ths."""
    cell = colour >> shift
    return cell, (colour << (8 - shift)) - cell * 255
