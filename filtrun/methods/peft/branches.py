"""Bottleneck branches beside the parts of a model, put in by hooks so that no layer changes its name.

A branch reads what its block's MLP (or its convolution) reads and its output is added to what that gives. The branch
is a sub-module of the block or convolution and has no effect on it but through the hook, so other methods still find
the layers they look for. Hooks hold the branch itself: a deep copy of the model has hooks on its own copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.methods.peft.places import mlp_width

B = TypeVar("B", bound=nn.Module)


class Bottleneck(nn.Module):
    """``scale * up(dropout(act(down(x))))`` with optional layer norm at its input or output.

    Args:
        down, up: layers to the narrow width and back.
        act: activation between them, or None.
        scale: factor of the output; `learn_scale` trains it, starting at 1 (AdaptFormer code).
        norm: "none", "in" or "out".
        dropout: probability of dropping a narrow feature.
        width: features of the input, needed for the layer norm.
    """

    stream: Tensor | None

    def __init__(
        self, down: nn.Module, up: nn.Module, *, act: Callable[[Tensor], Tensor] | None = F.relu, scale: float = 0.1,
        learn_scale: bool = False, norm: str = "none", dropout: float = 0.0, width: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.down, self.up, self.act, self.dropout = down, up, act, dropout
        self.scale: float | Tensor = nn.Parameter(torch.ones(1)) if learn_scale else scale
        self.where = norm
        if norm != "none":
            self.norm = nn.LayerNorm(width)
        self.stream = None

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "in":
            x = self.norm(x)
        x = self.down(x)
        x = x if self.act is None else self.act(x)
        x = self.up(F.dropout(x, self.dropout, self.training)) * self.scale
        return self.norm(x) if self.where == "out" else x

    def behind(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The sum of the branch and the layer it stands next to."""
        return output + self(inputs[0])


def zero_start(down: nn.Module, up: nn.Module) -> None:
    """Start as LoRA does: `down` Kaiming-uniform (a = sqrt 5), `up` and all biases zero (AdaptFormer code)."""
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # type: ignore[arg-type]
    nn.init.zeros_(up.weight)  # type: ignore[arg-type]
    for layer in (down, up):
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


# -- beside the MLP of a transformer block -----------------------------------------------------------------------------
def _remember(branch: Any, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if branch.stream is None:  # norm2 comes first in a pre-norm block, the MLP in a post-norm one
        branch.stream = inputs[0]


def _add_to_block(branch: Any, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    x, branch.stream = branch.stream, None
    if isinstance(output, tuple):
        return (output[0] + branch(x).reshape(output[0].shape), *output[1:])
    return output + branch(x).reshape(output.shape)


def beside_mlp(block: nn.Module, make: Callable[[int], B], name: str = "adapter") -> B:
    """Put a branch next to a block's MLP: ``x + mlp(norm2(x)) + branch(x)``, x after the attention residual.

    `make` gets the width of the tokens and makes the branch (it must have an attribute `stream`). The sum is outside
    the block's own stochastic depth and layer scale, as in the official AdaptFormer.
    """
    branch = make(mlp_width(block))
    where: Tensor = next(block.parameters())
    branch.to(where.device).train(block.training)
    block.add_module(free_name(block, name), branch)
    for part in (block.norm2, block.mlp):
        part.register_forward_pre_hook(partial(_remember, branch))  # type: ignore[union-attr, operator]
    # ahead of what changes the row of tokens behind a block (prompts that leave): the sum needs the same tokens
    block.register_forward_hook(partial(_add_to_block, branch), prepend=True)
    return branch


# -- beside one layer --------------------------------------------------------------------------------------------------
def stay_behind(layer: nn.Module, part: Any, name: str = "adapter") -> Any:
    """Let ``part.behind(layer, inputs, output)`` change a layer's output for good; `part` becomes a child of the layer.

    It acts after whatever is folded into the layer at the end (see ``filtrun.surgery.put_behind``).
    """
    where: Tensor = next(layer.parameters())
    part.to(where.device).train(layer.training)
    layer.add_module(free_name(layer, name), part)
    layer.register_forward_hook(part.behind)
    return part


def leave(layer: nn.Module, part: nn.Module) -> None:
    """Undo `stay_behind`."""
    for key, hook in list(layer._forward_hooks.items()):
        if hook == part.behind:
            del layer._forward_hooks[key]
    for name, child in list(layer.named_children()):
        if child is part:
            del layer._modules[name]


def free_name(module: nn.Module, name: str) -> str:
    """`name`, or `name` with a number behind it, that is no attribute of the module yet."""
    taken = [name] + [f"{name}{i}" for i in range(2, 99)]
    return next(n for n in taken if not hasattr(module, n))


def on_rows(output: Tensor, start: int, stop: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`output` (..., C) with the features from `start` to `stop` replaced by ``change(them)``."""
    if start == 0 and stop == output.shape[-1]:
        return change(output)
    return torch.cat([output[..., :start], change(output[..., start:stop]), output[..., stop:]], dim=-1)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero a whole sample with probability `rate`, scale the others by 1 / (1 - rate)."""
    if not rate or not training:
        return x
    keep = torch.empty(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * keep / (1 - rate)
