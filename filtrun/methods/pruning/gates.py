"""The parts of Fire Together Wire Together (arXiv 2110.08232, selkerdawy/FTWT ``utils/layers.py``): which filters fire
for a sample, a small module that guesses it from the layer's input, the loss that teaches it, and the operations left.

Masks are (N, C, 1, 1) floats of 0 and 1 or (N, C) bool, 1 = the filter is kept for that sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.errors import UserError

DELTA = 1e-5


def peaks(output: Tensor) -> Tensor:
    """How strongly each filter fires: the largest magnitude of its map. (N, C, H, W) -> (N, C)."""
    return output.detach().float().abs().amax(dim=(2, 3))


def mass_target(output: Tensor, r: float) -> Tensor:
    """Mask (N, C, 1, 1) of the strongest filters that together hold a share `r` of a sample's sum of peaks.

    The filter whose share makes the sum exceed `r` goes, so that all go where one holds more than `r`. At ``r = 1``
    only the filters with next to no share go, at ``r < 0`` none. A sample without any activation keeps all, as in the
    official code (its shares are 0/0).
    """
    strength = peaks(output)
    keep = torch.ones_like(strength)
    if r >= 0:
        share = strength / strength.sum(1, keepdim=True)
        if r == 1:
            keep = (~(share <= DELTA)).float()
        else:
            ordered, order = share.sort(dim=1, descending=True)
            keep = torch.zeros_like(strength).scatter_(1, order, (~(ordered.cumsum(1) - r > DELTA)).float())
    return keep[:, :, None, None]


def uniform_target(output: Tensor, ratio: float) -> Tensor:
    """Mask (N, C, 1, 1) without each sample's ``floor(ratio * C)`` weakest filters and without those that are dead.

    `ratio` in [0, 1] is the share that goes; below 0 all stay.
    """
    strength = peaks(output)
    keep = torch.ones_like(strength)
    if ratio >= 0:
        keep = (strength > DELTA).float()
        keep.scatter_(1, strength.sort(dim=1).indices[:, : int(ratio * strength.shape[1])], 0.0)
    return keep[:, :, None, None]


TARGETS: dict[str, Callable[[Tensor, float], Tensor]] = {"mass": mass_target, "uniform": uniform_target}


class MaskPredictor(nn.Module):
    """``Conv1x1(softmax(pool(x)))``: (N, in_channels, H, W) -> logits (N, out_channels, 1, 1).

    Args:
        pool: ``avg``, as the released code does, or ``max``, as the paper draws it.
        embedding: -1 pools to one pixel; else to the side that gives about this many inputs, flattened.
        softmax: over the pooled inputs, before the convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pool: str = "avg", embedding: int = -1, softmax: bool = True
    ) -> None:
        super().__init__()
        self.side = 1 if embedding < 0 else max(1, round(math.sqrt(embedding / in_channels)))
        self.pool, self.softmax = pool, softmax
        self.head = nn.Conv2d(self.side**2 * in_channels, out_channels, 1)

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolution for one sample."""
        return self.head.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        pooled = (F.adaptive_avg_pool2d if self.pool == "avg" else F.adaptive_max_pool2d)(x, self.side).flatten(1)
        return self.head((pooled.softmax(1) if self.softmax else pooled)[:, :, None, None])


def binary_gate(logits: Tensor) -> Tensor:
    """1 where sigmoid(logits) > 0.5, else 0; without a gradient."""
    return (logits.detach().float().sigmoid() > 0.5).float()


def mask_loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the sum over filters of the mean over samples of the binary cross-entropy."""
    losses = [
        F.binary_cross_entropy_with_logits(z.float(), t.view_as(z), reduction="none").mean(0).sum()
        for z, t in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).mean()


def mask_weight(now: float, total: float, cooldown: float) -> float:
    """Weight of the mask loss at epoch (or step) `now` of `total`: 1 while ``now < cooldown * total``, then 0."""
    return 1.0 if now < cooldown * total else 0.0


def official_macs(kept: Tensor, previous: Tensor, positions: int, groups: int, kernel: int) -> Tensor:
    """Multiply-adds of a layer for each sample as the official counter has them, int64 (N,).

    `kept` and `previous` (N,) count the filters kept in this layer and in the gated layer before it; `kernel` is the
    kernel's area. A depthwise layer costs nothing by this rule unless the layer before keeps every filter.
    """
    return kept.long() * positions * (previous.long() // groups) * kernel


def executable_macs(keep: Tensor, inputs: Tensor, positions: int, groups: int, kernel: int) -> Tensor:
    """Multiply-adds of a layer that skips closed filters and input channels known to be zero, int64 (N,).

    `keep` (N, C) and `inputs` (N, Cin) bool. What a sum brings in on its other branch is not skipped.
    """
    out, into = (m.long().unflatten(1, (groups, -1)).sum(2) for m in (keep, inputs))
    return (out * into).sum(1) * positions * kernel


class _Gated(torch.autograd.Function):
    """``output * mask``; `logits` become part of the graph, so that DDP does not take the predictor for unused."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return output * mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
}  # fmt: skip
"""All are 0 at 0: to gate before them is to gate behind them."""


class Gate(nn.Module):
    """The gate of one layer: guesses from the convolution's input, then multiplies what comes out by 0 or 1.

    Attributes:
        state: ``gate``; ``open``: everything passes; ``observe``: everything passes, and `keep` is the target.
        logits, target, keep: of the last forward, (N, C, 1, 1).
        positions: pixels of the last output map.
    """

    def __init__(self, predictor: MaskPredictor, activation: str, kind: str, r: float, joint: bool) -> None:
        super().__init__()
        if kind not in TARGETS:
            raise UserError(f"gt_type={kind!r} is not known; choose from {', '.join(TARGETS)}")
        self.predictor, self.activation, self.kind, self.r, self.joint = predictor, activation, kind, r, joint
        self.state = "open" if r < 0 else "gate"
        self.logits: Tensor | None = None
        self.target: Tensor | None = None
        self.keep: Tensor | None = None
        self.positions = 0

    def look(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Hook before the convolution: predict."""
        self.logits = self.predictor(inputs[0] if self.joint else inputs[0].detach())

    def act(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Hook behind the normalisation or the block: make the target, then gate."""
        assert self.logits is not None
        with torch.no_grad():
            self.target = TARGETS[self.kind](ACTIVATIONS[self.activation](output), self.r)
        self.positions = output.shape[2] * output.shape[3]
        if self.state == "gate":
            self.keep = mask = binary_gate(self.logits)
        else:
            mask = torch.ones_like(self.target)
            self.keep = self.target if self.state == "observe" else mask
        return _Gated.apply(output, mask.to(output.dtype), self.logits)

    def forget(self) -> None:
        """Drop the tensors of the last forward."""
        self.logits = self.target = self.keep = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logits": None, "target": None, "keep": None}  # a copied model has seen nothing
