"""Colour jitter of a whole batch at once, on the batch's device: brightness, contrast, saturation and hue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from filtrun.errors import UserError

_GREY = (0.2989, 0.587, 0.114)
_BLOCK = 64
"""Images worked on together on a CPU: what a block of small images needs stays in the processor's cache."""


def jitter(x: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Change the colours of each image by factors of its own.

    The factors of brightness, contrast and saturation are uniform in [max(0, 1 - v), 1 + v], the turn of the hue in
    [-v, v] of a full circle, as in torchvision's ``ColorJitter``; the four come in a random order, which the images
    of a batch share (torchvision draws it for each image). An option that is 0 draws nothing.

    Args:
        x: float (N, C, H, W) in [0, 1]; it is left as it is.
        brightness, contrast, saturation: not negative.
        hue: in [0, 0.5].

    Raises:
        UserError: saturation or hue for images that are not RGB.
    """
    n, channels = x.shape[:2]
    if (saturation or hue) and channels != 3:
        name, value = ("saturation", saturation) if saturation else ("hue", hue)
        raise UserError(f"augment.{name}={value} needs RGB images; these have {channels} channel(s)")
    steps: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = []
    changes = (adjust_brightness, adjust_contrast, adjust_saturation)
    for change, amount in zip(changes, (brightness, contrast, saturation), strict=True):
        if amount:
            low = max(0.0, 1 - amount)
            steps.append((change, low + (1 + amount - low) * torch.rand(n, device=x.device)))
    if hue:
        steps.append((adjust_hue, hue * (2 * torch.rand(n, device=x.device) - 1)))
    # the order is needed by Python: from the CPU's generator, so that no device is waited for
    steps = [steps[i] for i in torch.randperm(len(steps)).tolist()]
    size = _BLOCK if x.device.type == "cpu" else max(1, n)
    blocks = list(x.split(size))
    for step, factors in steps:
        blocks = [step(block, part) for block, part in zip(blocks, factors.split(size), strict=True)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _each(factors: Tensor) -> Tensor:
    return factors.view(-1, 1, 1, 1)


def grey(x: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of RGB images by ITU-R BT.601; grey images as they are."""
    if x.shape[1] != 3:
        return x
    r, g, b = x.unbind(1)
    return (_GREY[0] * r + _GREY[1] * g + _GREY[2] * b)[:, None]


def adjust_brightness(x: Tensor, factors: Tensor) -> Tensor:
    """Each image (C, H, W) of `x` times its factor (N,), clamped to [0, 1]."""
    return (x * _each(factors)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factors: Tensor) -> Tensor:
    """Each image's distance from its mean luma times its factor (N,), clamped to [0, 1]."""
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(x), x, _each(factors).expand_as(x)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factors: Tensor) -> Tensor:
    """Each pixel's distance from its luma times its image's factor (N,), clamped to [0, 1]."""
    luma = grey(x)
    return (x - luma).mul_(_each(factors)).add_(luma).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB images in [0, 1] by a part (N,) of a full circle, in HSV, saturation and value kept."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    divisor = torch.where(chroma > 0, chroma, 1)
    red, green, blue = (g - b) / divisor, 2 + (b - r) / divisor, 4 + (r - g) / divisor
    sixth = torch.where(value == r, red, torch.where(value == g, green, blue))
    sixth += 6 * turns.view(-1, 1, 1)
    out = torch.empty_like(x)
    # the channel k sixths away from the hue has value - chroma * clamp(min(k, 4 - k), 0, 1)
    for channel, offset in enumerate((5, 3, 1)):
        away = torch.remainder(sixth + offset, 6)
        out[:, channel] = value - chroma * torch.minimum(away, 4 - away).clamp_(0, 1)
    return out
