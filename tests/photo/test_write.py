from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
from PIL import Image

from filtrun.errors import RunFailure, UserError
from filtrun.photo.read import read_photo
from filtrun.photo.write import depth, quantise, write_photo


def wide(image):
    return image.astype(np.uint16) * 257 + np.arange(image.shape[1], dtype=np.uint16)[None, :, None] % 7


def images(cat):
    for values in (cat, wide(cat), (cat / 50).astype(np.float32)):
        for colours in (1, 3):
            for alpha in (None, values[::-1, :, :1].clip(0, 1) if values.dtype == np.float32 else values[::-1, :, :1]):
                yield values[..., :colours], alpha


def test_every_depth_comes_back(tmp_path, cat, srgb):
    for pixels, alpha in images(cat):
        for form in ("png", "tiff") if pixels.dtype != np.float32 else ("tiff",):
            path = tmp_path / f"a.{form}"
            assert write_photo(path, form, pixels, alpha, dpi=(300, 150), replace=True) == []
            photo = read_photo(path)
            assert photo.pixels.dtype == pixels.dtype and np.array_equal(photo.pixels, pixels)
            assert photo.alpha is None if alpha is None else np.array_equal(photo.alpha, alpha)
            assert photo.dpi == pytest.approx((300, 150), rel=1e-3) and photo.notes == []


def test_others_read_it_too(tmp_path, cat):
    import tifffile

    for pixels, alpha in images(cat):
        write_photo(tmp_path / "a.tif", "tiff", pixels, alpha, replace=True)
        whole = pixels if alpha is None else np.dstack([pixels, alpha])
        assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), whole.squeeze())
        if pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and whole.shape[-1] == 1):
            with Image.open(tmp_path / "a.tif") as image:
                assert np.array_equal(np.asarray(image), whole.squeeze())
        if pixels.dtype == np.uint16:
            write_photo(tmp_path / "a.png", "png", pixels, alpha, replace=True)
            with Image.open(tmp_path / "a.png") as image:
                image.load()  # checks every sum
                seen = np.asarray(image)
            assert np.array_equal(seen, whole.squeeze() if seen.dtype == np.uint16 else _high(whole, seen))


def _high(whole, seen):
    """8-bit version of 16-bit values; Pillow has no grey with alpha of 16 bits and may give RGBA."""
    values = (whole >> 8).astype(np.uint8)
    return values if seen.shape == values.shape else values[..., [0, 0, 0, 1]]


def test_large_images_have_several_strips(tmp_path):
    import tifffile

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65535, (700, 500, 3), dtype=np.uint16)
    for form in ("tiff", "png"):
        write_photo(tmp_path / form, form, pixels)
    with tifffile.TiffFile(tmp_path / "tiff") as tiff:
        assert len(tiff.pages[0].dataoffsets) == 3 and np.array_equal(tiff.asarray(), pixels)
    assert (tmp_path / "png").read_bytes().count(b"IDAT") > 1
    assert np.array_equal(read_photo(tmp_path / "png").pixels, pixels)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "tiff", "png16", "tiff16"])
def test_exif_and_profile_are_kept(tmp_path, cat, tags, srgb, form):
    tags[0x0112] = 6
    Image.fromarray(cat).save(tmp_path / "in.jpg", exif=tags, icc_profile=srgb)
    photo = read_photo(tmp_path / "in.jpg")
    pixels = wide(photo.pixels) if form.endswith("16") else photo.pixels
    assert write_photo(tmp_path / "out", form.removesuffix("16"), pixels, exif=photo.exif, icc=photo.icc) == []
    back = read_photo(tmp_path / "out")
    assert back.icc == srgb and back.exif[0x0112] == 1 and back.size == (80, 60)
    same = {k: v for k, v in back.exif.items() if k not in (0x0112, 0x8769, 282, 283, 296)}
    assert same == {k: v for k, v in photo.exif.items() if k not in (0x0112, 0x8769)}
    assert back.exif[0x8769] == photo.exif[0x8769] | {0xA002: 60, 0xA003: 80}
    assert back.exif[0x8769][0x927C] == b"own \x00\x01 bytes" and back.exif[0x8825][2] == (47, 30, 2.4)


