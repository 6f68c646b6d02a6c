from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from filtrun.errors import UserError
from filtrun.photo.masks import Masks
from filtrun.photo.read import Photo


@pytest.fixture
def hole(tmp_path):
    values = np.zeros((60, 80), np.uint8)
    values[10:20, 30:50], values[0, 0], values[0, 1] = 255, 127, 128
    Image.fromarray(values).save(tmp_path / "m.png")
    return values >= 128


def test_one_file_for_all(tmp_path, cat, hole):
    masks = Masks(str(tmp_path / "m.png"))
    found = masks.of(Photo(Path("a.png"), cat), Path("a.png"))
    assert found.shape == (1, 1, 60, 80) and np.array_equal(found[0, 0].numpy(), hole.astype(np.float32))
    assert masks.files == [tmp_path / "m.png"]
    with pytest.raises(UserError, match=r"a.png is 80x59 pixels, but its mask .*m.png is 80x60; resize"):
        masks.of(Photo(Path("a.png"), cat[1:]), Path("a.png"))


def test_a_folder_by_name(tmp_path, cat, hole):
    folder = tmp_path / "masks"
    for name, value in (("sub/a.png", 0), ("a.png", 255), ("b.tif", 255), ("b.txt", 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((60, 80), value, np.uint8)).save(folder / name, format="PNG")
    masks, photo = Masks(str(folder)), Photo(Path("x"), cat)
    assert masks.of(photo, Path("sub/a.jpg")).sum() == 0 and masks.of(photo, Path("a.jpg")).mean() == 1
    assert masks.of(photo, Path("other/b.png")).mean() == 1  # by the name alone
    with pytest.raises(UserError, match=r"x has no mask: there is no c.png in"):
        masks.of(photo, Path("c.jpg"))


def test_a_colour(cat):
    pixels = cat.copy()
    pixels[5:9, 6:8] = (255, 0, 16)
    masks = Masks("#ff0010")
    for values in (pixels, pixels.astype(np.uint16) * 257, (pixels / 255).astype(np.float32)):
        found = masks.of(Photo(Path("a"), values), Path("a"))[0, 0]
        assert found.sum() == 8 and found[5:9, 6:8].all()
    with pytest.raises(UserError, match="a has no pixel that is exactly #ff0010"):
        masks.of(Photo(Path("a"), cat), Path("a"))


def test_mistakes(tmp_path):
    (tmp_path / "empty.png").touch()
    for text, message in (
        ("#ff00", "is no colour; write it as '#rrggbb'"), ("none.png", "no such file or folder"),
        (str(tmp_path / "empty.png"), "is empty"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Masks(text)
