"""Gradient checkpointing: the blocks of a network keep their inputs and compute the rest again in the backward pass.

Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174; done by
``torch.utils.checkpoint`` without re-entrance, which restores the generators, so that dropout draws the same again.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import is_grad_enabled, nn

from filtrun.errors import UserError


def recompute_blocks(model: nn.Module) -> int:
    """Let each block of `model` recompute its activations, in place; returns how many do.

    Blocks are the outermost modules whose class occurs at least twice and which hold at least two layers with
    parameters: residual blocks, transformer layers. Outputs and gradients stay what they are, and batch norms count a
    batch once. Layers that keep a count of their own calls see every call twice.

    Raises:
        UserError: a network without such blocks.
    """
    blocks = list(_blocks(model, Counter(type(m) for m in model.modules())))
    if not blocks:
        raise UserError(
            f"trainer.checkpoint_activations=true needs a network of repeated blocks; {type(model).__name__} has none"
        )
    for block in blocks:
        if not isinstance(block.forward, _Recomputed):
            block.forward = _Recomputed(block)  # type: ignore[method-assign, assignment]
    return len(blocks)


def _blocks(module: nn.Module, classes: Counter[type]) -> Iterator[nn.Module]:
    for child in module.children():
        plain = type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        if not plain and classes[type(child)] > 1 and _layers(child) > 1:
            yield child
        else:
            yield from _blocks(child, classes)


def _layers(module: nn.Module) -> int:
    """Modules inside that have parameters of their own."""
    return sum(1 for m in module.modules() if m is not module and next(m.parameters(recurse=False), None) is not None)


class _Recomputed:
    """A block's forward; called where gradients are on, it keeps its arguments only."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.forward = block, block.forward

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not is_grad_enabled():
            return self.forward(*args, **options)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=self._contexts, **options)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), _statistics_left_alone(self.block)


@contextmanager
def _statistics_left_alone(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch as before, and do not count it once more."""
    norms = [
        m for m in block.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
    ]  # fmt: skip
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None  # adds nothing of the batch to the running statistics
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
