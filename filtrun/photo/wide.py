"""Write PNG and TIFF with 16 bits or float values, all channels, which Pillow cannot."""

from __future__ import annotations

import struct
import zlib
from typing import IO, Any

import numpy as np

from filtrun.errors import UserError

ROWS = 1 << 20  # bytes of pixels in a strip of a TIFF, about


def write_png16(
    stream: IO[bytes], values: np.ndarray, exif: bytes, icc: bytes | None, dpi: tuple[float, float] | None
) -> None:
    """Write uint16 (H, W, C) as a PNG: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.

    Source: PNG specification, third edition (W3C), sections 9 and 11.
    """
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(kind: bytes, data: bytes) -> None:
        stream.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    stream.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    if icc:
        chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
    if dpi:
        chunk(b"pHYs", struct.pack(">IIB", *(round(d / 0.0254) for d in dpi), 1))
    if exif:
        chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    pack = zlib.compressobj(6)
    above = np.zeros(width * channels * 2, np.uint8)
    packed = bytearray()
    for row in values:
        now = np.frombuffer(row.astype(">u2").tobytes(), np.uint8)
        packed += pack.compress(b"\x02" + (now - above).tobytes())  # filter 2: the difference to the row above
        above = now
        if len(packed) > ROWS:
            chunk(b"IDAT", bytes(packed))
            packed.clear()
    chunk(b"IDAT", bytes(packed) + pack.flush())
    chunk(b"IEND", b"")


def write_tiff(
    stream: IO[bytes], values: np.ndarray, exif: dict[int, Any], icc: bytes | None, dpi: tuple[float, float] | None
) -> None:
    """Write uint8, uint16 or float32 (H, W, C) as a TIFF, deflated; C as in `write_png16`.

    Source: TIFF 6.0 (Adobe, 1992); EXIF blocks as Exif 2.3, section 4.5.
    """
    from PIL.TiffImagePlugin import IFDRational, ImageFileDirectory_v2

    height, width, channels = values.shape
    floating = values.dtype == np.float32
    rows = max(1, min(height, ROWS // max(1, width * channels * values.itemsize)))
    strips = []
    for top in range(0, height, rows):
        stream.write(b"")  # adds nothing; the stream may be one that has been given up
        piece = values[top : top + rows]
        if not floating:  # horizontal differences (predictor 2)
            piece = np.concatenate([piece[:, :1], np.diff(piece, axis=1)], axis=1)
        strips.append(zlib.compress(piece.astype(values.dtype.newbyteorder("<")).tobytes()))
    if sum(map(len, strips)) > 0xFFFF0000:
        raise UserError("the image is too large for a TIFF of at most 4 GB")
    directory: Any = ImageFileDirectory_v2()  # little-endian

    for tag, value in exif.items():
        directory[tag] = value
    alpha = channels in (2, 4)
    structure: dict[int, Any] = {
        256: width, 257: height, 258: (values.itemsize * 8,) * channels, 259: 8, 262: 2 if channels > 2 else 1,
        273: tuple(np.cumsum([0, *map(len, strips[:-1])]).tolist()), 277: channels, 278: rows,
        279: tuple(map(len, strips)), 284: 1, 317: 1 if floating else 2,
        339: (3 if floating else 1,) * channels,
    }  # fmt: skip
    if alpha:
        structure[338] = 2
    if icc:
        structure[34675] = icc
    if dpi:
        structure |= {282: IFDRational(dpi[0]), 283: IFDRational(dpi[1]), 296: 2}
    for tag, value in structure.items():
        directory[tag] = value
    directory.save(stream)  # adds to the offsets of the strips what lies before them
    for strip in strips:
        stream.write(strip)
