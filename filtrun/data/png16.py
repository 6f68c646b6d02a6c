"""PNG files of 16 bits a channel, which Pillow cuts down to 8."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from filtrun.data.images import readable
from filtrun.errors import UserError


def png_depth(path: Path) -> int:
    """Bits per channel from the file's header; 0 if it has none."""
    with readable(path), path.open("rb") as file:
        head = file.read(26)
    return head[24] if len(head) == 26 and head.startswith(b"\x89PNG\r\n\x1a\n") else 0


def read_png16(path: Path) -> np.ndarray:
    """A 16-bit PNG as float32 (H, W, C) in [0, 1], all 16 bits kept.

    Raises:
        UserError: a damaged or an interlaced file.
    """
    with readable(path):
        data = path.read_bytes()
    at, packed = 8, b""
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    width, height, _, colour, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if interlace:
        raise UserError(f"{path} is an interlaced 16-bit PNG; save it without interlacing")
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    try:
        raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels * 2)
    except (zlib.error, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    pixels = _unfilter(raw[:, 0], raw[:, 1:].reshape(height, width, channels * 2))
    return (pixels.reshape(height, width, channels, 2).view(">u2")[..., 0] / 65535).astype(np.float32)


def _unfilter(kinds: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Undo PNG's row filters on (H, W, bytes per pixel), one diagonal at a time.

    A pixel needs its left, upper and upper left neighbours, which lie on the two diagonals before it.
    """
    height, width, depth = raw.shape
    out = np.zeros((height + 1, width + 1, depth), dtype=np.int16)
    for d in range(height + width - 1):
        y = np.arange(max(0, d - width + 1), min(height, d + 1))
        x = d - y
        left, up, corner = out[y + 1, x], out[y, x + 1], out[y, x]
        estimate = left + up - corner
        off_left, off_up, off_corner = abs(estimate - left), abs(estimate - up), abs(estimate - corner)
        nearest = np.where(off_up <= off_corner, up, corner)
        paeth = np.where((off_left <= off_up) & (off_left <= off_corner), left, nearest)
        guess = np.choose(kinds[y][:, None], [np.zeros_like(left), left, up, (left + up) // 2, paeth])
        out[y + 1, x + 1] = (raw[y, x] + guess) & 255
    return np.ascontiguousarray(out[1:, 1:].astype(np.uint8))
