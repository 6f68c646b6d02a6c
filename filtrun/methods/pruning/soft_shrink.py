"""Soft shrinkage: which weights are small now, and one step of making them smaller.

Facts from ISS-P (arXiv 2303.09650; official code Jiamian-Wang/Iterative-Soft-Shrinkage-SR, ``basicsr/pruner``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CAP = 0.995
"""Of no tensor more than this share is selected."""
SAMPLE = 32_400
"""Weights the fast ranking looks at."""


def shrink_count(numel: int, ratio: float) -> int:
    """How many of `numel` weights are selected: ceil(ratio n), at most floor(0.995 n)."""
    return min(math.ceil(ratio * numel), math.floor(CAP * numel))


def smallest(weight: Tensor, ratio: float) -> Tensor:
    """Bool mask (shape of the weight) of its `shrink_count` smallest magnitudes; of equal ones the earlier goes."""
    flat = weight.detach().abs().flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.index_fill_(0, flat.argsort(stable=True)[: shrink_count(flat.numel(), ratio)], True).view_as(weight)


def smallest_fast(weight: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """The same by a threshold that `SAMPLE` weights drawn at random give: approximate, and cheap for large layers.

    What is below the next magnitude of the sample, after its ceil(ratio n) smallest, is selected. Drawn with
    replacement, as a permutation of all weights would cost as much as ranking them.
    """
    flat = weight.detach().abs().flatten()
    if flat.numel() <= SAMPLE:
        return smallest(weight, ratio)
    rows = torch.randint(flat.numel(), (SAMPLE,), generator=generator, device="cpu" if generator else flat.device)
    return (flat < flat[rows.to(flat.device)].kthvalue(shrink_count(SAMPLE, ratio) + 1).values).view_as(weight)


def smallest_in_groups(weight: Tensor, drop: int, size: int) -> Tensor:
    """Bool mask of the `drop` smallest magnitudes in every `size` consecutive entries of the flattened weight.

    Raises:
        ValueError: the number of entries is no multiple of `size`.
    """
    if weight.numel() % size:
        raise ValueError(f"{weight.numel()} entries are no multiple of {size}")
    groups = weight.detach().abs().reshape(-1, size)
    lowest = groups.argsort(dim=1, stable=True)[:, :drop]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view_as(weight)


def fitting_groups(drop: int, size: int, numels: list[int]) -> tuple[int, int]:
    """(drop, size) both increased by one until the size divides every number of entries, as the official code does.

    19:20 on layers of 1728 and 36864 entries becomes 23:24. The size is at most the smallest layer.
    """
    common = math.gcd(*numels)
    while common % size:
        drop, size = drop + 1, size + 1
        if size > common:
            raise ValueError(f"no group size fits layers of {sorted(set(numels))[:6]} entries")
    return drop, size


@torch.no_grad()
def shrink(weight: Tensor, chosen: Tensor, alpha: float) -> None:
    """Multiply the chosen entries by `alpha` in place; 0 zeroes them, 1 leaves them as they are."""
    if alpha != 1:
        weight.copy_(torch.where(chosen, weight * alpha, weight))
