"""Tensors that carry their own indices: after any cut they say which rows and columns are left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from filtrun.errors import UserError


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """The whole numbers, and tuples of them, a module keeps as plain attributes."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    return {
        key: value for key, value in vars(module).items()
        if not key.startswith("_") and (whole(value) or (isinstance(value, tuple) and value and all(map(whole, value))))
    }  # fmt: skip


def codes(shape: torch.Size, device: torch.device) -> Tensor:
    """A double tensor that says of each entry where in the first two dimensions it was."""
    rows = torch.arange(shape[0], dtype=torch.float64, device=device)
    if len(shape) == 1:
        return rows
    columns = torch.arange(shape[1], dtype=torch.float64, device=device)
    tail = [1] * (len(shape) - 2)
    return (rows[:, None] * shape[1] + columns).view(shape[0], shape[1], *tail).expand(shape).contiguous()


def decode(coded: Tensor, old: torch.Size) -> dict[int, Tensor]:
    """Which rows and columns of the old shape are left."""
    if coded.shape[2:] != old[2:]:
        raise UserError(f"a tensor of shape {tuple(old)} would lose more than channels")
    keep = {}
    wide = old[1] if len(old) > 1 else 1
    table = coded.reshape(coded.shape[0], -1) if coded.ndim > 1 else coded[:, None]
    places = {0: (table[:, 0] // wide).long()}
    if len(old) > 1:
        step = table.shape[1] // coded.shape[1]
        places[1] = (table[0, ::step] % wide).long()
    for dim, rows in places.items():
        if len(rows) != old[dim]:
            keep[dim] = torch.zeros(old[dim], dtype=torch.bool).index_fill_(0, rows.cpu(), True)
    return keep
