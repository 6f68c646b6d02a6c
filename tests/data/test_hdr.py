"""Images of more than 8 bits, written here byte by byte."""

from __future__ import annotations

import builtins
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from filtrun.data.hdr import read_image, write_radiance
from filtrun.data.pairs import Pairs
from filtrun.errors import UserError


def png16(path: Path, pixels: np.ndarray, kinds: list[int], interlace: int = 0) -> None:
    """A 16-bit PNG of (H, W, C) whose rows use the given filters, by the definition of the format."""
    height, width, channels = pixels.shape
    raw = np.ascontiguousarray(pixels.astype(">u2")).view(np.uint8).reshape(height, width * channels * 2).astype(int)
    step, rows = channels * 2, b""
    for y in range(height):
        row = bytearray()
        for i in range(raw.shape[1]):
            left = raw[y, i - step] if i >= step else 0
            up = raw[y - 1, i] if y else 0
            corner = raw[y - 1, i - step] if y and i >= step else 0
            guess = left + up - corner
            near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
            row.append((raw[y, i] - [0, left, up, (left + up) // 2, near][kinds[y % len(kinds)]]) % 256)
        rows += bytes([kinds[y % len(kinds)]]) + bytes(row)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlace)
    data = zlib.compress(rows)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data[:20]) + chunk(b"IDAT", data[20:]) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("channels", [1, 3])
def test_png16_keeps_every_bit(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (13, 11, channels))
    png16(tmp_path / "a.png", pixels, [0, 1, 2, 3, 4])
    found = read_image(tmp_path / "a.png", None)
    assert found.dtype == torch.float32 and found.shape == (channels, 13, 11)
    np.testing.assert_array_equal((found.double() * 65535).round().permute(1, 2, 0).numpy(), pixels)
    assert read_image(tmp_path / "a.png", 3).shape[0] == 3
    png16(tmp_path / "i.png", pixels, [0], interlace=1)
    with pytest.raises(UserError, match="i.png is an interlaced 16-bit PNG"):
        read_image(tmp_path / "i.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(UserError, match="cut.png is damaged"):
        read_image(tmp_path / "cut.png")


def test_png16_alpha_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.full((2, 2, 4), 13107)  # 0.2
    pixels[..., 3] = [[0, 65535], [0, 65535]]
    png16(tmp_path / "a.png", pixels, [1])
    torch.testing.assert_close(read_image(tmp_path / "a.png", 1)[0], torch.tensor([[1.0, 0.2], [1.0, 0.2]]))


def test_tiff_16_bit_and_float(tmp_path: Path) -> None:
    import tifffile

    pixels = np.random.default_rng(0).integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    np.testing.assert_array_equal((read_image(tmp_path / "a.tif").double() * 65535).round().permute(1, 2, 0), pixels)
    wide = np.random.default_rng(0).uniform(0, 40, (6, 5)).astype(np.float32)
    tifffile.imwrite(tmp_path / "b.tiff", wide)
    assert torch.equal(read_image(tmp_path / "b.tiff", None)[0], torch.from_numpy(wide))
    tifffile.imwrite(tmp_path / "c.tif", (pixels // 257).astype(np.uint8), photometric="rgb")
    assert read_image(tmp_path / "c.tif").dtype == torch.uint8
    tifffile.imwrite(tmp_path / "d.tif", wide.astype(np.int32))
    with pytest.raises(UserError, match="d.tif has int32 pixels"):
        read_image(tmp_path / "d.tif")


def test_radiance_round_trip_and_range(tmp_path: Path) -> None:
    image = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(0)) * 1000
    image[:, 0, 0] = 0
    write_radiance(tmp_path / "a.hdr", image)
    found = read_image(tmp_path / "a.hdr")
    assert found.dtype == torch.float32 and found.max() > 900  # nothing is clipped
    assert ((found - image).abs() <= image.amax(0) / 127).all()
    assert found[:, 0, 0].tolist() == [0, 0, 0]


def test_radiance_values_by_hand_in_three_codings(tmp_path: Path) -> None:
    head = b"#?RADIANCE\n# made by hand\nEXPOSURE=2.0\nFORMAT=32-bit_rle_rgbe\n\n"
    pixel = bytes([128, 64, 32, 129])  # 2^(129 - 136) times the bytes: 1, 0.5, 0.25, halved by the exposure
    flat = head + b"-Y 2 +X 2\n" + pixel * 4
    old = head + b"-Y 2 +X 4\n" + (pixel + bytes([1, 1, 1, 3])) * 2
    runs = b"".join(bytes([128 + 8, value]) for value in pixel)
    mixed = b"".join(bytes([4]) + bytes([value]) * 4 + bytes([128 + 4, value]) for value in pixel)
    new = head + b"-Y 2 +X 8\n" + bytes([2, 2, 0, 8]) + runs + bytes([2, 2, 0, 8]) + mixed
    for name, data, width in (("flat", flat, 2), ("old", old, 4), ("new", new, 8)):
        (tmp_path / f"{name}.hdr").write_bytes(data)
        expected = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1).expand(3, 2, width)
        assert torch.equal(read_image(tmp_path / f"{name}.hdr"), expected)
        (tmp_path / "cut.hdr").write_bytes(data[:-3])
        with pytest.raises(UserError, match="cut.hdr ends too early"):
            read_image(tmp_path / "cut.hdr")
    (tmp_path / "no.hdr").write_bytes(b"something else")
    with pytest.raises(UserError, match="no.hdr is no Radiance picture"):
        read_image(tmp_path / "no.hdr")


def test_nan_is_refused_with_its_place(tmp_path: Path) -> None:
    import tifffile

    pixels = np.ones((4, 5, 3), np.float32)
    pixels[2, 3, 1] = np.nan
    pixels[3, 0, 0] = np.inf
    tifffile.imwrite(tmp_path / "bad.tif", pixels, photometric="rgb")
    with pytest.raises(UserError, match=r"bad.tif has 2 pixels that are NaN or infinite, the first in row 2, column 3"):
        read_image(tmp_path / "bad.tif")


def test_exr_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "OpenEXR":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"a.exr: OpenEXR files need a package: pip install 'filtrun\[exr\]'"):
        read_image(tmp_path / "a.exr")


def test_pairs_with_hdr_inputs_are_float_and_not_clipped(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "gt").mkdir(exist_ok=True)
        write_radiance(tmp_path / "in" / f"{i}.hdr", torch.full((3, 20, 20), 6.0 + i))
        Image.new("RGB", (20, 20), (51, 102, 255)).save(tmp_path / "gt" / f"{i}.png")
    data = Pairs(input=str(tmp_path / "in"), target=str(tmp_path / "gt"), patch=16)
    batch = data.setup(0).split("train").batch([0])
    assert batch.x.shape == (1, 6, 16, 16) and batch.x[0, 0, 0, 0] in (6.0, 7.0)
    assert batch.x[0, 3:, 0, 0].tolist() == pytest.approx([0.2, 0.4, 1.0])
    middle, spread = data.mean_std()
    assert middle[0] in (6.0, 7.0) and spread[0] == 0
