"""Photographs for training and testing that are broken, odd, or do not belong together: handled, or one line."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from filtrun.data.images_folder import ImagesFolder
from filtrun.data.pairs import FiveK, Pairs
from filtrun.degrade.masks import MaskFiles
from filtrun.errors import UserError
from filtrun.tasks.inpaint import Inpaint

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray = NOISE, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **more)
    return path


def cut(path: Path) -> None:
    """The first half of a good file."""
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(path.suffix[1:], path.suffix[1:].upper()))
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])


def wide(path: Path, pixels: np.ndarray) -> None:
    import tifffile

    tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")


def with_nan(path: Path) -> None:
    pixels = (NOISE / 255).astype(np.float32)
    pixels[5, 7, 1] = np.nan
    wide(path, pixels)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "none.png": (Path.touch, r"is empty \(0 bytes\)"),
    "none.jpg": (Path.touch, r"is empty \(0 bytes\)"),
    "none.tif": (Path.touch, r"is empty \(0 bytes\)"),
    "none.hdr": (Path.touch, r"is empty \(0 bytes\)"),
    "text.png": (lambda p: p.write_text("hello"), r"is not an image that can be read \(of no known kind\)"),
    "cut.png": (cut, "is not an image that can be read .*truncated"),
    "cut.jpg": (cut, "is not an image that can be read .*truncated"),
    "cut.tif": (cut, "is not an image that can be read"),
    "cut.bmp": (cut, "is not an image that can be read"),
    "cut.gif": (cut, "is not an image that can be read"),
    "cut.webp": (cut, "is not an image that can be read"),
    "nan.tif": (with_nan, "has 1 pixels that are NaN or infinite, the first in row 5, column 7"),
    "whole.tif": (lambda p: wide(p, NOISE.astype(np.int32)), "has int32 pixels; save it with 8, 16 or 32-bit float"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_before_anything_trains(tmp_path: Path, name: str, part: str) -> None:
    for folder in ("train", "test"):
        save(tmp_path / folder / "good.png")
    make, reason = BROKEN[name]
    make(tmp_path / part / name)
    with pytest.raises(UserError, match=f"{part}/{name} {reason}") as told:
        ImagesFolder(root=str(tmp_path), patch=16).setup(0)
    assert len(str(told.value).splitlines()) == 1


def test_nan_in_openexr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.full((20, 20, 3), 7.5, np.float32)

    class File:
        def __init__(self, path: str) -> None:
            self.pixels = pixels

        def channels(self) -> dict[str, Any]:
            return {"RGB": types.SimpleNamespace(pixels=self.pixels)}

    monkeypatch.setitem(sys.modules, "OpenEXR", types.SimpleNamespace(File=File))
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.exr").write_bytes(b"v/1\x01")
    data = ImagesFolder(root=str(tmp_path), patch=16).setup(0)
    assert data.split("train").batch([0]).x.unique().tolist() == [7.5]
    pixels[3, 4, 0] = np.nan
    with pytest.raises(UserError, match=r"\.exr has 1 pixels that are NaN or infinite, the first in row 3, column 4"):
        ImagesFolder(root=str(tmp_path), patch=16).setup(0)


def read_as(tmp_path: Path, name: str, make: Callable[[Path], object], channels: int = 3) -> torch.Tensor:
    """The image of one file as data=images gives it whole, (C, H, W) in [0, 1]."""
    folder = tmp_path / name.replace(".", "_")
    folder.mkdir(parents=True)
    make(folder / name)
    return ImagesFolder(root=str(folder), patch=16, channels=channels).images("test")[0][1][0]


def test_kinds_of_pixels_have_the_values_they_show(tmp_path: Path) -> None:
    base = torch.from_numpy(NOISE / np.float32(255)).permute(2, 0, 1)
    rgba = np.concatenate([NOISE, NOISE[..., :1]], -1)
    alpha = base[:1]
    deep = NOISE.astype(np.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6

    def one_colour(mode: str, colour: Any) -> Callable[[Path], object]:
        return lambda path: Image.new(mode, (20, 20), colour).save(path)

    found = {
        "alpha.png": (lambda p: save(p, rgba), base * alpha + 1 - alpha),
        "deep.tif": (lambda p: wide(p, deep), base),
        "float.tif": (lambda p: wide(p, (NOISE / 255).astype(np.float32)), base),
        "half.tif": (lambda p: wide(p, (NOISE / 255).astype(np.float16)), base),
        "deep_grey.png": (lambda p: save(p, deep[..., 0]), base[:1].expand(3, -1, -1)),
        "turned.png": (lambda p: save(p, exif=turned), base.rot90(-1, (1, 2))),
        "cmyk.tif": (one_colour("CMYK", (0, 255, 255, 0)), torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 20, 20)),
        "bits.png": (one_colour("1", 1), torch.ones(3, 20, 20)),
        "grey_alpha.png": (one_colour("LA", (51, 255)), torch.full((3, 20, 20), 0.2)),
    }
    for name, (make, expected) in found.items():
        tolerance = 1e-3 if name == "half.tif" else 0.5 / 255
        torch.testing.assert_close(read_as(tmp_path, name, make), expected.contiguous(), atol=tolerance, rtol=0)
    palette = read_as(tmp_path, "p.gif", lambda p: Image.new("RGB", (20, 20), (255, 0, 51)).quantize(4).save(p))
    torch.testing.assert_close(palette[:, 0, 0], torch.tensor([1.0, 0, 0.2]), atol=0.01, rtol=0)
    grey = read_as(tmp_path, "grey.png", save, channels=1)
    luma = (base * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    torch.testing.assert_close(grey, luma, atol=0.6 / 255, rtol=0)


@pytest.mark.parametrize(("height", "width", "count"), [(1, 1, 1), (1, 40, 2), (20000, 50, 50), (50, 20000, 50)])
def test_sides_of_any_length_are_cut_into_tiles(tmp_path: Path, height: int, width: int, count: int) -> None:
    save(tmp_path / "train" / "a.png", np.resize(NOISE, (height, width, 3)))
    save(tmp_path / "test" / "b.png", np.resize(NOISE[::-1], (height, width, 3)))
    data = ImagesFolder(root=str(tmp_path), patch=32, stride=32, patches=50).setup(0)
    tiles = data.split("train").images
    assert tiles.shape == (count, 3, 32, 32)
    assert data.split("test").images.shape == (1, 3, 32, 32) and data.sizes["test"] == [(height, width)]
    if (height, width) == (1, 1):
        assert torch.equal(tiles[0], torch.from_numpy(NOISE[0, 0]).view(3, 1, 1).expand(3, 32, 32))


def pairs(root: Path, **more: Any) -> Pairs:
    return Pairs(input=str(root / "in"), target=str(root / "gt"), patch=16, **more)


@pytest.mark.parametrize("side", ["in", "gt"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_half_of_a_pair_is_named(tmp_path: Path, name: str, side: str) -> None:
    stem = Path(name).stem
    for folder in ("in", "gt"):
        save(tmp_path / folder / "other.png")
        if folder != side:
            save(tmp_path / folder / f"{stem}.png")
    BROKEN[name][0](tmp_path / side / name)
    with pytest.raises(UserError, match=f"{side}/{name} {BROKEN[name][1]}") as told:
        pairs(tmp_path).setup(0)
    assert len(str(told.value).splitlines()) == 1


def test_pairs_of_different_sizes(tmp_path: Path) -> None:
    for folder in ("in", "gt"):
        save(tmp_path / folder / "a.png")
        save(tmp_path / folder / "b.png")
    save(tmp_path / "gt" / "b.png", NOISE[:, :30])
    wrong = r"gt/b.png is 24x30 pixels, but must be the size of .*in/b.png, which is 24x40"
    # a centre square or a common size of the shorter side would hide that they do not show the same
    for more in ({}, {"square": True}, {"square": True, "resize": 16}):
        with pytest.raises(UserError, match=wrong):
            pairs(tmp_path, **more).setup(0)
    with pytest.raises(UserError, match=r"gt/b.png is 16x20 pixels, but .*in/b.png, which is 16x27"):
        pairs(tmp_path, resize=16).setup(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "gt" / "b.png", exif=exif)  # shown upright, as its partner is not
    with pytest.raises(UserError, match=r"gt/b.png is 40x24 pixels, but must be the size of .*which is 24x40"):
        pairs(tmp_path).setup(0)


def test_pairs_resized_to_a_ratio_stay_pairs(tmp_path: Path) -> None:
    for i in range(2):  # 47 and 141 columns at 20 / 30 are 31.3 and 94: one pixel too many for three times 31
        save(tmp_path / "in" / f"{i}.png", np.resize(NOISE, (30, 47, 3)))
        save(tmp_path / "gt" / f"{i}.png", np.resize(NOISE, (90, 141, 3)))
    data = Pairs(input=str(tmp_path / "in"), target=str(tmp_path / "gt"), patch=24, resize=18, ratio=3).setup(0)
    _, image, target = data.images("test")[0]
    assert image.shape == (1, 3, 18, 28) and target is not None and target.shape == (1, 3, 54, 84)


def test_pairs_in_one_folder_are_told_apart_by_their_endings(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"a{i}_rainy.png", NOISE)
        save(tmp_path / f"a{i}_clean.png", NOISE[::-1])
    data = Pairs(input=str(tmp_path), target=str(tmp_path), patch=16)
    assert sorted(data.images("train").names + data.images("test").names) == ["a0", "a1", "a2"]
    for name, image, target in data.images("train"):
        assert target is not None and torch.equal(image, target.flip(-2)), name
        assert torch.equal((image[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(NOISE))
    (tmp_path / "a1_clean.png").unlink()
    with pytest.raises(UserError, match="a1_rainy.png has no partner"):
        Pairs(input=str(tmp_path), target=str(tmp_path), patch=16).setup(0)


def test_an_image_is_in_one_part_only(tmp_path: Path) -> None:
    for folder in ("in", "gt"):
        save(tmp_path / folder / "a.png")
        save(tmp_path / folder / "b.png")
    test = {"test_input": str(tmp_path / "in"), "test_target": str(tmp_path / "gt")}
    with pytest.raises(UserError, match="in/a.png is both a train and a test image; keep the parts disjoint"):
        pairs(tmp_path, **test).setup(0)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "x.png").symlink_to(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match=r"both a train and a test image \(as .*link/x.png\)"):
        ImagesFolder(root=str(tmp_path / "in"), train=str(tmp_path / "link"), patch=16).setup(0)


def test_fivek_lists_and_files(tmp_path: Path) -> None:
    for folder in ("input", "expertC"):
        for i in range(3):
            save(tmp_path / folder / "JPG" / f"a{i}.jpg")
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfa0.dng\r\na1\r\n\r\n")  # as an editor on Windows writes it
    (tmp_path / "test.txt").write_text("a2\n")

    def made() -> FiveK:
        return FiveK(root=str(tmp_path), patch=16)

    assert made().images("train").names == ["a0", "a1"]
    (tmp_path / "train.txt").write_bytes(b"a0\n\xe9\xff\n")
    with pytest.raises(UserError, match="the train list names .*, but there is no input image of it"):
        made().setup(0)
    (tmp_path / "train.txt").write_text("a0\na2\n")
    with pytest.raises(UserError, match="input/JPG/a2.jpg is both a train and a test image"):
        made().setup(0)
    (tmp_path / "train.txt").write_text("a0\n")
    save(tmp_path / "input" / "copy" / "a1.jpg")
    with pytest.raises(UserError, match="input/JPG/a1.jpg and .*input/copy/a1.jpg have the same name"):
        made().setup(0)
    (tmp_path / "input" / "copy" / "a1.jpg").unlink()
    cut(tmp_path / "expertC" / "JPG" / "a0.jpg")
    with pytest.raises(UserError, match="expertC/JPG/a0.jpg is not an image that can be read"):
        made().setup(0)
    save(tmp_path / "expertC" / "JPG" / "a0.jpg", NOISE[:20])
    with pytest.raises(UserError, match=r"a0.jpg is 20x40 pixels, but must be the size of .*which is 24x40"):
        made().setup(0)


def test_masks_of_any_size_and_kind(tmp_path: Path) -> None:
    holes = np.zeros((12, 20), np.uint8)
    holes[3:6, 5:15] = 255
    for name, pixels in (("a.png", holes), ("b.png", np.stack([holes] * 3, -1)), ("c.png", holes > 0)):
        save(tmp_path / "masks" / name, pixels)
    masks = MaskFiles(str(tmp_path / "masks"))
    masks.check()
    wanted = torch.from_numpy(holes > 0).repeat_interleave(2, 0).repeat_interleave(2, 1).float()
    for number in range(3):
        assert torch.equal(masks.at(number, 24, 40)[0, 0], wanted)  # of half the image's size
    assert masks.at(0, 5, 9).shape == (1, 1, 5, 9)


def test_broken_masks_are_named_before_anything_trains(tmp_path: Path) -> None:
    save(tmp_path / "masks" / "a.png", NOISE[..., 0])
    run = types.SimpleNamespace(trainer=types.SimpleNamespace(evaluate=False))
    for name, (make, reason) in BROKEN.items():
        if name.startswith(("none", "text")):
            path = tmp_path / "masks" / f"z{name}"
            make(path)
            with pytest.raises(UserError, match=f"masks/z{name} {reason}") as told:
                Inpaint(masks="folder", mask_root=str(tmp_path / "masks")).prepare(run)  # type: ignore[arg-type]
            assert len(str(told.value).splitlines()) == 1
            path.unlink()
    with pytest.raises(UserError, match="task.mask_root"):
        Inpaint(masks="folder", mask_root=str(tmp_path / "nowhere"))


def test_a_test_image_too_small_to_measure_is_named_before_anything_trains(tmp_path: Path) -> None:
    from filtrun.tasks.denoise import Denoise
    from filtrun.tasks.superres import SuperRes

    save(tmp_path / "train" / "a.png")
    save(tmp_path / "test" / "small.png", NOISE[:16])
    save(tmp_path / "test" / "dot.png", NOISE[:1, :1])
    data = ImagesFolder(root=str(tmp_path), patch=16).setup(0)
    run: Any = types.SimpleNamespace(data=data, trainer=types.SimpleNamespace(evaluate=True))
    with pytest.raises(UserError, match="dot.png has 1x1 pixels, too few to be measured: SSIM needs 11 a side"):
        Denoise().prepare(run)
    data.sizes["test"][0] = (99, 99)
    Denoise().prepare(run)
    with pytest.raises(UserError, match="small.png has 40x16 pixels, too few to be measured: SSIM needs 17 a side"):
        SuperRes(scale=3).prepare(run)  # 15 rows, 3 at each end do not count
    SuperRes(scale=3, eval_images=1).prepare(run)
    run.trainer.evaluate = False
    SuperRes(scale=3).prepare(run)
