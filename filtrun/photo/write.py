"""Write one photograph: the bits its format can hold, alpha, EXIF and colour profile, at once or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from filtrun.data.hdr import write_radiance
from filtrun.errors import RunFailure, UserError
from filtrun.photo import exif as exif_tags
from filtrun.photo.wide import write_png16, write_tiff

SIDE = {"jpeg": 65500, "webp": 16383}
"""Longest side a format can hold."""
DEPTHS: dict[str, tuple[Any, ...]] = {
    "png": (np.uint8, np.uint16), "jpeg": (np.uint8,), "webp": (np.uint8,), "tiff": (np.uint8, np.uint16, np.float32),
    "hdr": (np.float32,), "exr": (np.float32,),
}  # fmt: skip
QUALITY = 95
BLOCK = 1 << 18
"""Values that are made whole numbers at once, about."""


def depth(format: str, wanted: Any) -> np.dtype:
    """The type of pixels `format` can hold that is nearest to the wanted one (uint8, uint16 or float32)."""
    wanted = np.dtype(wanted)
    able = [np.dtype(d) for d in DEPTHS[format]]
    return next((d for d in able if d == wanted), able[-1])


def quantise(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Float values in [0, 1] as whole numbers of that type; float32 stays as it is."""
    made = np.empty(values.shape, kind)
    rows = max(1, BLOCK // max(1, values[:1].size))  # a large photo's intermediate values would take gigabytes
    for top in range(0, len(values), rows):
        piece = values[top : top + rows]
        made[top : top + rows] = piece if kind == np.float32 else (piece.clip(0, 1) * np.iinfo(kind).max).round()
    return made


def write_photo(
    path: Path,
    format: str,
    pixels: np.ndarray,
    alpha: np.ndarray | None = None,
    *,
    exif: dict[int, Any] | None = None,
    icc: bytes | None = None,
    dpi: tuple[float, float] | None = None,
    quality: int | None = None,
    replace: bool = False,
    stop: threading.Event | None = None,
) -> list[str]:
    """Write an image file; its folder is made when it is missing.

    Args:
        format: png, jpeg, tiff, webp, hdr or exr.
        pixels: (H, W, 1 or 3) of a type in ``DEPTHS[format]``.
        alpha: (H, W, 1) of the same type; JPEG and Radiance hold none and are laid over white.
        exif: tags; width, height and orientation are put right.
        icc: colour profile; one for grey pixels is left out where these become RGB.
        quality: 1 to 100, of JPEG and WebP.
        replace: a file that is there may be replaced.
        stop: once it is set, by another thread, the file is given up with KeyboardInterrupt as soon as can be.

    Returns:
        What could not be kept, in words.

    Raises:
        UserError: naming the file, when it is there already, the format cannot hold it, or it cannot be written.
        RunFailure: the disk is full.
    """
    height, width = pixels.shape[:2]
    if max(height, width) > SIDE.get(format, 1 << 31):
        raise UserError(f"{path} cannot be written: {format} holds at most {SIDE[format]} pixels a side, "
                        f"not {width}x{height}; choose --format png")  # fmt: skip
    notes: list[str] = []
    if alpha is not None and format in ("jpeg", "hdr"):
        pixels, alpha = _over_white(pixels, alpha), None
        notes.append(f"transparency is laid over white, {format} has none")
    if pixels.shape[-1] == 1 and format in ("webp", "hdr"):
        pixels = pixels.repeat(3, axis=-1)
    if icc and pixels.shape[-1] == 3 and icc[16:20] == b"GRAY":
        icc = None
        notes.append("its colour profile is for grey images and left out")
    values = pixels if alpha is None else np.concatenate([pixels, alpha], axis=-1)
    tags, block, lost = exif_tags.packed(exif_tags.renewed(exif or {}, width, height))
    notes += [f"EXIF left out: {', '.join(lost)}"] if lost else []
    work = path.with_name(f".filtrun-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(work, format, values, tags, block, icc, dpi, QUALITY if quality is None else quality, stop)
        if stop is not None and stop.is_set():  # encoders that do not write through the stream have not noticed
            raise KeyboardInterrupt
        _publish(work, path, replace)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.exists():
            raise UserError(f"{path} is there already") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailure(f"{path} could not be written: {error.strerror}") from error
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)
    return notes


class _Stream(io.BufferedWriter):
    """A new file that is given up with KeyboardInterrupt at the next writing to it once `stop` is set."""

    def __init__(self, path: Path, stop: threading.Event | None) -> None:
        super().__init__(io.FileIO(path, "x"))
        self.stop = stop

    def write(self, data: Any, /) -> int:
        if self.stop is not None and self.stop.is_set():
            raise KeyboardInterrupt
        return super().write(data)


def _publish(work: Path, path: Path, replace: bool) -> None:
    if replace:
        os.replace(work, path)
        return
    try:
        os.link(work, path)  # unlike a rename, this fails when somebody else has made the file meanwhile
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError from None
        os.replace(work, path)


def _over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    peak = 1.0 if pixels.dtype == np.float32 else float(np.iinfo(pixels.dtype).max)
    share = alpha / peak
    mixed = pixels * share + peak * (1 - share)
    return mixed.astype(np.float32) if pixels.dtype == np.float32 else mixed.round().astype(pixels.dtype)


def _encode(
    path: Path, format: str, values: np.ndarray, tags: dict[int, Any], block: bytes, icc: bytes | None,
    dpi: tuple[float, float] | None, quality: int, stop: threading.Event | None,
) -> None:  # fmt: skip
    from PIL import Image

    if format == "hdr":
        write_radiance(path, torch.from_numpy(np.ascontiguousarray(values)).permute(2, 0, 1))
        return
    if format == "exr":
        _write_exr(path, values)
        return
    with _Stream(path, stop) as stream:
        if format == "tiff":
            write_tiff(stream, values, tags, icc, dpi)
        elif format == "png" and values.dtype == np.uint16:
            write_png16(stream, values, block, icc, dpi)
        else:
            image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else np.ascontiguousarray(values))
            more: dict[str, Any] = {"png": {}, "jpeg": {"quality": quality, "subsampling": 0 if quality >= 90 else 2},
                    "webp": {"quality": quality, "exact": True}}[format]  # fmt: skip
            more |= {"icc_profile": icc} if icc else {}
            more |= {"exif": block} if block else {}
            more |= {"dpi": dpi} if dpi and format != "webp" else {}
            image.save(stream, format=format.upper(), **more)


def _write_exr(path: Path, values: np.ndarray) -> None:
    import OpenEXR

    name = {1: "Y", 3: "RGB", 4: "RGBA"}.get(values.shape[-1])
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    if name is None:
        channels = {"Y": np.ascontiguousarray(values[..., 0]), "A": np.ascontiguousarray(values[..., 1])}
    else:
        channels = {name: np.ascontiguousarray(values[..., 0] if name == "Y" else values)}
    OpenEXR.File(header, channels).write(str(path))
