"""A sparse weight update of high rank from two thin matrices: kernel, competition, and a backward that stores neither.

The mathematics of SNELL (NeurIPS 2024, arXiv 2411.01800; official code ssfgunner/SNELL, classes KLoRA and SNELL).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

from filtrun.constants import constant

RULES = ("code", "soft", "hard")
KERNELS = ("distance", "linear")
LARGEST_QUANTILE = 16_000_000
"""torch.quantile takes no more elements; up to there ranks are rounded as it rounds them."""
BLOCK = 1 << 18
"""Entries of an update that are computed at a time where memory counts."""


def signed_sum(parts: Tensor, scale: float) -> Tensor:
    """scale * (parts[0] - parts[1] + parts[2] - ...): (H, in, out) -> (in, out)."""
    signs = constant(tuple((-1.0) ** h for h in range(len(parts))), parts.dtype, parts.device)
    return torch.sum(scale * signs.view(-1, 1, 1) * parts, dim=0)


def distance_kernel(q_in: Tensor, q_out: Tensor, scale: float = 0.1) -> Tensor:
    """K_ij = scale * sum_h (-1)^h |q_in[h, i] - q_out[h, j]|, shape (in, out).

    Args:
        q_in: (H, in, r / H).
        q_out: (H, out, r / H).
    """
    return signed_sum(torch.cdist(q_in, q_out), scale)


def linear_kernel(q_in: Tensor, q_out: Tensor, scale: float = 0.1) -> Tensor:
    """K_ij = scale * sum_h (-1)^h <q_in[h, i], q_out[h, j]>, of rank r at most: the comparison without a kernel."""
    return signed_sum(q_in @ q_out.transpose(1, 2), scale)


def magnitude_quantile(magnitudes: Tensor, share: float) -> Tensor:
    """The value below which `share` of the entries lie, as torch.quantile gives it, for any number of entries.

    Selects instead of sorting, which is ten times faster on a CPU; there NumPy's selection, which needs a copy of the
    entries where torch's needs three.
    """
    flat = magnitudes.flatten()
    kind = torch.double if flat.numel() > LARGEST_QUANTILE else flat.dtype
    rank = (torch.tensor(share, dtype=kind) * (flat.numel() - 1)).clamp(0, flat.numel() - 1)
    low = int(rank.floor())
    weight = float(rank - low)
    if flat.device == torch.device("cpu") and flat.dtype in (torch.float32, torch.float64):
        places = [low] if weight == 0 else [low, low + 1]
        chosen = torch.from_numpy(numpy.partition(flat.detach().numpy(), places)[places])
        return chosen[0] if weight == 0 else torch.lerp(chosen[0], chosen[1], weight)
    below = flat.kthvalue(low + 1).values
    return below if weight == 0 else torch.lerp(below, flat.kthvalue(low + 2).values, weight)


def compete(kernel: Tensor, sparsity: float, rule: str = "code", threshold: Tensor | None = None) -> Tensor:
    """Keep the entries of a kernel whose magnitude is above the quantile `sparsity` of all; the others become zero.

    Args:
        kernel: (in, out).
        sparsity: s in [0, 1); 0 keeps the dense kernel as it is, as the official code does.
        rule: what survivors are: "code" K |K| with |K| constant for the gradient (official code), "soft"
            sign(K) (|K| - threshold) (the paper's competition), "hard" K.
        threshold: the quantile, if it is known already.
    """
    if sparsity == 0:
        return kernel
    size = kernel.detach().abs()
    limit = magnitude_quantile(size, sparsity) if threshold is None else threshold
    wins = size > limit
    if rule == "code":
        return kernel * torch.where(wins, size, 0)
    if rule == "soft":
        return torch.where(wins, kernel - kernel.detach().sign() * limit, 0)
    return torch.where(wins, kernel, 0)


class KernelUpdate(nn.Module):
    """The two thin matrices of one update, (in + out) * rank numbers, drawn as torch draws linear layers.

    Args:
        inputs, outputs: sides of the update.
        rank: r, a multiple of two: each half makes one distance.
        like: a tensor of the wanted type and device.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, sparsity: float, rule: str, kernel: str, scale: float,
                 like: Tensor) -> None:  # fmt: skip
        super().__init__()
        self.sparsity, self.rule, self.scale = sparsity, rule, scale
        self.kernel = distance_kernel if kernel == "distance" else linear_kernel
        self.q_in = nn.Parameter(like.new_empty(2, inputs, rank // 2))
        self.q_out = nn.Parameter(like.new_empty(2, outputs, rank // 2))
        for q in (self.q_in, self.q_out):
            nn.init.kaiming_uniform_(q, a=math.sqrt(5))

    def build(self, q_in: Tensor, q_out: Tensor, known: list[Tensor] | None = None) -> Tensor:
        """The update (in, out) from given matrices. `known` collects its threshold, or is one to use instead."""
        with torch.autocast(q_in.device.type, enabled=False):
            kernel = self.kernel(q_in, q_out, self.scale)
            if self.sparsity and known is not None and not known:
                known.append(magnitude_quantile(kernel.detach().abs(), self.sparsity))
            return compete(kernel, self.sparsity, self.rule, known[0] if known else None)

    def rows(self, q_in: Tensor, q_out: Tensor, known: list[Tensor]) -> list[Tensor]:
        """The transposed update (out, in) in blocks of rows that keep nothing for the backward pass.

        The same as ``build(q_in, q_out, known).T``, with the memory of a few blocks instead of ten updates.
        """
        pieces = [*q_out.split(max(1, BLOCK // q_in.shape[1]), dim=1)]

        def block(q_in: Tensor, piece: Tensor) -> Tensor:
            with torch.autocast(q_in.device.type, enabled=False):
                kernel = self.kernel(q_in, piece, self.scale)
                return compete(kernel, self.sparsity, self.rule, known[0] if known else None).T

        if self.sparsity and not known:
            known.append(self._threshold(q_in, pieces))
        return [recomputed(block, q_in, piece) for piece in pieces]

    @torch.no_grad()
    def _threshold(self, q_in: Tensor, pieces: list[Tensor]) -> Tensor:
        inputs = q_in.shape[1]
        sizes = q_in.new_empty(sum(piece.shape[1] for piece in pieces), inputs)
        with torch.autocast(q_in.device.type, enabled=False):
            for out, piece in zip(sizes.split([p.shape[1] for p in pieces]), pieces, strict=True):
                out.copy_(self.kernel(q_in, piece, self.scale).abs_().T)
        return magnitude_quantile(sizes, self.sparsity)

    def forward(self) -> Tensor:
        return self.build(self.q_in, self.q_out)


class _Recomputed(torch.autograd.Function):
    """``function(*tensors)``, of which only `tensors` are kept; what lies between is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        ctx.function = function
        kind = next(t for t in tensors if t is not None).device.type
        ctx.cast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind),
                    "dtype": torch.get_autocast_dtype(kind)}  # fmt: skip
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        inputs = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        with torch.enable_grad(), torch.autocast(**ctx.cast):
            output = ctx.function(*inputs)
        found = iter(torch.autograd.grad(output, cast(list[Tensor], wanted), grads[0]))
        return None, *(next(found) if need else None for need in needs)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``function(*tensors)`` with the same gradients, keeping nothing but `tensors` for the backward pass.

    `function` must give the same result both times: random draws come in as tensors.
    """
    return cast(Tensor, _Recomputed.apply(function, *tensors))
