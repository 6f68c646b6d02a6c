"""One photograph, or several of a size, through a trained image-to-image model: channels, tiny sides, little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from filtrun.data.hdr import LUMA
from filtrun.degrade.bicubic import imresize
from filtrun.degrade.exposure import to_srgb
from filtrun.errors import UserError
from filtrun.photo.read import Photo
from filtrun.photo.write import quantise
from filtrun.tasks.image_to_image import ImageToImage
from filtrun.tasks.inpaint import Inpaint
from filtrun.tiles import pad_to, tiled

if TYPE_CHECKING:
    from filtrun.context import Run

TINY = 64
"""Sides up to this may be too small for a network; it is then given that many pixels."""
LONG = 1024
"""Images with a longer side are enlarged in tiles: the features of a network for all of it would fill the memory."""


def as_input(photo: Photo, *, display: bool) -> tuple[Tensor, float]:
    """((1, C, H, W) float32 for the model, the factor its output is multiplied by).

    Linear light goes to a model that makes images for a screen (`display`) as it is; for others it is divided by its
    largest value, if that is above 1.
    """
    height, width = photo.size
    made = np.empty((1, photo.pixels.shape[-1], height, width), np.float32)
    np.divide(photo.pixels.transpose(2, 0, 1)[None], np.float32(photo.peak), out=made, dtype=np.float32)
    x = torch.from_numpy(made)
    if photo.pixels.dtype != np.float32 or display:
        return x, 1.0
    scale = max(1.0, float(x.max()))
    return (x / scale).clamp(min=0), scale


@torch.no_grad()
def restored(run: Run, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the run's model makes of images (N, C, H, W), C = 1 or 3, as (N, C, r * H, r * W) in [0, 1] on the CPU.

    A model for RGB gets grey images as three equal channels and its output becomes grey again (BT.601); a model for
    grey images gets each colour channel as an image of its own.

    Raises:
        UserError: no memory for it even in tiles, or a result that is not finite.
    """
    n, channels = x.shape[:2]
    wanted = channels if getattr(run.task, "luma", False) else int(getattr(run.data, "channels", channels))
    x = x.to(run.device)
    mask = None if mask is None else mask.to(run.device)
    if wanted == 1 and channels == 3:
        x = x.reshape(n * 3, 1, *x.shape[-2:])
        mask = None if mask is None else mask.repeat_interleave(3, 0)
    elif wanted == 3 and channels == 1:
        x = x.expand(-1, 3, -1, -1)
    out = _enough_memory(run, x, mask)
    if channels == 3 and out.shape[1] == 1:
        out = out.reshape(n, 3, *out.shape[-2:])
    elif channels == 1 and out.shape[1] == 3:
        out = (out * torch.tensor(LUMA, device=out.device).view(3, 1, 1)).sum(1, keepdim=True)
    if not bool(torch.isfinite(out).all()):
        raise UserError("the model gives values that are not finite")
    return out.cpu()


def _enough_memory(run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
    """Whole, or in tiles if the memory does not suffice."""
    try:
        return _whole(run, x, mask)
    except (RuntimeError, MemoryError) as error:
        task: Any = run.task
        if not _no_memory(error):
            raise
        if not getattr(run.model, "tileable", True) or task.tile_above == 1 or min(x.shape[-2:]) < 1:
            raise UserError("there is not enough memory for it") from error
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    before, task.tile_above = task.tile_above, 1
    try:
        return _whole(run, x, mask)
    except (RuntimeError, MemoryError) as error:
        if not _no_memory(error):
            raise
        raise UserError("there is not enough memory for it, not even in tiles") from error
    finally:
        task.tile_above = before


def _no_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)


def _whole(run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
    height, width = x.shape[-2:]
    try:
        return _model(run, x, mask)
    except RuntimeError as error:
        if _no_memory(error) or min(height, width) >= TINY:
            raise
    bigger = [None if t is None else pad_to(t, 1, TINY) for t in (x, mask)]
    assert bigger[0] is not None
    ratio = int(getattr(run.task, "ratio", 1))
    return _model(run, bigger[0], bigger[1])[..., : height * ratio, : width * ratio]


def _model(run: Run, x: Tensor, mask: Tensor | None) -> Tensor:
    task = run.task
    assert isinstance(task, ImageToImage)
    if isinstance(task, Inpaint):
        assert mask is not None
        made = task.masked(x, mask)
        return task.colours(made, task.restore(run, made)).clamp(0, 1).float()
    if task.ratio > 1 and getattr(run.model, "tileable", True):
        multiple = int(getattr(run.model, "multiple", 1))
        return _enlarged(lambda piece: task.apply(run, piece), x, task.ratio, task.tile, task.overlap, multiple).float()
    return task.apply(run, x).float()


def _enlarged(
    network: Callable[[Tensor], Tensor], x: Tensor, ratio: int, tile: int = 512, overlap: int = 64, multiple: int = 1
) -> Tensor:
    """`network`, which makes images `ratio` times larger, on x (N, C, H, W); in tiles when a side is above `LONG`."""
    if max(x.shape[-2:]) <= LONG:
        return network(x)
    return tiled(network, x, tile=tile, overlap=overlap, ratio=ratio, multiple=multiple)


def as_output(
    photo: Photo, out: Tensor, scale: float, kind: np.dtype, *, display: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels, alpha) of type `kind` from the model's (C, r * H, r * W) in [0, 1] and the photograph's own alpha.

    Linear light that is written to whole numbers is clipped and coded as sRGB. Alpha grows bicubically.
    """
    linear = photo.pixels.dtype == np.float32 and not display
    if linear:
        out = out * scale if kind == np.float32 else to_srgb((out * scale).clamp(0, 1))
    pixels = quantise(out.permute(1, 2, 0).numpy(), kind)
    if photo.alpha is None:
        return pixels, None
    if photo.alpha.shape[:2] == pixels.shape[:2] and photo.alpha.dtype == kind:
        return pixels, photo.alpha
    alpha = torch.from_numpy(photo.alpha.astype(np.float32) / photo.peak).permute(2, 0, 1)[None]
    ratio = pixels.shape[0] // photo.size[0]
    if ratio > 1:
        alpha = imresize(alpha, ratio, 1).clamp(0, 1)
    return pixels, quantise(alpha[0].permute(1, 2, 0).numpy(), kind)
