"""Images with more than 8 bits: Radiance .hdr, OpenEXR .exr, 16-bit PNG and TIFF, as float; nothing is clipped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from filtrun.data.images import SUFFIXES, check_size, decode, orient, readable
from filtrun.data.png16 import png_depth, read_png16
from filtrun.data.wide_tiff import ORIENTATION, read_wide_tiff
from filtrun.errors import UserError

HDR_SUFFIXES = frozenset((".hdr", ".pic", ".exr"))
ALL_SUFFIXES = SUFFIXES | HDR_SUFFIXES
LUMA = (0.299, 0.587, 0.114)


def read_image(path: Path | str, channels: int | None = 3) -> Tensor:
    """One image file as (C, H, W): uint8 where it has 8 bits, else float32.

    - Radiance and OpenEXR: linear light as stored, any value from 0 on, above 1 too;
    - 16-bit PNG and TIFF: value / 65535, float TIFF as stored, upright by their EXIF orientation;
    - everything else: 8 bits, see `filtrun.data.images.decode` (EXIF orientation, palettes, CMYK, transparency).

    Args:
        channels: 3 for RGB, 1 for grey (BT.601 weights), None for what the file has.

    Raises:
        UserError: naming the file when it cannot be read, has a pixel that is NaN or infinite, or needs a package.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    with readable(path):
        if not path.stat().st_size:
            raise UserError(f"{path} is empty (0 bytes)")
    if suffix in (".hdr", ".pic"):
        pixels = read_radiance(path)
    elif suffix == ".exr":
        pixels = _read_exr(path)
    elif suffix in (".tif", ".tiff"):
        found = _read_tiff(path)
        if found is None:
            return torch.from_numpy(decode(path, channels))
        pixels = found
    elif suffix == ".png" and png_depth(path) == 16:
        pixels = read_png16(path)
    else:
        return torch.from_numpy(decode(path, channels))
    if not np.isfinite(pixels).all():
        rows, columns = np.nonzero(~np.isfinite(pixels).all(-1))[:2]
        raise UserError(
            f"{path} has {len(rows)} pixels that are NaN or infinite, the first in row {rows[0]}, column {columns[0]}; "
            "mend the file or take it out"
        )
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))
    return _with_channels(image, channels)


