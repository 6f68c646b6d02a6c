"""TIFF files of 16 bits or float values, which Pillow cuts down to 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from filtrun.errors import UserError

ORIENTATION = 274


def read_wide_tiff(path: Path, page: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels (H, W, 1 or 3), alpha (H, W, 1) or None), uint16 or float32, of a page opened with tifffile.

    Raises:
        UserError: pixels of another type, or in another colour space than grey and RGB.
    """
    kind = np.dtype(page.dtype)
    floating = np.issubdtype(kind, np.floating)
    if kind != np.uint16 and not floating:
        raise UserError(f"{path} has {kind} pixels; save it with 8, 16 or 32-bit float ones")
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if photometric not in ("MINISBLACK", "MINISWHITE", "RGB"):
        raise UserError(f"{path} has 16-bit {photometric} pixels; save it as grey or RGB, or with 8 bits")
    try:
        values = page.asarray()
    except ValueError as error:
        if "imagecodecs" in str(error):
            raise UserError(
                f"{path}: its compression ({page.compression.name}) needs a package: pip install imagecodecs"
            ) from error
        raise
    values = np.moveaxis(values, 0, -1) if page.axes == "SYX" else values
    values = values[..., None] if page.axes == "YX" else values
    colours = 3 if photometric == "RGB" else 1
    if values.ndim != 3 or values.shape[-1] not in (colours, colours + 1):
        raise UserError(f"{path} has pixels of shape {values.shape}, but grey or RGB is needed")
    values = values.astype(np.float32 if floating else np.uint16)
    peak = 1 if floating else 65535
    pixels, alpha = values[..., :colours], values[..., colours:]
    if photometric == "MINISWHITE":
        pixels = (peak - pixels).astype(values.dtype)
    if not alpha.size:
        return pixels, None
    if page.extrasamples and int(page.extrasamples[0]) == 1:  # the colours are stored multiplied with alpha
        share = alpha.astype(np.float64) / peak
        whole = np.where(share > 0, pixels / np.maximum(share, 1 / 65535), 0)
        pixels = (whole if floating else whole.round().clip(0, peak)).astype(values.dtype)
    return pixels, alpha.clip(0, 1) if floating else alpha
