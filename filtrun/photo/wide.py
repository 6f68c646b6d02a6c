"""PNG and TIFF with 16 bits or float values, which Pillow cuts down to 8: all channels in, all channels out."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from filtrun.data.hdr import read_png16
from filtrun.errors import UserError

ROWS = 1 << 20  # bytes of pixels in a strip of a TIFF, about
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of PNG colour types


def read_png16_values(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels (H, W, 1 or 3), alpha (H, W, 1) or None), uint16, of a 16-bit PNG.

    Raises:
        UserError: a damaged or an interlaced file, or one that holds more than its header says.
    """
    data = path.read_bytes()
    width, height, _, colour = struct.unpack(">IIBB", data[16:26])
    left = height * (1 + width * CHANNELS.get(colour, 4) * 2)
    unpack, at = zlib.decompressobj(), 8
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        rest = data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        while rest and left >= 0:
            left -= len(unpack.decompress(rest, left + 1))
            rest = unpack.unconsumed_tail
        if left < 0:
            raise UserError(f"{path} is damaged: it holds more pixels than its header says")
        at += 12 + length
    values = (read_png16(path) * 65535).round().astype(np.uint16)
    if values.shape[-1] in (2, 4):
        return values[..., :-1], values[..., -1:]
    return values, None


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
