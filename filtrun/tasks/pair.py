"""What a restoration model is given and should give back, and how it is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from filtrun.data.split import Batch


@dataclass
class Pair(Batch):
    """What a restoration model is given and what it should give back.

    Attributes:
        x: input (N, C, H, W), as the model takes it.
        y: target (N, C', r * H, r * W) in the model's colour space.
        mask: (N, 1, H, W), 1 = hole, for inpainting.
        sigma: (N,) standard deviation of the noise on the scale of x, for denoising.
        colour: the input in RGB where the model sees its luma only.
    """

    mask: Tensor | None = None
    sigma: Tensor | None = None
    colour: Tensor | None = None


def pair(x: Tensor, y: Tensor, **more: Tensor | None) -> Pair:
    """A pair whose `index` is filled in later."""
    return Pair(x, y, torch.zeros(0, dtype=torch.long), **more)


def result(output: Any) -> Tensor:
    """The image in what a model returns: the tensor itself, a tuple's last entry, a dict's "output"."""
    if isinstance(output, dict):
        return output["output"]
    return output[-1] if isinstance(output, (tuple, list)) else output


def conditions(model: nn.Module, made: Pair) -> list[str]:
    """Which of `mask` and `sigma` the model's forward takes and the pair has."""
    return [name for name in _accepted(type(model).forward) if getattr(made, name) is not None]


@functools.cache
def _accepted(forward: Callable[..., Any]) -> tuple[str, ...]:
    accepted = inspect.signature(forward).parameters
    return tuple(name for name in ("mask", "sigma") if name in accepted)