def _with_channels(image: Tensor, channels: int | None) -> Tensor:
    """Float (C, H, W) as grey or RGB; alpha (the 2nd or 4th channel) is laid over white, as for 8-bit files."""
    if len(image) in (2, 4):
        alpha = image[-1:].clamp(0, 1)
        image = image[:-1] * alpha + (1 - alpha)
    if channels == 1 and len(image) == 3:
        return (image * torch.tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    return image.expand(3, -1, -1).contiguous() if channels == 3 and len(image) == 1 else image


# ---- Radiance


def read_radiance(path: Path) -> np.ndarray:
    """Radiance RGBE picture (Ward, 1991) as float32 (H, W, 3): flat, old and new run-length coding."""
    with readable(path):
        data = path.read_bytes()
    header = re.match(rb"#\?\w+[^\n]*\n(.*?\n)?\n([-+])Y (\d+) \+X (\d+)\n", data, re.S)
    if header is None or b"32-bit_rle_xyze" in (header[1] or b""):
        raise UserError(f"{path} is no Radiance picture in RGB, rows from left to right")
    height, width = int(header[3]), int(header[4])
    check_size(path, width, height)
    exposure = 1.0
    for value in re.findall(rb"^EXPOSURE=\s*([-+.\deE]+)", header[1] or b"", re.M):
        exposure *= float(value)
    try:
        rgbe = _scanlines(data[header.end() :], height, width)
    except (IndexError, ValueError) as error:
        raise UserError(f"{path} ends too early or is damaged") from error
    scale = np.where(rgbe[..., 3:] > 0, np.ldexp(1.0, rgbe[..., 3:].astype(np.int32) - 136), 0.0)
    pixels = (rgbe[..., :3] * scale / exposure).astype(np.float32)
    return pixels if header[2] == b"-" else pixels[::-1]


def _scanlines(data: bytes, height: int, width: int) -> np.ndarray:
    out = np.zeros((height, width, 4), dtype=np.uint8)
    at = 0
    for y in range(height):
        if 8 <= width < 32768 and data[at : at + 2] == b"\x02\x02" and data[at + 2] < 128:
            if data[at + 2] << 8 | data[at + 3] != width:
                raise ValueError("the row has another length")
            at += 4
            for channel in range(4):
                x = 0
                while x < width:
                    count = data[at]
                    run = count > 128
                    count -= 128 if run else 0
                    piece = data[at + 1 : at + 2] if run else data[at + 1 : at + 1 + count]
                    if not count or x + count > width:
                        raise ValueError("a run of the wrong length")
                    out[y, x : x + count, channel] = np.frombuffer(piece, np.uint8)
                    at, x = at + 1 + len(piece), x + count
        else:
            at = _old_scanline(data, at, out[y])
    return out


def _old_scanline(data: bytes, at: int, row: np.ndarray) -> int:
    """Pixels one by one; (1, 1, 1, n) repeats the last one n times, several in a row give higher digits of n."""
    x, shift = 0, 0
    while x < len(row):
        pixel = np.frombuffer(data[at : at + 4], np.uint8)
        if len(pixel) < 4:
            raise IndexError
        at += 4
        if (pixel[:3] == 1).all():
            count = int(pixel[3]) << shift
            if not x or x + count > len(row):
                raise ValueError("a run of the wrong length")
            row[x : x + count] = row[x - 1]
            x, shift = x + count, shift + 8
        else:
            row[x], x, shift = pixel, x + 1, 0
    return at


def write_radiance(path: Path, image: Tensor) -> None:
    """Write float (3, H, W), linear light from 0 on, as a flat Radiance picture (about 1 % precision)."""
    pixels = image.detach().cpu().double().clamp(min=0).permute(1, 2, 0).numpy()
    peak = pixels.max(-1, keepdims=True)
    mantissa, exponent = np.frexp(peak)
    scale = np.where(peak > 1e-32, mantissa * 256 / np.maximum(peak, 1e-38), 0)
    rgb = np.floor(pixels * scale)
    rgbe = np.concatenate([rgb, np.where(peak > 1e-32, exponent + 128, 0)], -1).astype(np.uint8)
    header = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {len(rgbe)} +X {rgbe.shape[1]}\n"
    path.write_bytes(header.encode() + rgbe.tobytes())


# ---- OpenEXR, TIFF


def _read_exr(path: Path) -> np.ndarray:
    try:
        import OpenEXR
    except ImportError as error:
        raise UserError(f"{path}: OpenEXR files need a package: pip install 'filtrun[exr]'") from error
    try:
        channels = OpenEXR.File(str(path)).channels()
    except Exception as error:
        raise UserError(f"{path} is not an OpenEXR image that can be read ({error})") from error
    for name in ("RGB", "RGBA", "Y"):
        if name in channels:
            pixels = np.asarray(channels[name].pixels, dtype=np.float32)
            return pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
    raise UserError(f"{path} has the channels {', '.join(channels)}, but R, G, B or Y are needed")


def _read_tiff(path: Path) -> np.ndarray | None:
    """A TIFF of 16 or more bits as float (H, W, C), upright; None for one of 8 bits or less."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            if page.dtype is None or page.dtype.itemsize == 1 or page.dtype == np.bool_:
                return None
            check_size(path, page.imagewidth, page.imagelength)
            pixels, alpha = read_wide_tiff(path, page)
            tag = page.tags.get(ORIENTATION)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not an image that can be read ({str(error)[:100]})") from error
    pixels = pixels if alpha is None else np.concatenate([pixels, alpha], -1)
    pixels = orient(pixels, int(tag.value) if tag is not None else 1)
    return pixels if pixels.dtype == np.float32 else (pixels / 65535).astype(np.float32)
