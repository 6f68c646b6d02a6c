"""Restoration U-Net that may be shown which pixels are missing: a backbone for mask-inpaint-denoise training.

The paper (MID, arXiv 2503.21377) trains a restoration network of the U-Net kind; its exact layers are not public, so
this is a plain one after Ronneberger et al. 2015 (arXiv 1505.04597), without normalisation.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError


class MaskedUNet(nn.Module):
    """``forward(x, mask=None)`` for images of any size; 436,931 parameters with the defaults for RGB.

    Args:
        in_channels: image channels C.
        width: channels at full resolution; doubled at each level.
        levels: resolutions, each half the one before.
        mask_channel: show the mask to the network as one more channel.

    Raises:
        UserError: a value outside what is said above.
    """

    def __init__(self, in_channels: int = 3, width: int = 32, levels: int = 3, mask_channel: bool = True) -> None:
        super().__init__()
        for key, value in (("width", width), ("levels", levels)):
            if value < 1:
                raise UserError(f"model.{key}={value} is out of range; allowed is [1, inf]")
        self.in_channels, self.levels, self.mask_channel = in_channels, levels, mask_channel
        sizes = [width * 2**level for level in range(levels)]
        first = in_channels + (1 if mask_channel else 0)
        self.down = nn.ModuleList([_pair(before, size) for before, size in zip([first, *sizes], sizes, strict=False)])
        self.grow = nn.ModuleList([nn.Conv2d(2 * size, size, 1) for size in reversed(sizes[:-1])])
        self.up = nn.ModuleList([_pair(2 * size, size) for size in reversed(sizes[:-1])])
        self.out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Restore x (N, C, H, W) in [0, 1]; `mask` (N, 1 or C, H, W) is 1 where a pixel is missing, None: nowhere.

        What x holds where the mask is 1 does not matter.
        """
        height, width = x.shape[-2:]
        if mask is not None:
            x = x * (1 - mask)
        if self.mask_channel:
            seen = x.new_zeros(len(x), 1, height, width) if mask is None else mask.mean(1, keepdim=True).to(x.dtype)
            x = torch.cat([x, seen.expand(len(x), 1, height, width)], dim=1)
        multiple = 2 ** (self.levels - 1)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        handed: list[Tensor] = []
        for level, stack in enumerate(self.down):
            x = stack(F.avg_pool2d(x, 2) if level else x)
            handed.append(x)
        handed.pop()
        for grow, stack in zip(self.grow, self.up, strict=True):
            x = grow(F.interpolate(x, scale_factor=2, mode="bilinear"))
            x = stack(torch.cat([x, handed.pop()], dim=1))
        return cast(Tensor, self.out(x))[..., :height, :width]


def _pair(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.LeakyReLU(0.1),
    )  # fmt: skip
