"""Random crop, mirror, colour jitter and cutout for a whole batch at once, on the batch's device."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from filtrun.data.colour import jitter
from filtrun.errors import UserError
from filtrun.options import check_options, opt


@dataclass(repr=False)
class Augment:
    """Training augmentation of float images (N, C, H, W) in [0, 1]; off by default, then it returns its input.

    Each image gets its own draw, all of them from torch's global generator of the batch's device, in the order crop,
    flip, colours, cutout; an option that is off draws nothing. (The order of the four colour changes is drawn for a
    batch, from the CPU's generator.)

    Raises:
        UserError: an option out of range, or a `crop_pad` that reflection cannot fill (not below the image's side).
    """

    crop_pad: int = opt(0, "pad every side by this many pixels, then crop back at a random place", low=0)
    flip: bool = opt(False, "mirror left to right with probability 1/2")
    cutout: int = opt(0, "side of a square that is painted over, centred anywhere, cut at the border", low=0)
    padding: str = opt("reflect", "what crop_pad adds", choices=("reflect", "zero"))
    cutout_fill: float = opt(0.5, "value painted by cutout (about the mean of photos)", low=0.0, high=1.0)
    alternate: bool = opt(False, "mirror a random half in the first epoch, the other half in the next, and so on")
    brightness: float = opt(0.0, "factor uniform in 1 +- this", low=0.0)
    contrast: float = opt(0.0, "factor uniform in 1 +- this", low=0.0)
    saturation: float = opt(0.0, "factor uniform in 1 +- this", low=0.0)
    hue: float = opt(0.0, "turned by up to this part of a circle", low=0.0, high=0.5)

    def __post_init__(self) -> None:
        check_options(self, "augment")

    def __repr__(self) -> str:
        """Its options; those that came later only where they are set, since keys of cached work are made of it."""
        first = ("crop_pad", "flip", "cutout", "padding", "cutout_fill")
        told = [f for f in fields(self) if f.name in first or getattr(self, f.name) != f.default]
        return f"Augment({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in told)})"

    def __bool__(self) -> bool:
        return bool(self.crop_pad or self.flip or self.cutout or self.coloured)

    @property
    def coloured(self) -> bool:
        """Whether colours change."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    def __call__(self, x: Tensor, index: Tensor | None = None, epoch: int = 0, seed: int = 0) -> Tensor:
        """float (N, C, H, W) -> the same shape and range; the input is left as it is.

        With `alternate`, which images are mirrored depends on their `index` (N,), the `epoch` and `seed` alone.
        """
        mirrored = None
        if self.flip and self.alternate:
            if index is None:
                raise ValueError("alternating flips need the index of each image")
            mirrored = alternating(index, epoch, seed)
        if self.crop_pad or self.flip:
            x = crop_and_flip(x, self.crop_pad, self.flip, self.padding, mirrored)
        if self.coloured:
            x = jitter(x, self.brightness, self.contrast, self.saturation, self.hue)
        if self.cutout:
            x = cut_out(x, self.cutout, self.cutout_fill)
        return x


def alternating(index: Tensor, epoch: int, seed: int) -> Tensor:
    """Which images to mirror, bool (N,): a random half of all in epoch 0, in each next epoch those it was not.

    So two epochs in a row show every image both ways. The half is a hash of `index`, int64 (N,), and `seed`.

    Source: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, section 3.6.
    """
    # splitmix64, whose products may overflow; its shifts are of unsigned numbers
    mixed = index + signed(0x9E3779B97F4A7C15 * (seed + 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return ((mixed >> 31) + epoch) % 2 == 1


def signed(number: int) -> int:
    """The lowest 64 bits as a signed number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def crop_and_flip(x: Tensor, pad: int, flip: bool, padding: str = "reflect", mirrored: Tensor | None = None) -> Tensor:
    """Pad by `pad`, crop to the old size at a random offset in 0..2*pad, mirror half of the images.

    `mirrored`, bool (N,), says which; None: drawn.

    One gather does all three: the padded image is never made, padding is arithmetic on the source coordinates.
    """
    n, c, h, w = x.shape
    if padding == "reflect" and pad >= min(h, w):
        raise UserError(f"crop_pad={pad} needs images larger than {pad} pixels; these have {h}x{w}")
    rows, cols = (torch.arange(side, device=x.device).expand(n, side) for side in (h, w))
    if pad:
        rows = rows + torch.randint(-pad, pad + 1, (n, 1), device=x.device)
        shift = torch.randint(-pad, pad + 1, (n, 1), device=x.device)
    if flip:  # mirror within the crop window, so before the shift
        mirrored = torch.rand(n, 1, device=x.device) < 0.5 if mirrored is None else mirrored[:, None]
        cols = torch.where(mirrored, w - 1 - cols, cols)
    if pad:
        cols = cols + shift
    inside = None
    if pad and padding == "zero":
        inside = ((rows >= 0) & (rows < h))[:, :, None] & ((cols >= 0) & (cols < w))[:, None, :]
        rows, cols = rows.clamp(0, h - 1), cols.clamp(0, w - 1)
    elif pad:
        rows, cols = _reflect(rows, h), _reflect(cols, w)
    flat = (rows[:, :, None] * w + cols[:, None, :]).reshape(n, 1, h * w).expand(n, c, h * w)
    out = x.reshape(n, c, h * w).gather(2, flat).view(n, c, h, w)
    return out if inside is None else out * inside[:, None]


def _reflect(i: Tensor, side: int) -> Tensor:
    """Coordinates outside 0..side-1 mirrored at the border pixel, which is not repeated."""
    return (side - 1) - ((side - 1) - i.abs()).abs()


def cut_out(x: Tensor, side: int, fill: float) -> Tensor:
    """Paint a `side` x `side` square, centred on a random pixel and cut at the border, with `fill`.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
    arXiv:1708.04552, section 3. They paint after normalisation with 0, the mean; `fill` is on the scale of x.
    """
    n, _, h, w = x.shape
    top = torch.randint(0, h, (n, 1), device=x.device) - side // 2
    left = torch.randint(0, w, (n, 1), device=x.device) - side // 2
    i, j = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    hit = ((i >= top) & (i < top + side))[:, :, None] & ((j >= left) & (j < left + side))[:, None, :]
    return x.masked_fill(hit[:, None], fill)
