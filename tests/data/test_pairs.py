"""Pairs by name, what is wrong with them by name, and the FiveK layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from filtrun.data.pairs import FiveK, Pairs, matched, pair_key
from filtrun.errors import UserError


def save(path: Path, seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for i in range(5):
        save(tmp_path / "in" / f"p{i}.png", i)
        save(tmp_path / "gt" / f"p{i}.png", 100 + i)
    return tmp_path / "in", tmp_path / "gt"


def test_matched_by_name(folders: tuple[Path, Path]) -> None:
    data = Pairs(input=str(folders[0]), target=str(folders[1]), patch=16, stride=16)
    data.setup(0)
    assert data.paired and len(data.images("test")) == 1 and len(data.images("train")) == 4
    train = data.split("train").images
    assert train.shape == (4 * 4, 6, 16, 16)
    for name, image, target in data.images("train"):
        number = int(name[1:])
        for tensor, seed in ((image, number), (target, 100 + number)):
            pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            assert tensor is not None
            assert torch.equal((tensor[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))
    first = data.images("train")[0]
    assert torch.equal(train[0, :3], (first[1][0, :, :16, :16] * 255).round().byte())
    assert torch.equal(train[0, 3:], (first[2][0, :, :16, :16] * 255).round().byte())


def test_parts_and_test_folders(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for i in range(count):
            save(tmp_path / "a" / part / f"{part}{i}.png", i)
            save(tmp_path / "b" / part / f"{part}{i}.jpg", i)
    inside = Pairs(input=str(tmp_path / "a"), target=str(tmp_path / "b"), patch=16)
    assert inside.images("train").names == ["train0", "train1", "train2"]
    assert inside.images("test").names == ["test0", "test1"]
    aside = Pairs(
        input=str(folders[0]), target=str(folders[1]), patch=16,
        test_input=str(tmp_path / "a" / "test"), test_target=str(tmp_path / "b" / "test"),
    )  # fmt: skip
    assert (len(aside.images("train")), aside.images("test").names) == (5, ["test0", "test1"])


def test_endings_tell_the_two_apart(tmp_path: Path) -> None:
    assert pair_key(tmp_path / "07_rainy.png", tmp_path) == pair_key(tmp_path / "07_clean.webp", tmp_path) == "07"
    assert pair_key(tmp_path / "s" / "a.png", tmp_path) == "s/a"


def test_mistakes_name_the_file(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    save(folders[0] / "extra1.png", 9)
    save(folders[1] / "extra2.png", 9)
    with pytest.raises(UserError, match=r"extra1.png has no partner: data.target=.*'extra1'; did you mean 'extra2'"):
        matched(*folders)
    (folders[0] / "extra1.png").unlink()
    with pytest.raises(UserError, match="extra2.png has no partner: data.input="):
        matched(*folders)
    (folders[1] / "extra2.png").unlink()
    save(folders[1] / "p2.png", 0, 24, 30)
    with pytest.raises(UserError, match=r"gt/p2.png is 24x30 pixels, but must be the size of .*in/p2.png.* is 24x32"):
        Pairs(input=str(folders[0]), target=str(folders[1]), patch=16).setup(0)
    save(folders[1] / "p2.jpg", 0)
    with pytest.raises(UserError, match="have the same name"):
        matched(*folders)
    with pytest.raises(UserError, match="data.input is not set"):
        Pairs().setup(0)
    with pytest.raises(UserError, match="data.target=/nowhere does not exist"):
        Pairs(input=str(folders[0]), target="/nowhere").setup(0)
    (folders[1] / "p2.jpg").unlink()
    (folders[1] / "p2.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="p2.png is not an image that can be read"):
        Pairs(input=str(folders[0]), target=str(folders[1]), patch=16).setup(0)


def test_targets_larger_by_a_ratio(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "lr" / f"{i}.png", i, 12, 16)
        save(tmp_path / "hr" / f"{i}.png", i, 36, 48)
    data = Pairs(input=str(tmp_path / "lr"), target=str(tmp_path / "hr"), patch=24, stride=12, ratio=3)
    tiles = data.setup(0).split("train").images
    small = tiles[:, :3, ::3, ::3]
    assert torch.equal(small.repeat_interleave(3, 2).repeat_interleave(3, 3), tiles[:, :3])
    with pytest.raises(UserError, match="data.patch=25 must be a multiple of data.ratio=3"):
        Pairs(ratio=3, patch=25)


def test_fivek_lists(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "input" / "JPG" / "480p" / f"a{i}.jpg", i)
        save(tmp_path / "input" / "JPG" / "full" / f"a{i}.jpg", i, 48, 64)
        save(tmp_path / "expertC" / "JPG" / "480p" / f"a{i}.jpg", i)
        save(tmp_path / "expertC" / "JPG" / "full" / f"a{i}.jpg", i, 48, 64)
    (tmp_path / "train_input.txt").write_text("a0\n")
    (tmp_path / "train_label.txt").write_text("a2.jpg\n")
    (tmp_path / "test.txt").write_text("a3\na1\n")
    data = FiveK(root=str(tmp_path), patch=16)
    assert data.images("train").names == ["a0", "a2"] and data.images("test").names == ["a3", "a1"]
    assert data.images("test")[0][1].shape[-2:] == (24, 32)
    assert FiveK(root=str(tmp_path), patch=16, resolution="full").images("test")[0][1].shape[-2:] == (48, 64)
    (tmp_path / "test.txt").write_text("a9\n")
    with pytest.raises(UserError, match="the test list names a9, but there is no input image of it"):
        FiveK(root=str(tmp_path), patch=16).setup(0)
    with pytest.raises(UserError, match="must hold the folders input and expertC"):
        FiveK(root=str(tmp_path / "input")).setup(0)
