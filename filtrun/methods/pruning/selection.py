"""Which channels go, from their scores: a share of all, of each group, a number, or enough to save multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from filtrun.methods.pruning.slim import Channels


def select(
    scores: Sequence[Tensor], ratio: float, scope: str = "global", least: int | Sequence[int] = 1
) -> list[Tensor]:
    """The channels (int64, ascending) of each group to remove, the lowest scores first.

    Args:
        scores: (size,) for each group, higher = keep.
        ratio: share of all channels (global), or of each group's (local), to remove: int(ratio n), ties by order.
        scope: global or local.
        least: channels that stay in every group, or in each one, whatever their scores.
    """
    sizes = [len(s) for s in scores]
    return select_counts(
        scores, [int(ratio * n) for n in sizes] if scope == "local" else int(ratio * sum(sizes)), least
    )


def select_counts(
    scores: Sequence[Tensor], counts: int | Sequence[int], least: int | Sequence[int] = 1
) -> list[Tensor]:
    """As `select`, with the number of channels to remove: of all together, or of each group."""
    if isinstance(counts, int):
        owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
        chosen = owner[torch.cat(list(scores)).argsort(stable=True)[:counts]]
        counts = [int((chosen == i).sum()) for i in range(len(scores))]
    stay = [least] * len(scores) if isinstance(least, int) else least
    result = []
    for s, count, low in zip(scores, counts, stay, strict=True):
        room = max(0, len(s) - max(1, low))
        result.append(s.argsort(stable=True)[: min(count, room)].sort().values)
    return result


def select_macs(
    channels: Channels, scores: Sequence[Tensor], target: float, dense: Mapping[str, float], **options: Any
) -> list[Tensor]:
    """The smallest selection whose removal leaves at most the share 1 - `target` of the multiply-adds.

    Found by bisection over the ratio of channels; the largest possible one when the target cannot be met.
    """
    goal = (1 - target) * sum(dense.values())
    total = sum(len(s) for s in scores)
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        drop = select(scores, middle / max(total, 1) + 1e-9, **options)
        if channels.macs(drop, dense) <= goal:
            high = middle
        else:
            low = middle + 1
    return select(scores, min(1.0, low / max(total, 1) + 1e-9), **options)
