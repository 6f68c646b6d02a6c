"""Round trips: random arrays written in every layout come back value by value."""

from __future__ import annotations

import numpy as np
import pytest

from filtrun.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES, Cifar10, Cifar100
from filtrun.data.mnist import FASHION_CLASSES, FashionMnist, Mnist

GREY = (1, 28, 28)


def check(data, sets):
    """The splits of `data` hold the arrays `sets`, in their order."""
    data.setup(0)
    for part, (images, labels) in sets.items():
        split = data._sets[part]
        np.testing.assert_array_equal(split.images.numpy(), images)
        np.testing.assert_array_equal(split.labels.numpy(), labels)
    return data


@pytest.mark.parametrize("where", ["cifar-10-batches-py", "."])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar10_python(tmp_path, files, where, protocol):
    sets = files.arrays()
    files.write(tmp_path / where, files.python_files(sets, protocol=protocol))
    check(Cifar10(root=str(tmp_path)), sets)


def test_cifar10_python_as_python2_wrote_it(tmp_path, files, monkeypatch):
    sets = files.arrays()
    monkeypatch.setattr(files, "old_pickle", lambda batch, protocol: files.python2_pickle(batch))
    contents = files.python_files(sets)
    assert b"cnumpy.core.multiarray\n_reconstruct" in contents["data_batch_1"]
    assert b"_codecs" not in contents["data_batch_1"]
    files.write(tmp_path, contents)
    check(Cifar10(root=str(tmp_path)), sets)


@pytest.mark.parametrize("where", ["cifar-10-batches-bin", "."])
def test_cifar10_binary(tmp_path, files, where):
    sets = files.arrays()
    files.write(tmp_path / where, files.binary_files(sets))
    data = check(Cifar10(root=str(tmp_path)), sets)
    assert data.source == list(range(8)) and data.target == [8, 9] and data.classes == CIFAR10_CLASSES
    assert (data.num_classes, data.channels, data.image_size) == (10, 3, 32)


def test_cifar10_archives_as_root_or_in_it(tmp_path, files):
    sets = files.arrays()
    for kind, folder, write in (
        ("python", "cifar-10-batches-py", files.python_files),
        ("binary", "cifar-10-batches-bin", files.binary_files),
    ):
        root = tmp_path / kind
        root.mkdir()
        archive = files.write_tar(root / f"cifar-10-{kind}.tar.gz", folder, write(sets))
        check(Cifar10(root=str(root)), sets)
        check(Cifar10(root=str(archive)), sets)
        assert [path.name for path in root.iterdir()] == [archive.name], "nothing may be unpacked to disk"


@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar100(tmp_path, files, kind, packed):
    sets = files.arrays(train=200, test=100, classes=100)
    contents = files.python100_files(sets) if kind == "python" else files.binary100_files(sets)
    if packed:
        files.write_tar(tmp_path / f"cifar-100-{kind}.tar.gz", f"cifar-100-{kind}", contents)
    else:
        files.write(tmp_path / f"cifar-100-{kind}", contents)
    data = check(Cifar100(root=str(tmp_path)), sets)
    assert data.source == list(range(80)) and data.target == list(range(80, 100))
    assert len(set(CIFAR100_CLASSES)) == 100 and list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("cls", "where"), [(Mnist, "."), (Mnist, "MNIST/raw"), (FashionMnist, "FashionMNIST/raw"), (FashionMnist, ".")]
)
def test_idx(tmp_path, files, cls, where, zipped):
    sets = files.arrays(GREY)
    files.write(tmp_path / where, files.idx_files(sets, zipped))
    check(cls(root=str(tmp_path)), sets)


def test_both_mnists_under_one_root(tmp_path, files):
    one, two = files.arrays(GREY, seed=1), files.arrays(GREY, seed=2)
    files.write(tmp_path / "MNIST/raw", files.idx_files(one))
    files.write(tmp_path / "FashionMNIST/raw", files.idx_files(two))
    check(Mnist(root=str(tmp_path)), one)
    check(FashionMnist(root=str(tmp_path)), two)


