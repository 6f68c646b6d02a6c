"""The embedded set, and through it what every `Data` does with its options."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from filtrun.data.digits import Digits
from filtrun.errors import UserError


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits()
    data.setup(0)
    return data


def test_pixels_and_counts_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    parts = [digits._sets[name] for name in ("train", "test")]
    assert sum(len(part) for part in parts) == 1797
    assert sum(part.labels.bincount() for part in parts).tolist() == np.bincount(source.target).tolist()
    ours = sorted(bytes(image.flatten().tolist()) for part in parts for image in part.images)
    theirs = np.floor(source.data * 255 / 16 + 0.5).astype(np.uint8)
    assert ours == sorted(row.tobytes() for row in theirs)
    assert (digits.channels, digits.image_size, digits.num_classes) == (1, 8, 10)


def test_test_set_is_a_fifth_of_every_class_for_every_seed(digits):
    test = digits.split("test")
    whole = test.labels.bincount() + digits._sets["train"].labels.bincount()
    assert test.labels.bincount().tolist() == [round(0.2 * n) for n in whole.tolist()]
    assert torch.equal(Digits().setup(5).split("test").images, test.images)


def test_validation_is_cut_from_training_by_seed(digits):
    train, val = digits.split("train"), digits.split("val")
    assert not set(train.index.tolist()) & set(val.index.tolist())
    assert len(train) + len(val) == train.parent_len == val.parent_len
    other = Digits().setup(1)
    assert other.split("val").index.tolist() != val.index.tolist()
    assert other.setup(0).split("val").index.tolist() == val.index.tolist()
    assert Digits().setup(0).split("val").index.tolist() == val.index.tolist()


def test_source_and_target_part_the_classes(digits):
    assert digits.source == list(range(7)) and digits.target == [7, 8, 9]
    for name in ("train", "val", "test"):
        source, target = digits.split(name, "source"), digits.split(name, "target")
        assert source.class_ids == list(range(7)) and target.class_ids == [7, 8, 9]
        assert sorted([*source.index.tolist(), *target.index.tolist()]) == digits.split(name).index.tolist()
        assert digits.split(name, "retain") is source and digits.split(name, "forget") is target


def test_source_follows_target():
    assert Digits(target=[0]).source == list(range(1, 10))
    assert Digits(source=[1, 2], target=[0]).source == [1, 2]
    assert Digits(target=[]).source == list(range(10))


def test_few_shot_cuts_all_and_target_but_not_source(digits):
    few = Digits(few_shot=5).setup(0)
    assert few.split("train").labels.bincount().tolist() == [5] * 10
    assert few.split("train", "target").labels.bincount().tolist() == [0] * 7 + [5] * 3
    assert len(few.split("train", "source")) == len(digits.split("train", "source"))
    shots = set(few.split("train", "target").index.tolist())
    assert shots <= set(few.split("train").index.tolist())
    assert len(few.split("test")) == len(digits.split("test"))


def test_mean_std_is_that_of_numpy(digits):
    values = digits._sets["train"].images.numpy() / 255
    mean, std = digits.mean_std()
    assert mean == pytest.approx([values.mean()], abs=1e-12) and std == pytest.approx([values.std()], abs=1e-12)


def test_fingerprint_is_the_content():
    assert Digits().fingerprint() == Digits(target=[1], few_shot=3, val_fraction=0.2).setup(7).fingerprint()
    changed = Digits().setup(0)
    changed._sets["train"].images[0, 0, 0, 0] += 1
    assert changed.fingerprint() != Digits().fingerprint()


def test_augmentation_follows_the_options():
    assert Digits().augmentation() is None
    augment = Digits(crop_pad=1, flip=True, cutout=2).augmentation()
    assert (augment.crop_pad, augment.flip, augment.cutout) == (1, True, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": [12]}, r"data.target has 12, but digits has classes 0\.\.9"),
        ({"source": [-1]}, r"data.source has -1, but digits has classes 0\.\.9"),
        ({"source": [3, 7]}, "data.source and data.target both have class 7"),
        ({"target": [1, 1]}, "names a class twice"),
        ({"target": list(range(10))}, "leaves no source class"),
        ({"val_fraction": 1.5}, r"data.val_fraction=1.5 is out of range; allowed is \[0.0, 0.9\]"),
        ({"few_shot": -1}, "data.few_shot=-1 is out of range"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Digits(**options)


@pytest.mark.parametrize(
    ("options", "split", "message"),
    [
        ({"root": "x"}, ("train",), "data.root has no meaning for digits"),
        ({"target": []}, ("train", "target"), "data.target is empty"),
        ({"val_fraction": 0.0}, ("val",), "data.val_fraction=0.0 leaves no validation images"),
        ({"few_shot": 500}, ("train",), "data.few_shot=500: class 0 has only"),
        ({}, ("trian",), "did you mean 'train'"),
        ({}, ("train", "tarhet"), "did you mean 'target'"),
    ],
)
def test_bad_requests(options, split, message):
    with pytest.raises(UserError, match=message):
        Digits(**options).setup(0).split(*split)


def test_available():
    assert Digits.available() == (True, "comes with scikit-learn")


def test_import_does_not_load_heavy_libraries():
    code = (
        "import sys, filtrun.data.digits, filtrun.data.cifar, filtrun.data.mnist, filtrun.data.folder; "
        "print([m for m in ('sklearn', 'torchvision', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
