from __future__ import annotations

import io
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from filtrun.errors import UserError
from filtrun.photo import exif as exif_tags
from filtrun.photo.read import MAX_PIXELS, orient, read_photo
from filtrun.photo.wide import write_png16


def wide(image, factor=257):
    return image.astype(np.uint16) * factor + np.arange(image.shape[1], dtype=np.uint16)[None, :, None] % 7


def png16(path, values, exif=b"", icc=None):
    with path.open("wb") as stream:
        write_png16(stream, values, exif, icc, None)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", "16.png", "16.tif"])
def test_orientation_is_that_of_pillow(tmp_path, cat, turn, suffix):
    import tifffile

    path, exif = tmp_path / f"a{suffix}", Image.Exif()
    exif[0x0112] = turn
    if suffix == "16.png":
        png16(path, wide(cat), exif.tobytes())
    elif suffix == "16.tif":
        tifffile.imwrite(path, wide(cat), photometric="rgb", extratags=[(274, 3, 1, turn, True)])
    else:
        Image.fromarray(cat).save(path, exif=exif)
    photo = read_photo(path)
    if suffix.startswith("16"):
        planes = [Image.fromarray(wide(cat)[..., c].astype(np.int32)) for c in range(3)]
        for plane in planes:
            plane.getexif()[0x0112] = turn
        expected = np.stack([np.asarray(ImageOps.exif_transpose(p)) for p in planes], -1)
    else:
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
    assert photo.size == ((60, 80) if turn < 5 else (80, 60)) and np.array_equal(photo.pixels, expected)
    assert photo.pixels.dtype == (np.uint16 if suffix.startswith("16") else np.uint8)
    assert exif_tags.renewed(photo.exif, 1, 1).get(0x0112, 1) == 1


def test_orient_twice_by_a_mirror_is_nothing():
    x = np.arange(12).reshape(3, 4, 1)
    for turn in (2, 3, 4, 5, 7):
        assert np.array_equal(orient(orient(x, turn), turn), x)
    assert np.array_equal(orient(orient(x, 6), 8), x)
    assert orient(x, 6)[..., 0].tolist() == [[8, 4, 0], [9, 5, 1], [10, 6, 2], [11, 7, 3]]  # clockwise


def test_kinds_of_8_bit_images(tmp_path, cat):
    image = Image.fromarray(cat)
    image.quantize(16).save(tmp_path / "palette.png")
    image.convert("1").save(tmp_path / "bits.png")
    image.convert("L").save(tmp_path / "grey.jpg", quality=100)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image.convert("LAB").save(tmp_path / "lab.tif")
    image.save(tmp_path / "a.gif", save_all=True, append_images=[ImageOps.flip(image), ImageOps.mirror(image)])
    image.save(tmp_path / "a.bmp")
    Image.fromarray(wide(cat)[..., 0]).save(tmp_path / "deep.pgm")
    with Image.open(tmp_path / "palette.png") as opened:
        assert np.array_equal(read_photo(tmp_path / "palette.png").pixels, np.asarray(opened.convert("RGB")))
    assert set(np.unique(read_photo(tmp_path / "bits.png").pixels)) == {0, 255}
    assert read_photo(tmp_path / "grey.jpg").pixels.shape == (60, 80, 1)
    for name, near in (("cmyk.jpg", 6), ("a.bmp", 0)):
        photo = read_photo(tmp_path / name)
        assert np.abs(photo.pixels.astype(int) - cat).max() <= near and photo.alpha is None
    assert read_photo(tmp_path / "a.gif").notes == ["only the first of its 3 images"]
    assert read_photo(tmp_path / "a.gif").pixels.shape == (60, 80, 3)
    assert np.array_equal(read_photo(tmp_path / "deep.pgm").pixels, wide(cat)[..., :1])


