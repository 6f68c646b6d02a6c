"""A user's own images: layouts, conversions, streaming and in-memory giving the same pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from filtrun.data.folder import Folder
from filtrun.data.images import decode
from filtrun.data.loader import epoch_batches
from filtrun.errors import UserError

NAMES = ["ant", "bee", "cow"]


@pytest.fixture
def tree(tmp_path, files):
    """30 images of 8x8 in three class folders."""
    images, labels = files.arrays((3, 8, 8), train=30, classes=3)["train"]
    files.write_tree(tmp_path / "set", images, labels, NAMES)
    return tmp_path / "set", images, labels


def test_class_folders_are_split_by_class(tree):
    root, images, _ = tree
    data = Folder(root=str(root), size=8).setup(0)
    assert list(data.classes) == NAMES and (data.num_classes, data.channels, data.image_size) == (3, 3, 8)
    assert data.split("test").labels.bincount().tolist() == [2, 2, 2]
    both = torch.cat([data._sets[part].images for part in ("train", "test")]).numpy()
    assert sorted(i.tobytes() for i in both) == sorted(i.tobytes() for i in images)
    assert torch.equal(Folder(root=str(root), size=8).setup(9).split("test").images, data.split("test").images)


def test_train_val_test_folders(tmp_path, files):
    sets = files.arrays((1, 6, 6), train=12, test=6, classes=3)
    for part, name in (("train", "train"), ("test", "test"), ("test", "valid")):
        files.write_tree(tmp_path / name, *sets[part], NAMES)
    data = Folder(root=str(tmp_path), size=6, channels=1).setup(0)
    order = np.argsort(sets["train"][1], kind="stable")
    np.testing.assert_array_equal(data.split("train").images.numpy(), sets["train"][0][order])
    assert len(data.split("val")) == len(data.split("test")) == 6
    assert data.channels == 1


def test_val_stands_in_for_a_missing_test_folder(tmp_path, files):
    sets = files.arrays((3, 6, 6), train=30, test=6, classes=3)
    files.write_tree(tmp_path / "train", *sets["train"], NAMES)
    files.write_tree(tmp_path / "val", *sets["test"], NAMES)
    data = Folder(root=str(tmp_path), size=6).setup(0)
    assert len(data.split("test")) == 6 and len(data.split("val")) == 3 and len(data.split("train")) == 27


def test_flat_files_are_one_class(tmp_path, files):
    for i, pixels in enumerate(files.arrays((3, 8, 8))["train"][0][:10]):
        files.image(pixels).save(tmp_path / f"{i}.png")
    data = Folder(root=str(tmp_path), size=8).setup(0)
    assert list(data.classes) == ["images"] and len(data.split("test")) == 2
    with pytest.raises(UserError, match="data.target is empty"):
        data.split("train", "target")
    with pytest.raises(UserError, match="folder has the single class 'images'"):
        Folder(root=str(tmp_path), size=8, target=[0]).setup(0)


def test_numeric_class_names_are_in_the_order_of_the_numbers(tmp_path, files):
    images, labels = files.arrays((3, 4, 4), train=24, classes=12)["train"]
    files.write_tree(tmp_path, images, labels, [str(c) for c in range(12)])
    assert list(Folder(root=str(tmp_path), size=4).setup(0).classes) == [str(c) for c in range(12)]


def test_stream_and_memory_give_the_same_batches(tree):
    root, *_ = tree
    resident = Folder(root=str(root), size=8, in_memory=True).setup(0)
    stream = Folder(root=str(root), size=8, in_memory=False, target=[2]).setup(0)
    assert resident.split("train").tensor_backed and not stream.split("train").tensor_backed
    assert not Folder(root=str(root), size=8, memory_mb=0).setup(0).split("train").tensor_backed
    assert Folder(root=str(root), size=8, memory_mb=1).setup(0).split("train").tensor_backed
    options = {"seed": 1, "epoch": 2, "device": "cpu"}
    pairs = zip(
        epoch_batches(resident.split("train"), 6, **options),
        epoch_batches(stream.split("train"), 6, workers=2, **options),
        strict=True,
    )
    for a, b in pairs:
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.index, b.index)
    assert stream.split("train", "target").class_ids == [2]
    batch = stream.split("train", "target").few_shot(2, 0).batch([1, 0])
    assert batch.x.shape == (2, 3, 8, 8) and batch.y.tolist() == [2, 2]
    assert stream.mean_std() == resident.mean_std()


def test_fingerprint_survives_a_move_and_sees_a_change(tree, tmp_path):
    root, *_ = tree
    before = Folder(root=str(root), size=8).fingerprint()
    assert Folder(root=str(root), size=8, in_memory=False).fingerprint() == before
    assert Folder(root=str(root), size=4).fingerprint() != before
    moved = root.rename(tmp_path / "elsewhere")
    assert Folder(root=str(moved), size=8).fingerprint() == before
    file = next((moved / "bee").iterdir())
    pixels = np.array(Image.open(file))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(file)
    changed = Folder(root=str(moved), size=8).fingerprint()
    assert changed != before
    file.rename(file.with_name("other.png"))
    assert Folder(root=str(moved), size=8).fingerprint() not in (before, changed)


def test_bad_folders(tree, files):
    root, *_ = tree

    def fails(message, **options):
        with pytest.raises(UserError, match=message) as error:
            Folder(size=8, **({"root": str(root)} | options)).setup(0).split("train")
        assert len(str(error.value).splitlines()) == 1

    fails("data.root is not set; pass data.root=DIR", root=None)
    fails("does not exist", root=str(root / "no"))
    fails("is not a folder", root=str(next((root / "ant").iterdir())))
    fails(r"data.target has 3, but folder has classes 0\.\.2", target=[3])
    fails("both have class 1", source=[0, 1], target=[1])
    fails("data.few_shot=9: class 0 has only 7 images", few_shot=9)
    fails("data.channels=2 is not allowed", channels=2)
    fails("data.in_memory=maybe is not allowed", in_memory="maybe")
    (root / "dog").mkdir()
    fails("the class folder .*dog has no images")
    (root / "dog" / "readme.md").write_text("x")
    fails("dog/readme.md is not an image file; allowed: .bmp")
    (root / "dog" / "readme.md").rename(root / "dog" / "x.jpg")
    fails("dog/x.jpg is not an image that can be read")
    (root / "dog" / "x.jpg").rename(root / "x.jpg")
    (root / "dog").rmdir()
    fails(r"has class folders and loose images \(x.jpg\)")


def test_class_only_in_test(tmp_path, files):
    images, labels = files.arrays((3, 4, 4), train=9, classes=3)["train"]
    files.write_tree(tmp_path / "train", images[labels < 2], labels[labels < 2], NAMES)
    files.write_tree(tmp_path / "test", images, labels, NAMES)
    with pytest.raises(UserError, match="test has class 'cow', which .*train has not"):
        Folder(root=str(tmp_path), size=4).setup(0)


def test_empty_root(tmp_path):
    with pytest.raises(UserError, match="has no images and no class folders"):
        Folder(root=str(tmp_path)).setup(0)


def test_available(tmp_path):
    assert Folder.available()[0] is False
    assert Folder.available(str(tmp_path)) == (True, str(tmp_path))


# ---- decoding


def save(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_resize_shorter_side_and_centre_crop(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(pixels))
    got = decode(path, 3, 10)
    whole = Image.fromarray(pixels).resize((25, 10), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got, np.asarray(whole)[:, 7:17].transpose(2, 0, 1))
    np.testing.assert_array_equal(decode(path, 3, 40), pixels[:, 30:70].transpose(2, 0, 1))


def test_exif_orientation(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = save(tmp_path, Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(decode(path)[0], np.rot90(pixels, -1))


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[1, 1] = (0, 0, 0, 51)
    got = decode(save(tmp_path, Image.fromarray(rgba)))
    assert got[:, 0, 0].tolist() == [10, 20, 30] and got[:, 0, 1].tolist() == [255] * 3
    assert got[:, 1, 1].tolist() == [204] * 3
    la = Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA")
    assert decode(save(tmp_path, la)).tolist() == [[[100, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    assert decode(save(tmp_path, palette))[:, 0].T.tolist() == [[9, 8, 7], [1, 2, 3]]
    assert decode(save(tmp_path, palette, transparency=1))[:, 0].T.tolist() == [[9, 8, 7], [255] * 3]


def test_deep_and_odd_modes(tmp_path):
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = np.round(wide / 257).astype(np.uint8).tolist()
    assert decode(save(tmp_path, Image.fromarray(wide))).tolist() == [expected]
    assert decode(save(tmp_path, Image.fromarray(wide), "a.tif")).tolist() == [expected]
    bits = Image.fromarray(np.array([[True, False]]))
    assert decode(save(tmp_path, bits)).tolist() == [[[255, 0]]]
    assert decode(save(tmp_path, Image.new("CMYK", (1, 1)), "a.jpg")).shape == (3, 1, 1)
    with pytest.raises(UserError, match="a.tif has 32-bit float pixels"):
        decode(save(tmp_path, Image.new("F", (2, 2)), "a.tif"))


def test_grey_and_colour_conversion(tmp_path):
    path = save(tmp_path, Image.new("RGB", (1, 1), (200, 100, 50)))
    assert decode(path, 1).item() == (200 * 19595 + 100 * 38470 + 50 * 7471 + 0x8000) >> 16
    assert decode(save(tmp_path, Image.new("L", (1, 1), 7)), 3).tolist() == [[[7]]] * 3