def test_too_much_exif_loses_the_makers_block_only(tmp_path, cat):
    big = {0x010F: "Maker", 0x8769: {0x9003: "2024:05:06 07:08:09", 0x927C: b"z" * 70000}}
    assert write_photo(tmp_path / "a.jpg", "jpeg", cat, exif=big) == ["EXIF left out: MakerNote"]
    assert read_photo(tmp_path / "a.jpg").exif == {0x010F: "Maker", 0x8769: {0x9003: "2024:05:06 07:08:09"}}


def test_formats_without_alpha_and_grey(tmp_path, cat, srgb):
    alpha = np.full((60, 80, 1), 51, np.uint8)
    notes = write_photo(tmp_path / "a.jpg", "jpeg", cat, alpha, quality=100)
    assert notes == ["transparency is laid over white, jpeg has none"]
    expected = cat * 0.2 + 255 * 0.8
    assert np.abs(read_photo(tmp_path / "a.jpg").pixels - expected).max() < 6
    grey = srgb[:16] + b"GRAY" + srgb[20:]
    assert write_photo(tmp_path / "a.webp", "webp", cat[..., :1], icc=grey) == [
        "its colour profile is for grey images and left out"
    ]
    assert read_photo(tmp_path / "a.webp").pixels.shape[-1] == 3
    write_photo(tmp_path / "g.jpg", "jpeg", cat[..., :1])
    assert read_photo(tmp_path / "g.jpg").pixels.shape[-1] == 1


def test_webp_keeps_alpha_and_quality_counts(tmp_path, cat):
    alpha = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)[..., None]
    for form in ("webp", "jpeg"):
        for quality in (20, 100):
            write_photo(tmp_path / f"{form}{quality}", form, cat, alpha, quality=quality)
        assert (tmp_path / f"{form}20").stat().st_size * 2 < (tmp_path / f"{form}100").stat().st_size
    assert np.array_equal(read_photo(tmp_path / "webp20").alpha, alpha)


def test_depths():
    assert depth("png", np.uint16) == np.uint16 and depth("jpeg", np.uint16) == np.uint8
    assert depth("tiff", np.float32) == np.float32 and depth("png", np.float32) == np.uint16
    assert depth("exr", np.uint8) == np.float32 and depth("webp", np.float32) == np.uint8
    values = np.array([-1, 0, 0.5, 1, 2], np.float32)
    assert quantise(values, np.dtype(np.uint8)).tolist() == [0, 0, 128, 255, 255]
    assert quantise(values, np.dtype(np.uint16)).tolist() == [0, 0, 32768, 65535, 65535]
    assert quantise(values, np.dtype(np.float32)).tolist() == values.tolist()
    large = np.random.default_rng(0).random((3, 700, 900), np.float32).transpose(1, 2, 0) * 1.2 - 0.1
    for kind in (np.uint8, np.uint16):  # in blocks of rows
        whole = (large.clip(0, 1) * np.iinfo(kind).max).round().astype(kind)
        assert np.array_equal(quantise(large, np.dtype(kind)), whole)


@pytest.mark.parametrize("form", ["png", "png16", "tiff", "jpeg", "webp"])
def test_a_file_is_given_up_when_that_is_wanted(tmp_path, cat, form):
    stop = threading.Event()
    pixels = cat.astype(np.uint16) * 257 if form == "png16" else cat
    assert write_photo(tmp_path / "a", form.removesuffix("16"), pixels, stop=stop) == []
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        write_photo(tmp_path / "b", form.removesuffix("16"), pixels, stop=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_nothing_is_replaced_unless_asked(tmp_path, cat):
    path = tmp_path / "sub" / "a.png"
    write_photo(path, "png", cat)
    before = path.read_bytes()
    with pytest.raises(UserError, match="a.png is there already"):
        write_photo(path, "png", cat[::-1])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.png"]
    write_photo(path, "png", cat[::-1], replace=True)
    assert np.array_equal(read_photo(path).pixels, cat[::-1])
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_file_systems_without_links(tmp_path, cat, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", link)
    write_photo(tmp_path / "a.png", "png", cat)
    with pytest.raises(UserError, match="there already"):
        write_photo(tmp_path / "a.png", "png", cat)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_nothing(tmp_path, cat, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_photo(tmp_path / "file" / "a.png", "png", cat)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFailure, match="No space left"):
        write_photo(tmp_path / "a.png", "png", cat, replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for form, side in (("jpeg", 65501), ("webp", 16384)):
        with pytest.raises(UserError, match=f"{form} holds at most {side - 1} pixels a side, not {side}x1"):
            write_photo(tmp_path / "a", form, np.zeros((1, side, 1), np.uint8))
