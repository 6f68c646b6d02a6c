"""PNG files of 16 bits a channel, which Pillow cuts down to 8."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np

from filtrun.data.images import check_size, orient, readable
from filtrun.errors import UserError

MARK = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Of the colour types that have 16 bits."""
DECODED = {1: [("LA", "LA")], 2: [("RGBA", "RGBA")], 3: [("RGB", "RGB;16B"), ("RGB", "RGB;16L")],
           4: [("RGBA", "RGBA;16B"), ("RGBA", "RGBA;16L")]}  # fmt: skip
"""Channels -> (mode, raw mode) in which Pillow gives all bytes: a row filter only asks how many bytes a pixel has, so
grey of 16 bits passes for grey and alpha of 8, and of RGB the high and the low bytes are taken one after the other."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, step of columns and rows, of the seven passes of an interlaced image."""


def png_depth(path: Path) -> int:
    """Bits per channel from the file's header; 0 if it has none."""
    with readable(path), path.open("rb") as file:
        head = file.read(26)
    return head[24] if len(head) == 26 and head.startswith(MARK) else 0


def read_png16(path: Path) -> np.ndarray:
    """A 16-bit PNG as float32 (H, W, C) in [0, 1], all 16 bits kept; see `png16_values`."""
    return (png16_values(path) / 65535).astype(np.float32)


def png16_values(path: Path, *, upright: bool = True) -> np.ndarray:
    """A 16-bit PNG as uint16 (H, W, C): 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha; interlaced ones too.

    A colour that counts as transparent becomes alpha.

    Args:
        upright: turn the image as its EXIF orientation says.

    Raises:
        UserError: a damaged file, one that ends too early or holds more than its header says, or one with more pixels
            than `filtrun.data.images.MAX_PIXELS`.
    """
    with readable(path):
        data = path.read_bytes()
    chunks = _chunks(data, path)
    try:
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        channels = CHANNELS[colour]
    except (KeyError, struct.error) as error:
        raise UserError(f"{path} is damaged (its header)") from error
    if depth != 16 or not width or not height or interlaced > 1:
        raise UserError(f"{path} is damaged (its header)")
    check_size(path, width, height)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    sides = [(max(0, -(-(width - x) // dx)), max(0, -(-(height - y) // dy))) for x, y, dx, dy in passes]
    raw = _inflated(chunks.get(b"IDAT", b""), sum(h * (1 + w * channels * 2) for w, h in sides if w and h), path)
    pixels = _decoded(raw, width, height, channels, bool(interlaced), path)
    key = chunks.get(b"tRNS", b"")
    if len(key) == 2 * channels and channels in (1, 3):
        clear = (pixels == np.frombuffer(key, ">u2")).all(-1, keepdims=True)
        pixels = np.concatenate([pixels, np.where(clear, 0, 65535).astype(np.uint16)], -1)
    return orient(pixels, _orientation(chunks.get(b"eXIf", b""))) if upright else pixels


def _chunks(data: bytes, path: Path) -> dict[bytes, bytes]:
    """Chunk name -> content, that of chunks of one name joined. Raises UserError where a check sum does not fit."""
    found: dict[bytes, list[bytes]] = {}
    at = len(MARK)
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 8 + length
        if end + 4 <= len(data) and zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise UserError(f"{path} is damaged (check sum of its {kind.decode('ascii', 'replace')} chunk)")
        found.setdefault(kind, []).append(data[at + 8 : end])
        at = end + 4
    return {kind: b"".join(parts) for kind, parts in found.items()}


def _inflated(packed: bytes, length: int, path: Path) -> bytes:
    """The filtered rows, exactly `length` bytes; no more are unpacked."""
    unpack = zlib.decompressobj()
    try:
        raw = unpack.decompress(packed, length + 1)
    except zlib.error as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if len(raw) > length:
        raise UserError(f"{path} is damaged: it holds more pixels than its header says")
    if len(raw) < length:
        raise UserError(f"{path} is damaged: it ends too early")
    return raw


def _decoded(raw: bytes, width: int, height: int, channels: int, interlaced: bool, path: Path) -> np.ndarray:
    """uint16 (H, W, C) of filtered rows, by the decoder of Pillow (which wants them packed)."""
    from PIL import Image

    stored = zlib.compress(raw, 0)
    try:
        found = [
            np.asarray(Image.frombytes(mode, (width, height), stored, "zip", how, int(interlaced)))
            for mode, how in DECODED[channels]
        ]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if len(found) == 1:
        high, low = found[0][..., ::2], found[0][..., 1::2]
    else:
        high, low = found
    return high.astype(np.uint16) << 8 | low


def _orientation(block: bytes) -> int:
    """EXIF orientation of an eXIf chunk; 1 where it has none or is damaged."""
    from PIL import ExifTags, Image

    if not block:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = Image.Exif()
            exif.load(block)
            return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF is frequent, and no reason to give up the image
        return 1
