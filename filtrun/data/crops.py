"""Training crops of tiles: a random place, mirrored and turned, for a whole batch at once on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from filtrun.errors import UserError


@dataclass(frozen=True)
class CropTurn:
    """(N, C, H, W) -> (N, C, crop, crop): each image at its own random place, one of its eight orientations.

    Every draw is from torch's global generator of the device. Stacked inputs and targets stay aligned, as all channels
    share the draw.

    Attributes:
        crop: side of the result; 0 keeps the whole tile (which must then be square if it is turned).
        multiple: crops begin at multiples of this (the scale of super-resolution pairs).
        flip, rotate: mirror left to right; also turn by multiples of 90 degrees.
    """

    crop: int = 0
    multiple: int = 1
    flip: bool = True
    rotate: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        high, wide = (self.crop or h), (self.crop or w)
        if high > h or wide > w:
            raise UserError(
                f"training crops need tiles of {self.crop} pixels, but data.patch gives {h}x{w}; enlarge it"
            )
        steps = (h - high) // self.multiple + 1, (w - wide) // self.multiple + 1
        top, left = (torch.randint(0, s, (n, 1), device=x.device) * self.multiple for s in steps)
        rows, columns = torch.arange(high, device=x.device), torch.arange(wide, device=x.device)
        rows, columns = rows.expand(n, high), columns.expand(n, wide)
        if self.flip:
            columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, wide - 1 - columns, columns)
        if self.rotate:
            # half turn or not, then transposed or not: with the mirror these are all eight orientations
            half = torch.rand(n, 1, device=x.device) < 0.5
            rows, columns = torch.where(half, high - 1 - rows, rows), torch.where(half, wide - 1 - columns, columns)
        flat = ((rows + top)[:, :, None] * w + (columns + left)[:, None, :]).reshape(n, 1, -1).expand(n, c, -1)
        out = x.reshape(n, c, h * w).gather(2, flat).view(n, c, high, wide)
        if self.rotate:
            if self.flip:
                out = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, out.mT, out)
            else:  # a quarter turn keeps the handedness
                turned = out.mT.flip(-1)
                out = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, turned, out)
        return out
