"""N:M sparsity: masks of the N largest of every M weights, weights seen through them, and how they tighten over time.

Facts from "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers" (arXiv 2402.04744; official code
abhibambhaniya/progressive_gradient_flow_nm_sparsity, ``timm/sparse_pruning/sparse_functions.py``, read with its
mis-indented return put right) and SR-STE (Zhou et al., ICLR 2021, arXiv 2102.04010).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

Pattern = tuple[int, int]
"""(N, M): N weights of every M are kept."""

DENSE: Pattern = (1, 1)


def grouped_axis(shape: torch.Size, axis: str) -> int:
    """Length of the axis that is cut into groups of M: inputs (``row``) or outputs (``column``) of a weight."""
    return shape[1] if axis == "row" else shape[0]


def nm_mask(weight: Tensor, n: int, m: int, axis: str = "row") -> Tensor:
    """Keep mask (bool, shape of the weight) of the `n` largest magnitudes in every group of `m`.

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).
        axis: ``row``: a group is `m` inputs in a row, of one kernel position; ``column``: `m` outputs in a row.

    Of equal magnitudes the later one stays.

    Raises:
        ValueError: the grouped axis is no multiple of `m`.
    """
    size = grouped_axis(weight.shape, axis)
    if size % m:
        raise ValueError(f"the {axis} axis of length {size} is no multiple of {m}")
    moved = weight.detach().movedim(1 if axis == "row" else 0, -1)
    groups = moved.abs().reshape(-1, m)
    lowest = groups.argsort(dim=1, stable=True)[:, : m - n]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False)
    return keep.view(moved.shape).movedim(-1, 1 if axis == "row" else 0).contiguous()


def top_mask(weight: Tensor, density: float) -> Tensor:
    """Keep mask (bool) of the largest magnitudes of a whole tensor: the unstructured control."""
    kept = math.floor(density * weight.numel() + 1e-6)
    order = weight.detach().abs().flatten().argsort(stable=True)
    keep = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    return keep.index_fill_(0, order[weight.numel() - kept :], True).view(weight.shape)


class Through(torch.autograd.Function):
    """W (m + (1 - m) d) with the gradient passed straight to W, plus SR-STE's pull c (1 - m) W where c is not 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: Tensor, pull: float) -> Tensor:
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, weight * decay)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        if ctx.pull:
            weight, mask = ctx.saved_tensors
            grad = grad + ctx.pull * weight.masked_fill(mask, 0)
        return grad, None, None, None


class NMWeight(nn.Module):
    """Parametrisation of one weight: what the layer sees instead of it, the mask taken anew in every forward pass.

    Attributes:
        pattern: (N, M) now; (1, 1) is dense.
        decay: what pruned weights are multiplied by now, a scalar tensor; 1 is dense, 0 a binary mask.
        pull: SR-STE's coefficient.
    """

    decay: Tensor

    def __init__(self, pattern: Pattern, axis: str, structured: bool = True, pull: float = 0.0) -> None:
        super().__init__()
        self.pattern, self.axis, self.structured, self.pull = pattern, axis, structured, pull
        self.register_buffer("decay", torch.ones(()), persistent=False)

    def mask(self, weight: Tensor) -> Tensor:
        """The keep mask of `weight` under the pattern of now."""
        n, m = self.pattern
        return nm_mask(weight, n, m, self.axis) if self.structured else top_mask(weight, n / m)

    def forward(self, weight: Tensor) -> Tensor:
        if self.pattern[0] == self.pattern[1]:
            return weight
        return Through.apply(weight, self.mask(weight), self.decay.to(weight.dtype), self.pull)


def decay_at(recipe: str, rate: float, t: int) -> float:
    """d_t of mask decay, `t` updates after sparsification began: max(0, 1 - c t), exp(-c t), or 0."""
    if recipe == "mdgf_linear":
        return max(0.0, 1.0 - rate * t)
    return math.exp(-rate * t) if recipe == "mdgf_exp" else 0.0


def patterns(recipe: str, n: int, m: int) -> list[Pattern]:
    """The patterns a run goes through, in equal frames.

    ``sdgf_stepwise``: M-1:M, M/2:M, M/4:M ... N:M, floor(log2(M / N)) + 1 frames; ``sdgf_geometric``: 8N:8M, 4N:4M,
    2N:2M, N:M; ``sdgf_densify``: N:8M, N:4M, N:2M, N:M; all others N:M alone.
    """
    if recipe == "sdgf_stepwise":
        frames = int(math.log2(m / n)) + 1
        found = [(m - 1, m), *((m >> i, m) for i in range(1, frames))]
        return [*found[:-1], (n, m)] if frames > 1 else [(n, m)]
    if recipe == "sdgf_geometric":
        return [(k * n, k * m) for k in (8, 4, 2, 1)]
    if recipe == "sdgf_densify":
        return [(n, k * m) for k in (8, 4, 2, 1)]
    return [(n, m)]


def frame_at(t: int, span: int, frames: int) -> int:
    """Which of `frames` patterns rules at update `t` of `span`: number i begins at floor(i span / frames)."""
    return sum(i * span // frames <= t for i in range(frames)) - 1
