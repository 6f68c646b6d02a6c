"""What keeps learned 3D tables smooth and monotone: the two penalties of Zeng et al., TPAMI 2020 (arXiv 2009.14468).

Both follow the code of HuiZeng/Image-Adaptive-3DLUT (class TV_3D), which LLF-LUT uses as well. Tables are
``lut[c, b, g, r]``; means are over the differences along one axis, then summed over the three axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXES = (-1, -2, -3)
"""Red, green and blue."""


def total_variation(lut: Tensor, edge_weight: float = 2.0) -> Tensor:
    """Mean squared difference of neighbouring nodes, summed over the axes; a scalar >= 0.

    Args:
        lut: (C, D, D, D), D >= 2.
        edge_weight: how much the first and the last difference of an axis count; 2 in the released code. With D = 2
            there is one difference, and it counts `edge_weight` once.

    The identity table gives ``(D + 1) / (D - 1)^3`` for D >= 3 with the default weight.
    """
    total = lut.new_zeros(())
    for axis in AXES:
        squared = lut.diff(dim=axis).square()
        weight = torch.ones(squared.shape[axis], dtype=lut.dtype, device=lut.device)
        weight[0] = weight[-1] = edge_weight
        total = total + (squared.movedim(axis, -1) * weight).mean()
    return total


def monotonicity(lut: Tensor) -> Tensor:
    """Mean fall from a node to the next, ``relu(T[i] - T[i + 1])``, summed over the axes; zero if nothing falls."""
    return torch.stack([lut.diff(dim=axis).neg().relu().mean() for axis in AXES]).sum()
