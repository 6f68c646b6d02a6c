"""Images of more than 8 bits, written here byte by byte."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from filtrun.data.hdr import read_image, write_radiance
from filtrun.data.pairs import Pairs
from filtrun.errors import UserError


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


@pytest.mark.parametrize("turn", range(1, 9))
def test_wide_tiff_is_turned_as_8_bit_images_are(tmp_path: Path, turn: int) -> None:
    import tifffile
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    size = read_image(tmp_path / "a.jpg").shape
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = read_image(tmp_path / "a.png")
    for name, wide in (("a.tif", pixels.astype(np.uint16) * 257), ("b.tif", (pixels / 255).astype(np.float32))):
        tifffile.imwrite(tmp_path / name, wide, photometric="rgb", extratags=[(274, 3, 1, turn, True)])
        found = read_image(tmp_path / name)
        assert found.shape == size == expected.shape
        torch.testing.assert_close(found, expected.float() / 255, atol=1e-6, rtol=0)


def test_wide_tiff_alpha_and_inverted_grey(tmp_path: Path) -> None:
    import tifffile

    rgba = np.full((1, 2, 4), 13107, np.uint16)  # 0.2
    rgba[..., 3] = [0, 65535]
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    torch.testing.assert_close(read_image(tmp_path / "a.tif")[:, 0], torch.tensor([[1.0, 0.2]] * 3))
    tifffile.imwrite(tmp_path / "w.tif", rgba[..., 0], photometric="miniswhite")
    torch.testing.assert_close(read_image(tmp_path / "w.tif", None), torch.full((1, 1, 2), 0.8))
    inks = np.zeros((4, 6, 5), np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", inks, photometric="separated", planarconfig="separate")
    with pytest.raises(UserError, match="s.tif has 16-bit SEPARATED pixels; save it as grey or RGB"):
        read_image(tmp_path / "s.tif")
    whole = (tmp_path / "a.tif").read_bytes()
    cases = {"empty.tif": b"", "empty.hdr": b"", "empty.exr": b"", "cut.tif": whole[:-3], "text.tiff": b"no image"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        reason = "is not an image that can be read" if data else r"is empty \(0 bytes\)"
        with pytest.raises(UserError, match=f"{name} {reason}") as told:
            read_image(tmp_path / name)
        assert len(str(told.value).splitlines()) == 1


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
    (tmp_path / "a.exr").write_bytes(b"v/1\x01")
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
