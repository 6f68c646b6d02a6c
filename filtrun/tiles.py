"""Large images through a network in overlapping tiles, blended so smoothly that no seam shows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def tile_starts(length: int, tile: int, overlap: int, multiple: int = 1) -> list[int]:
    """Where tiles of `tile` pixels begin so that they cover 0..length evenly, neighbours sharing at least `overlap`.

    All starts are multiples of `multiple`; `length` and `tile` must be too.
    """
    if length <= tile:
        return [0]
    step = (tile - overlap) // multiple * multiple
    count = math.ceil((length - tile) / step) + 1
    return [round(i * (length - tile) / (count - 1) / multiple) * multiple for i in range(count)]


def tile_weights(starts: list[int], tile: int, length: int) -> list[Tensor]:
    """The share of each tile in each of its pixels, float64 (min(tile, length),): all shares of a pixel sum to 1.

    Where two tiles overlap a tile counts nothing in the quarter next to its own edge, which is what its border has
    spoilt, and rises as a raised cosine over the middle half.
    """
    size = min(tile, length)
    weights = []
    for i, start in enumerate(starts):
        w = torch.ones(size, dtype=torch.float64)
        for side, other in ((0, i - 1), (1, i + 1)):
            if not 0 <= other < len(starts):
                continue
            shared = size - abs(start - starts[other])
            t = ((torch.arange(shared, dtype=torch.float64) + 0.5) / shared * 2 - 0.5).clamp(0, 1)
            ramp = 0.5 - 0.5 * torch.cos(math.pi * t)
            if side == 0:
                w[:shared] *= ramp
            else:
                w[size - shared :] *= ramp.flip(0)
        weights.append(w)
    total = torch.zeros(length, dtype=torch.float64)
    for start, w in zip(starts, weights, strict=True):
        total[start : start + size] += w
    return [w / total[start : start + size] for start, w in zip(starts, weights, strict=True)]


def pad_to(x: Tensor, multiple: int, smallest: int = 1) -> Tensor:
    """(N, C, H, W) extended at the right and the bottom by mirroring, to multiples of `multiple` not below `smallest`.

    An image too small to be mirrored that far has its last pixel repeated.
    """
    height, width = x.shape[-2:]
    down, right = (max(-(-n // multiple) * multiple, -(-smallest // multiple) * multiple) - n for n in (height, width))
    if not down and not right:
        return x
    mode = "reflect" if down < height and right < width else "replicate"
    return F.pad(x, (0, right, 0, down), mode=mode)


def tiled(
    network: Callable[..., Tensor], *inputs: Tensor, tile: int, overlap: int = 64, ratio: int = 1, multiple: int = 1
) -> Tensor:
    """The output of `network` on images of any size, computed tile by tile.

    For a network that sees `r` pixels around each (its receptive radius) the result does not depend on the tiling when
    ``overlap >= 4 r``. Tiles are processed one by one; memory is that of one tile and the output.

    Args:
        network: called with one crop of every input, (N, C, h, w) -> (N, C', ratio * h, ratio * w).
        inputs: images of one size, (N, C, H, W).
        tile, overlap: side of the tiles and what neighbours share, in input pixels; rounded up to `multiple`.
        ratio: how many times larger the output is.
        multiple: the network needs sides that are multiples of this; the image is mirrored to fill up.

    Returns:
        (N, C', ratio * H, ratio * W), float32 or wider.
    """
    height, width = inputs[0].shape[-2:]
    padded = [pad_to(x, multiple) for x in inputs]
    tile, overlap = (-(-n // multiple) * multiple for n in (tile, overlap))
    if tile < 2 * overlap:
        raise ValueError(f"tiles of {tile} pixels cannot share {overlap} with each neighbour; at most half")
    size = padded[0].shape[-2:]
    rows, columns = (tile_starts(n, tile, overlap, multiple) for n in size)
    row_weights, column_weights = (
        tile_weights([s * ratio for s in starts], tile * ratio, n * ratio)
        for starts, n in zip((rows, columns), size, strict=True)
    )
    out: Tensor | None = None
    for top, down in zip(rows, row_weights, strict=True):
        for left, right in zip(columns, column_weights, strict=True):
            piece = network(*(x[..., top : top + tile, left : left + tile] for x in padded))
            piece = piece if piece.dtype in (torch.float32, torch.float64) else piece.float()
            if out is None:
                out = piece.new_zeros((*piece.shape[:2], size[0] * ratio, size[1] * ratio))
            weight = (down[:, None] * right).to(piece)
            y, x = top * ratio, left * ratio
            out[..., y : y + len(down), x : x + len(right)] += piece * weight
    assert out is not None
    return out[..., : height * ratio, : width * ratio]
