"""Which channels MaskSparsity keeps, from batch norm scales: thresholds, the guard, the vote of coupled layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from filtrun.methods.pruning.channel_groups import Group, Part

SMALLEST = 1e-18
"""Scales count as at least this in the energy threshold, as in the official code."""


def energy_threshold(scales: Tensor, p: float = 1e-4) -> float:
    """The threshold below which a layer's smallest scales hold about the share `p` of its energy (sum of squares).

    The scales (C,) in ascending order: half-way between the one whose square takes the running share over `p` and the
    one before it. 0 when that is the first already; 1 when all scales are below 1e-3, so that everything goes.
    """
    ordered = scales.detach().double().cpu().abs().clamp(min=SMALLEST).sort().values
    if ordered[-1] < 1e-3:
        return 1.0
    share = ordered.square().cumsum(0) / ordered.square().sum()
    first = int((share > p).nonzero()[0])
    return float((ordered[first - 1] + ordered[first]) / 2) if first else 0.0


def keep_of(scales: Tensor, threshold: float) -> Tensor:
    """Keep (bool, (C,)) the channels with scale above `threshold`, at least one.

    When none is, the largest stays; when several are largest, channel 0 does (the official guard).
    """
    keep = scales > threshold
    if not keep.any():
        keep = scales >= scales.max()
        if int(keep.sum()) != 1:
            keep = torch.zeros_like(keep)
            keep[0] = True
    return keep


def vote(keeps: Sequence[Tensor]) -> Tensor:
    """One keep vector for batch norms whose outputs are summed.

    Each would remove some channels; the group removes at least as many as the most modest of them, the channels most of
    them agree on: those of all, else of all but one, and so on down.
    """
    votes = torch.stack([~keep for keep in keeps]).sum(0)
    modest = min(int((~keep).sum()) for keep in keeps)
    needed = next(n for n in range(len(keeps), 0, -1) if int((votes >= n).sum()) >= modest or n == 1)
    return votes < needed


def group_keep(group: Group, thresholds: Sequence[float]) -> Tensor:
    """Keep vector (size,) of a group, with one threshold for each of its norms that has a say (`voters`).

    Norms behind a depthwise convolution inherit. Where a vote would leave no channel, which the official code allows,
    the one with the largest sum of scales stays.
    """
    scales = [group.scales(part) for part in voters(group)]
    keep = vote([keep_of(s, t) for s, t in zip(scales, thresholds, strict=True)])
    if not keep.any():
        keep[int(torch.stack(scales).sum(0).argmax())] = True
    return keep


def mean_scales(groups: Sequence[Group], keeps: Sequence[Tensor], suffix: str = "") -> dict[str, float]:
    """``kept_scale`` and ``doomed_scale``: the mean |gamma| of the channels that stay and of those that go."""
    rows = [(g.scales(part), keep) for g, keep in zip(groups, keeps, strict=True) for part in voters(g)]
    if not rows:
        return {}
    scales, keep = torch.cat([s for s, _ in rows]), torch.cat([k for _, k in rows])
    named = {"kept_scale": scales[keep], "doomed_scale": scales[~keep]}
    return {f"{name}{suffix}": values.mean().item() for name, values in named.items() if len(values)}


def voters(group: Group) -> list[Part]:
    """The batch norms that decide for a group: those not behind a depthwise convolution, or all where none is."""
    own = [part for part in group.norms if not part.inherits]
    return own or group.norms
