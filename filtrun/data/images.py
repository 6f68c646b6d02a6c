"""Image files: which there are, and one of them as uint8 pixels of a wanted size and channel count."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from filtrun.errors import UserError

SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm .pbm".split())
MAX_PIXELS = 178_956_970
"""Largest image, Pillow's own limit: above it a small file may be meant to fill the memory."""


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turn an operating system error while reading `path` into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def check_size(path: Path | str, width: int, height: int) -> None:
    """Raise UserError for an image above `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise UserError(f"{path} has {width}x{height} pixels; the most that is read is {MAX_PIXELS:,}")


def orient(pixels: np.ndarray, turn: int) -> np.ndarray:
    """An array (H, W, ...) stored with EXIF orientation `turn` (1 to 8), upright; others leave it as it is."""
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels


def subfolders(folder: Path) -> dict[str, Path]:
    """Folders in `folder` by name, hidden ones left out; names that are all numbers in the order of the numbers."""
    with readable(folder):
        names = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith((".", "__"))]
    numeric = all(name.isdecimal() for name in names)
    return {name: folder / name for name in sorted(names, key=lambda n: (int(n), n) if numeric else (0, n))}


def image_files(folder: Path) -> list[Path]:
    """All images below `folder`, sorted by path.

    Raises:
        UserError: a file that is not an image by its name (hidden ones and Thumbs.db aside), or no file at all.
    """
    found = []

    def stop(error: OSError) -> None:
        raise error

    with readable(folder):
        for where, folders, names in os.walk(folder, onerror=stop):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
                    continue
                if os.path.splitext(name)[1].lower() not in SUFFIXES:
                    raise UserError(f"{os.path.join(where, name)} is not an image file; allowed: {_suffixes()}")
                found.append(Path(where, name))
    if not found:
        raise UserError(f"the class folder {folder} has no images")
    return sorted(found)


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))


def decode(path: Path | str, channels: int | None = None, size: int | None = None) -> np.ndarray:
    """One image file as uint8 (C, H, W).

    The EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits, palettes and
    other colour spaces become RGB; of an animation the first frame counts.

    Args:
        channels: 1 or 3 converts to grey (ITU-R 601 luma) or RGB; None keeps what the file has.
        size: resize the shorter side to it (bicubic, antialiased) and crop the centre square; None keeps the size.

    Raises:
        UserError: naming the file, if it cannot be read or decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            image = _eight_bit(opened, path)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}: permission denied") from error
    except Exception as error:  # decoders fail with OSError, SyntaxError, ValueError, struct.error, ...
        with readable(path):
            if not os.path.getsize(path):
                raise UserError(f"{path} is empty (0 bytes)") from error
        unknown = type(error).__name__ == "UnidentifiedImageError"  # its text is the path once more
        reason = "of no known kind" if unknown else " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path} is not an image that can be read ({reason})") from error
    if channels is not None:
        image = _as_mode(image, "L" if channels == 1 else "RGB")
    if size is not None:
        image = _square(image, size)
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bit(image: Any, path: Path | str) -> Any:
    """Any PIL image as mode L or RGB."""
    from PIL import Image

    if image.mode == "F":
        raise UserError(f"{path} has 32-bit float pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which some formats open as 32-bit integers
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        grey = image.mode in ("LA", "La", "L", "1")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if grey else "RGB")
    return _as_mode(image, "L" if image.mode in ("1", "L") else "RGB")


def _as_mode(image: Any, mode: str) -> Any:
    """Converted, or as it is: PIL copies an image that has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def _square(image: Any, size: int) -> Any:
    from PIL import Image

    width, height = image.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    if (wide, high) != (width, height):
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_grey(path: Path | str) -> bool:
    """Whether an image file has one channel, or one and alpha, by its header; False where Pillow does not know it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    except Exception:
        return False


def decode_all(paths: Sequence[Path | str], channels: int, height: int, width: int, *, convert: bool) -> Tensor:
    """Many image files as one uint8 tensor (N, C, H, W), decoded by a few threads.

    Args:
        convert: change each image to the wanted channels and (square) size; else an image that differs is an error.

    Raises:
        UserError: naming the first file that does not decode, or that has another shape if not `convert`.
    """
    out = torch.empty(len(paths), channels, height, width, dtype=torch.uint8)
    target = out.numpy()

    def fill(i: int) -> None:
        pixels = decode(paths[i], channels, height) if convert else decode(paths[i])
        if pixels.shape[0] != channels:
            raise UserError(f"{paths[i]} has {pixels.shape[0]} channels, not {channels}")
        if pixels.shape[1:] != (height, width):
            raise UserError(f"{paths[i]} is {pixels.shape[1]}x{pixels.shape[2]}, not {height}x{width}")
        target[i] = pixels

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(fill, range(len(paths))):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out
