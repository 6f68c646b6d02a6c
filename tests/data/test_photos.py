"""Photographs: embedded ones, folders, tiles, whole images, crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from filtrun.data.crops import CropTurn
from filtrun.data.image_set import grid
from filtrun.data.images_folder import ImagesFolder
from filtrun.data.photos import PHOTOS, Photos, photographs
from filtrun.errors import UserError


def save(path: Path, height: int = 40, width: int = 50, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([y * 3 % 256, x * 3 % 256, 0 * x + value], -1).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def photos() -> Photos:
    data = Photos(patches=200)
    data.setup(0)
    return data


def test_embedded_photographs(photos: Photos) -> None:
    test = photos.images("test")
    assert test.names == ["chelsea", "rocket", "coins", "flower"]
    sizes = [tuple(image.shape) for _, image, target in test if target is None]
    assert sizes == [(1, 3, 300, 451), (1, 3, 427, 640), (1, 3, 303, 384), (1, 3, 427, 640)]
    _, cat, _ = test[0]
    import skimage.data

    assert torch.equal((cat[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(skimage.data.chelsea()))
    _, coins, _ = test[2]
    assert torch.equal(coins[:, 0], coins[:, 2])  # grey as RGB
    assert not set(PHOTOS["train"]) & set(PHOTOS["test"])
    assert all(p.path.is_file() for part in PHOTOS for p in photographs(part))


def test_splits(photos: Photos) -> None:
    train, test = photos.split("train"), photos.split("test")
    assert train.images.dtype == torch.uint8 and train.images.shape == (200, 3, 96, 96)
    assert test.images.shape == (4, 3, 96, 96)
    assert torch.equal(train.images, Photos(patches=200).setup(5).split("train").images)
    assert (photos.classes, photos.num_classes, photos.channels, photos.image_size) == (("images",), 1, 3, 96)
    assert photos.fingerprint() == Photos(patches=200).fingerprint() != Photos(patches=201).fingerprint()
    with pytest.raises(UserError, match="data.root has no meaning for photos"):
        Photos(root="x").setup(0)


def test_val_images_are_held_out() -> None:
    data = Photos(val_images=3, patch=128, stride=512)
    data.setup(0)
    assert len(data.images("val")) == 3 and len(data.images("train")) == 9
    assert not set(data.images("val").names) & set(data.images("train").names)
    assert len(data.split("val")) == 3
    with pytest.raises(UserError, match="leaves none of 12"):
        Photos(val_images=12).setup(0)
    with pytest.raises(UserError, match="set data.val_images"):
        Photos().images("val")


def test_every_pixel_of_an_image_is_in_a_tile(tmp_path: Path) -> None:
    save(tmp_path / "test" / "a.png", value=1)
    save(tmp_path / "train" / "b.png", 41, 53)
    data = ImagesFolder(root=str(tmp_path), patch=16, stride=10)
    train = data.setup(0).split("train").images
    assert train.shape == (4 * 5, 3, 16, 16)
    rows = {int(v) // 3 for v in train[:, 0].unique()}
    columns = {int(v) // 3 for v in train[:, 1].unique()}
    assert rows == set(range(41)) and columns == set(range(53))
    assert data.images("test").names == ["a"]
    few = ImagesFolder(root=str(tmp_path), patch=16, stride=10, patches=7).setup(0).split("train").images
    assert len(few) == 7 and all((train == t).flatten(1).all(1).any() for t in few)


def test_grid() -> None:
    assert grid(41, 16, 10) == [0, 10, 20, 25]
    assert grid(36, 16, 10) == [0, 10, 20]
    assert grid(16, 16, 10) == [0]
    assert grid(42, 18, 10, 3) == [0, 9, 18, 24]


def test_plain_folder_trains_on_the_embedded_or_another(tmp_path: Path) -> None:
    save(tmp_path / "set" / "b.png")
    save(tmp_path / "set" / "sub" / "a.png")
    (tmp_path / "set" / "readme.txt").write_text("no image")
    save(tmp_path / "more" / "c.png", value=7)
    plain = ImagesFolder(root=str(tmp_path / "set"))
    assert plain.images("test").names == ["b", "sub/a"] and len(plain.images("train")) == 12
    other = ImagesFolder(root=str(tmp_path / "set"), train=str(tmp_path / "more"))
    assert other.images("train").names == ["c"]
    with pytest.raises(UserError, match="b.png is both a train and a test image; keep the parts disjoint"):
        ImagesFolder(root=str(tmp_path / "set"), train=str(tmp_path / "set")).setup(0)
    with pytest.raises(UserError, match="data.root is not set"):
        ImagesFolder().setup(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        ImagesFolder(root=str(tmp_path / "empty")).setup(0)


def test_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        save(tmp_path / place / "test" / "a.png")
        save(tmp_path / place / "train" / "b.png")
    one, two = (ImagesFolder(root=str(tmp_path / p)).fingerprint() for p in ("one", "two"))
    save(tmp_path / "two" / "train" / "b.png", value=9)
    assert one == two != ImagesFolder(root=str(tmp_path / "two")).fingerprint()


def test_small_grey_palette_alpha_cmyk_and_turned(tmp_path: Path) -> None:
    folder = tmp_path / "test"
    save(folder / "small.png", 10, 12)
    Image.new("L", (20, 20), 51).save(folder / "grey.png")
    Image.new("RGB", (20, 20), (255, 0, 0)).quantize(4).save(folder / "palette.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(folder / "cmyk.tif")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.new("RGB", (30, 20), "blue").save(folder / "turned.jpg", exif=exif)
    data = ImagesFolder(root=str(folder), patch=16)
    found = {name: image for name, image, _ in data.images("test")}
    assert found["grey"].unique().tolist() == pytest.approx([0.2])
    for red in ("palette", "cmyk"):
        torch.testing.assert_close(found[red][0, :, 3, 3], torch.tensor([1.0, 0, 0]), rtol=0, atol=0.02)
    assert found["clear"].min() == 1
    assert found["turned"].shape == (1, 3, 30, 20)
    assert data.setup(0).split("test").images.shape == (6, 3, 16, 16)  # small ones are mirrored
    grey = ImagesFolder(root=str(folder), channels=1)
    assert grey.images("test")[0][1].shape[1] == 1


def test_resize_and_square(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 40, 60)
    assert ImagesFolder(root=str(tmp_path), resize=20).images("test")[0][1].shape == (1, 3, 20, 30)
    assert ImagesFolder(root=str(tmp_path), resize=20, square=True).images("test")[0][1].shape == (1, 3, 20, 20)


def test_crops_have_all_eight_orientations_and_places() -> None:
    torch.manual_seed(0)
    tile = torch.arange(36.0).view(1, 1, 6, 6)
    crops = CropTurn(3)(tile.repeat(2000, 1, 1, 1))
    windows = [tile[..., y : y + 3, x : x + 3] for y in range(4) for x in range(4)]
    turned = {tuple(t.rot90(k, (2, 3)).flatten().tolist()) for w in windows for k in range(4) for t in (w, w.flip(3))}
    assert {tuple(c.flatten().tolist()) for c in crops} == turned


def test_crops_without_mirror_only_turn() -> None:
    torch.manual_seed(0)
    tile = torch.arange(9.0).view(1, 1, 3, 3)
    found = {tuple(c.flatten().tolist()) for c in CropTurn(0, flip=False)(tile.repeat(200, 1, 1, 1))}
    assert found == {tuple(tile.rot90(k, (2, 3)).flatten().tolist()) for k in range(4)}
    plain = CropTurn(2, multiple=2, flip=False, rotate=False)(torch.arange(16.0).view(1, 1, 4, 4).repeat(50, 1, 1, 1))
    assert {c[0, 0, 0].item() for c in plain} == {0.0, 2.0, 8.0, 10.0}
    with pytest.raises(UserError, match="training crops need tiles of 8 pixels, but data.patch gives 6x6"):
        CropTurn(8)(torch.rand(1, 3, 6, 6))


def test_channels_share_the_draw() -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 12, 12)
    out = CropTurn(6)(torch.cat([x, x + 1], 1))
    torch.testing.assert_close(out[:, :3] + 1, out[:, 3:])