def test_npz_in_its_forms(tmp_path, files):
    sets = files.arrays(GREY)
    (x, y), (xt, yt) = sets["train"], sets["test"]
    one = tmp_path / "one" / "any.npz"
    one.parent.mkdir()
    np.savez(one, images=x[:, 0], labels=y, test_images=xt[:, 0], test_labels=yt)
    check(Mnist(root=str(one)), sets)
    check(Mnist(root=str(one.parent)), sets)
    two = tmp_path / "two"
    two.mkdir()
    np.savez_compressed(two / "train.npz", images=x.transpose(0, 2, 3, 1), labels=y[:, None].astype(np.uint8))
    np.savez_compressed(two / "test.npz", images=xt.transpose(0, 2, 3, 1), labels=yt)
    check(Mnist(root=str(two)), sets)


def test_npz_without_test_part_is_split_the_same_way_each_time(tmp_path, files):
    images, labels = files.arrays(train=100)["train"]
    path = tmp_path / "mine.npz"
    np.savez(path, images=images.transpose(0, 2, 3, 1), labels=labels)
    data, again = (Cifar10(root=str(path)).setup(seed) for seed in (0, 1))
    assert data._sets["test"].labels.bincount().tolist() == [2] * 10
    assert data.fingerprint() == again.fingerprint()
    both = np.concatenate([data._sets[part].images.numpy() for part in ("train", "test")])
    assert sorted(i.tobytes() for i in both) == sorted(i.tobytes() for i in images)


@pytest.mark.parametrize("by_name", [True, False])
def test_tree(tmp_path, files, by_name):
    sets = files.arrays(train=30, test=10)
    names = CIFAR10_CLASSES if by_name else [str(c) for c in range(10)]
    for part, pair in sets.items():
        files.write_tree(tmp_path / part, *pair, names)
    by_class = {part: (x[np.argsort(y, kind="stable")], np.sort(y)) for part, (x, y) in sets.items()}
    check(Cifar10(root=str(tmp_path)), by_class)


def test_tree_with_the_names_of_fashion_mnist(tmp_path, files):
    sets = files.arrays(GREY, train=20, test=10)
    for part, pair in sets.items():
        files.write_tree(tmp_path / part, *pair, [name.replace("/", "-") for name in FASHION_CLASSES])
    by_class = {part: (x[np.argsort(y, kind="stable")], np.sort(y)) for part, (x, y) in sets.items()}
    check(FashionMnist(root=str(tmp_path)), by_class)


def test_fingerprint_is_the_same_for_every_format_and_place(tmp_path, files):
    sets = files.arrays()
    files.write(tmp_path / "a" / "cifar-10-batches-bin", files.binary_files(sets))
    files.write(tmp_path / "b", files.python_files(sets))
    prints = {Cifar10(root=str(tmp_path / name)).fingerprint() for name in "ab"}
    (tmp_path / "a").rename(tmp_path / "moved")
    prints.add(Cifar10(root=str(tmp_path / "moved")).fingerprint())
    assert len(prints) == 1
    file = tmp_path / "moved" / "cifar-10-batches-bin" / "test_batch.bin"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    assert Cifar10(root=str(tmp_path / "moved")).fingerprint() not in prints


def test_the_cache_is_used_without_a_network(tmp_path, files, monkeypatch):
    monkeypatch.setenv("FILTRUN_DATA", str(tmp_path))
    assert Cifar10.available()[0] is False and "cifar-10-binary.tar.gz" in Cifar10.available()[1]
    sets = files.arrays()
    files.write(tmp_path / "cifar-10-batches-bin", files.binary_files(sets))
    assert Cifar10.available() == (True, f"{tmp_path}/cifar-10-batches-bin (binary)")
    assert Cifar100.available()[0] is False and Mnist.available()[0] is False
    check(Cifar10(), sets)


def test_download_lands_whole_in_the_cache(tmp_path, files, monkeypatch):
    """torchvision's class, replaced by one that writes what it would have fetched."""
    import types
    from pathlib import Path

    sets = files.arrays()

    def fetch(root, train, download):
        assert train and download
        files.write(Path(root) / "cifar-10-batches-py", files.python_files(sets))
        print("noise")

    module = types.SimpleNamespace(datasets=types.SimpleNamespace(CIFAR10=fetch))
    monkeypatch.setattr("filtrun.compat.torchvision", lambda: module)
    monkeypatch.setenv("FILTRUN_DATA", str(tmp_path / "cache"))
    check(Cifar10(), sets)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cifar-10-batches-py"]