def test_alpha_is_kept_aside(tmp_path, cat):
    alpha = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
    rgba = np.dstack([cat, alpha])
    for name in ("a.png", "a.tif", "a.webp"):
        Image.fromarray(rgba).save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        photo = read_photo(tmp_path / name)
        assert np.array_equal(photo.pixels, cat) and np.array_equal(photo.alpha[..., 0], alpha)
    Image.fromarray(rgba[..., [0, 3]].copy(), mode="LA").save(tmp_path / "la.png")
    assert read_photo(tmp_path / "la.png").pixels.shape == (60, 80, 1)
    clear = Image.fromarray(cat).quantize(8)
    clear.info["transparency"] = 3
    clear.save(tmp_path / "p.png", transparency=3)
    photo = read_photo(tmp_path / "p.png")
    assert np.array_equal(photo.alpha[..., 0] == 0, np.asarray(clear) == 3) and photo.pixels.shape[-1] == 3


def test_16_bit_and_float_tiff(tmp_path, cat):
    import tifffile

    values, path = wide(cat), tmp_path / "a.tif"
    both = np.dstack([values, 60000 - values[..., :1]])
    tifffile.imwrite(path, both, photometric="rgb", extrasamples=["unassalpha"], compression="zlib")
    photo = read_photo(path)
    assert np.array_equal(photo.pixels, values) and np.array_equal(photo.alpha, both[..., 3:])
    tifffile.imwrite(path, np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_photo(path).pixels, values)
    tifffile.imwrite(path, values[..., 0], photometric="miniswhite")
    assert np.array_equal(read_photo(path).pixels, 65535 - values[..., :1])
    share = np.full((60, 80, 1), 32768, np.uint16)
    tifffile.imwrite(path, np.dstack([values // 2, share]), photometric="rgb", extrasamples=["assocalpha"])
    assert np.abs(read_photo(path).pixels.astype(int) - values).max() <= 2
    floats = (cat / 50).astype(np.float32)
    tifffile.imwrite(path, floats, photometric="rgb")
    assert np.array_equal(read_photo(path).pixels, floats) and read_photo(path).peak == 1
    more = {"software": "x", "iccprofile": b"profile", "resolution": (100, 50), "resolutionunit": 3}
    tifffile.imwrite(path, floats, photometric="rgb", extratags=[(271, 2, 6, "Maker", True)], metadata=None, **more)
    photo = read_photo(path)
    assert photo.exif[271] == "Maker" and photo.icc == b"profile" and photo.dpi == pytest.approx((254, 127))
    floats[5, 6] = np.nan
    tifffile.imwrite(path, floats, photometric="rgb")
    with pytest.raises(UserError, match=r"a.tif has 1 pixels that are NaN or infinite"):
        read_photo(path)
    tifffile.imwrite(path, values.astype(np.uint32), photometric="rgb")
    with pytest.raises(UserError, match="has uint32 pixels"):
        read_photo(path)
    tifffile.imwrite(path, np.dstack([values, values[..., :1]]), photometric="separated")
    with pytest.raises(UserError, match="16-bit SEPARATED pixels"):
        read_photo(path)


def test_exif_icc_and_dpi_are_read(tmp_path, cat, tags, srgb):
    image = Image.fromarray(cat)
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        more = {} if name == "a.webp" else {"dpi": (300, 300)}
        image.save(tmp_path / name, exif=tags.tobytes(), icc_profile=srgb, **more)
        photo = read_photo(tmp_path / name)
        assert photo.icc == srgb and photo.exif[0x0110] == "Model 7" and 0x0100 not in photo.exif
        assert photo.exif[0x8769][0x829A] == 1 / 250 and photo.exif[0x8825][1] == "N"
        assert more == {} or photo.dpi == pytest.approx((300, 300), rel=1e-3)


def test_a_profile_of_ink_is_not_kept_for_rgb(tmp_path, cat):
    Image.fromarray(cat).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=b"x" * 200)
    assert read_photo(tmp_path / "a.jpg").icc is None


def test_damaged_exif_does_not_cost_the_image(tmp_path, cat):
    Image.fromarray(cat).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\xff\xff\0\1")
    assert np.array_equal(read_photo(tmp_path / "a.png").pixels, cat)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path, width, height, depth=8, data=b"\0" * 10):
    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_files_that_are_no_images(tmp_path, cat):
    def reason(name):
        with pytest.raises(UserError) as told:
            read_photo(tmp_path / name)
        assert str(told.value).startswith(str(tmp_path / name)) and "\n" not in str(told.value)
        return str(told.value)

    (tmp_path / "empty.png").touch()
    assert reason("empty.png").endswith("is empty (0 bytes)")
    (tmp_path / "text.jpg").write_text("hello")
    assert reason("text.jpg").endswith("is no image, or of a kind that is not known")
    assert reason("missing.png").endswith("is not a file")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (99, 99, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.webp", "cut.tif", "cut.bmp"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, format={"jpg": "JPEG", "tif": "TIFF"}.get(name[4:], name[4:].upper()))
        (tmp_path / name).write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
        assert "can be read" in reason(name) or "no image" in reason(name)
    png16(tmp_path / "whole.png", wide(noise))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut16.png").write_bytes(data[: len(data) // 2])
    reason("cut16.png")
    (tmp_path / "cut.hdr").write_bytes(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 9 +X 9\n\1\2")
    assert "ends too early" in reason("cut.hdr")


def test_decompression_bombs(tmp_path):
    bomb(tmp_path / "a.png", 50_000, 50_000)
    with pytest.raises(UserError, match=f"more than {MAX_PIXELS:,} pixels"):
        read_photo(tmp_path / "a.png")
    (tmp_path / "a.hdr").write_bytes(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 50000 +X 40000\n\1\2")
    with pytest.raises(UserError, match=f"has 40000x50000 pixels; the most that is read is {MAX_PIXELS:,}"):
        read_photo(tmp_path / "a.hdr")
    bomb(tmp_path / "b.png", 4, 4, 16, b"\0" * 1_000_000)  # says 4x4 and unpacks to a megabyte
    with pytest.raises(UserError, match="holds more pixels than its header says"):
        read_photo(tmp_path / "b.png")


def test_radiance(tmp_path):
    import torch

    from filtrun.data.hdr import write_radiance

    values = torch.rand(3, 12, 9) * 40
    write_radiance(tmp_path / "a.hdr", values)
    photo = read_photo(tmp_path / "a.hdr")
    assert photo.pixels.dtype == np.float32 and photo.pixels.shape == (12, 9, 3)
    assert np.allclose(photo.pixels, values.permute(1, 2, 0).numpy(), atol=40 / 128)


class FakeExr:
    """What is used of the package OpenEXR, storing its arrays with NumPy."""

    def __init__(self, first, channels=None, header_only=False):
        self.given = channels
        if channels is None:
            with np.load(first) as file:
                self.given = {name: file[name] for name in file.files}

    def header(self):
        height, width = next(iter(self.given.values())).shape[:2]
        return {"dataWindow": (np.array([0, 0]), np.array([width - 1, height - 1]))}

    def channels(self):
        return {name: types.SimpleNamespace(pixels=values) for name, values in self.given.items()}

    def write(self, path):
        with Path(path).open("wb") as stream:
            np.savez(stream, **self.given)


def test_openexr(tmp_path, cat, monkeypatch):
    from filtrun.photo.write import write_photo

    fake = types.SimpleNamespace(File=FakeExr, ZIP_COMPRESSION=3, scanlineimage=0)
    monkeypatch.setitem(sys.modules, "OpenEXR", fake)
    floats, alpha = (cat / 20).astype(np.float32), (cat[..., :1] / 255).astype(np.float32)
    for pixels, cover in ((floats, None), (floats, alpha), (floats[..., :1], alpha)):
        write_photo(tmp_path / "a.exr", "exr", pixels, cover, replace=True)
        photo = read_photo(tmp_path / "a.exr")
        assert np.array_equal(photo.pixels, pixels)
        assert np.array_equal(photo.alpha, cover) if cover is not None else photo.alpha is None
    floats[3, 4, 0] = np.nan
    write_photo(tmp_path / "a.exr", "exr", floats, replace=True)
    with pytest.raises(UserError, match=r"a.exr has 1 pixels that are NaN or infinite, the first in row 3, column 4"):
        read_photo(tmp_path / "a.exr")
