"""Missing, broken and hostile files: one clear line each, and no code of theirs runs."""

from __future__ import annotations

import io
import os
import pickle
import socket
import tarfile
import types
import urllib.error

import numpy as np
import pytest
from PIL import Image

from filtrun.data.cifar import CIFAR10_CLASSES, Cifar10, Cifar100
from filtrun.data.mnist import Mnist
from filtrun.data.unpickle import read_pickle
from filtrun.errors import UserError


def fails(cls, root, message):
    with pytest.raises(UserError, match=message) as error:
        cls(root=str(root)).setup(0)
    assert len(str(error.value).splitlines()) == 1


class Payload:
    """A pickle that runs a command when it is read the ordinary way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, files, protocol):
    folder = files.write(tmp_path / "set", files.python_files(files.arrays()))
    evil = pickle.dumps({"data": Payload(tmp_path / "ran"), "labels": []}, protocol=protocol)
    (folder / "data_batch_3").write_bytes(evil)
    fails(Cifar10, folder, "data_batch_3: refused as a pickle of images: it asks for (posix|nt).mkdir")
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)
    assert (tmp_path / "ran").exists(), "the payload itself works, so the refusal was what stopped it"


@pytest.mark.parametrize(
    "blob",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cfunctools\npartial\n(tR.",
        b"cnumpy.core.multiarray\nfromfile\n(tR.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        b"Pid\n.",
        pickle.dumps({"data": np.array([{}], dtype=object)}),
        pickle.dumps([1, 2]),
        pickle.dumps({"data": 1})[:-4],
        b"",
        b"hello",
    ],
)
def test_other_pickles_are_refused(blob):
    with pytest.raises(UserError, match="^there: "):
        read_pickle(blob, "there")


def test_plain_pickles_are_read():
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    for protocol in range(6):
        blob = pickle.dumps({b"a": array, "f": np.asfortranarray(array), "s": "x", "n": [np.int64(3), b"q"]}, protocol)
        got = read_pickle(blob, "there")
        np.testing.assert_array_equal(got["a"], array)
        np.testing.assert_array_equal(got["f"], array)
        assert got["n"] == [3, b"q"] and set(got) == {"a", "f", "s", "n"}


def test_missing_root(tmp_path):
    fails(Cifar10, tmp_path / "no", "data.root=.*no does not exist")
    fails(Cifar10, tmp_path, "has no CIFAR-10; put cifar-10-binary.tar.gz or the folder cifar-10-batches-bin there")
    fails(Mnist, tmp_path, "has no MNIST; put train-images-idx3-ubyte.gz")
    (tmp_path / "a.txt").write_text("x")
    fails(Mnist, tmp_path / "a.txt", "is a file, but not an .npz or an official archive of MNIST")


def test_broken_python_batches(tmp_path, files):
    good = files.python_files(files.arrays())
    rows = np.zeros((4, 3072), np.uint8)
    for batch, message in [
        (good["data_batch_2"][:-1000], "data_batch_2: truncated or corrupt pickle"),
        (files.old_pickle({"data": rows, "labels": [1, 2]}), "data_batch_2 has 4 images but 2 labels"),
        (files.old_pickle({"data": rows[:, :100], "labels": [1] * 4}), "'data' is not an array of 8-bit rows of 3072"),
        (files.old_pickle({"data": rows}), "'labels' is not a list of class ids"),
        (files.old_pickle({"data": rows, "labels": [1, 2, 3, 10]}), r"label 10 is outside 0\.\.9"),
    ]:
        fails(Cifar10, files.write(tmp_path, good | {"data_batch_2": batch}), message)
    (tmp_path / "data_batch_2").unlink()
    fails(Cifar10, tmp_path, "data_batch_2 is missing")


def test_broken_binary_batches(tmp_path, files):
    good = files.binary_files(files.arrays())
    for batch in (good["data_batch_4.bin"][:-1], good["data_batch_4.bin"] + b"\0", b""):
        files.write(tmp_path, good | {"data_batch_4.bin": batch})
        fails(Cifar10, tmp_path, "data_batch_4.bin: .* no whole number of 3073-byte records; truncated or corrupt")
    files.write(tmp_path, good | {"data_batch_4.bin": b"\x0b" + good["data_batch_4.bin"][1:]})
    fails(Cifar10, tmp_path, r"label 11 is outside 0\.\.9")
    hundred = files.binary100_files(files.arrays(classes=100))
    fails(Cifar100, files.write(tmp_path / "c", hundred | {"test.bin": hundred["test.bin"][:-5]}), "3074-byte records")


@pytest.mark.parametrize("zipped", [False, True])
def test_broken_idx(tmp_path, files, zipped):
    import gzip

    suffix = ".gz" if zipped else ""
    pack = gzip.compress if zipped else bytes
    sets = files.arrays((1, 28, 28))
    good, name = files.idx_files(sets, zipped), f"train-images-idx3-ubyte{suffix}"
    plain = files.idx_files(sets)["train-images-idx3-ubyte"]
    for blob, message in [
        (pack(plain[:-1]), "has .* of 39200 bytes; truncated or corrupt"),
        (pack(plain + b"\0"), "goes on after its 39200 bytes"),
        (pack(b"\0\0\x09\x03" + plain[4:]), "is not an idx file of bytes with 3 dimensions"),
        (pack(plain[:7]), "is not an idx file"),
        (pack(plain[:4] + b"\xff" * 12), "corrupt header"),
    ]:
        fails(Mnist, files.write(tmp_path, good | {name: blob}), f"{name} ?.*{message}")
    if zipped:
        fails(Mnist, files.write(tmp_path, good | {name: good[name][:-500]}), "truncated or corrupt")
        fails(Mnist, files.write(tmp_path, good | {name: b"no gzip"}), f"cannot read .*{name}")
    few = files.idx_files(files.arrays((1, 28, 28), train=49), zipped)
    label = f"train-labels-idx1-ubyte{suffix}"
    fails(Mnist, files.write(tmp_path, good | {label: few[label]}), "has 50 images but 49 labels")
    small = files.idx_files(files.arrays((1, 16, 16)), zipped)
    fails(Mnist, files.write(tmp_path, small), "images are 16x16 with 1 channels; MNIST has 28x28 with 1")
    (tmp_path / name).unlink()
    fails(Mnist, tmp_path, r"train-images-idx3-ubyte \(or .gz\) is missing")


def test_broken_npz(tmp_path, files):
    images, labels = files.arrays()["train"]
    images, path = images.transpose(0, 2, 3, 1), tmp_path / "a.npz"
    for content, message in [
        ({"image": images, "labels": labels}, "no array 'images', only image, labels; did you mean 'image'"),
        ({"images": images, "labels": labels, "test_images": images}, "has no array 'test_labels'"),
        ({"images": images, "labels": labels[:7]}, "has 50 images but 7 labels"),
        ({"images": images / 255, "labels": labels}, "images must be uint8"),
        ({"images": images[..., :2], "labels": labels}, "images have 2 channels in the last place, not 3"),
        ({"images": images[:, :30], "labels": labels}, "images are 30x32 with 3 channels; CIFAR-10 has 32x32 with 3"),
        ({"images": images, "labels": labels + 0.5}, "labels must be integers"),
        ({"images": images, "labels": labels - 1}, r"label -1 is outside 0\.\.9"),
        ({"images": images[:0], "labels": labels[:0]}, "has no images"),
        ({"images": np.array([{}], dtype=object), "labels": labels}, "truncated, corrupt or not a plain npz"),
    ]:
        np.savez(path, **content)
        fails(Cifar10, path, message)
    np.savez(path, images=images, labels=labels)
    path.write_bytes(path.read_bytes()[:-2000])
    fails(Cifar10, path, "truncated, corrupt or not a plain npz")
    np.savez(tmp_path / "b.npz", images=images, labels=labels)
    fails(Cifar10, tmp_path, "has 2 .npz files")


def test_broken_trees(tmp_path, files):
    sets = files.arrays(train=20, test=10)
    for part, pair in sets.items():
        files.write_tree(tmp_path / part, *pair, CIFAR10_CLASSES)
    bird = tmp_path / "train" / "bird"
    (bird / "notes.txt").write_text("x")
    fails(Cifar10, tmp_path, "bird/notes.txt is not an image file")
    (bird / "notes.txt").rename(bird / "x.png")
    fails(Cifar10, tmp_path, "bird/x.png is not an image that can be read")
    Image.new("L", (32, 32)).save(bird / "x.png")
    fails(Cifar10, tmp_path, "bird/x.png has 1 channels, not 3")
    Image.new("RGB", (32, 31)).save(bird / "x.png")
    fails(Cifar10, tmp_path, "bird/x.png is 31x32, not 32x32")
    (bird / "x.png").unlink()
    (tmp_path / "train" / "brid").mkdir()
    fails(Cifar10, tmp_path, "brid is not a class name or number of this set; did you mean 'bird'")
    (tmp_path / "train" / "brid").rename(tmp_path / "train" / "2")
    fails(Cifar10, tmp_path, r"has two folders for class 2 \(bird\)")
    (tmp_path / "train" / "2").rmdir()
    for path in bird.iterdir():
        path.unlink()
    fails(Cifar10, tmp_path, "the class folder .*bird has no images")
    (tmp_path / "test").rename(tmp_path / "tset")
    bird.rmdir()
    fails(Cifar10, tmp_path, "test is missing; the tree needs train/CLASS/ and test/CLASS/")


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "extra",
    [
        link("cifar-10-batches-bin/data_batch_1.bin", "/etc/passwd"),
        link("x", "../y", tarfile.LNKTYPE),
        tarfile.TarInfo("../escape"),
        tarfile.TarInfo("/absolute"),
    ],
)
def test_archives_with_links_or_escapes_are_refused(tmp_path, files, extra):
    path = tmp_path / "cifar-10-binary.tar.gz"
    files.write_tar(path, "cifar-10-batches-bin", files.binary_files(files.arrays()), [extra])
    fails(Cifar10, tmp_path, "holds a link or a path outside itself")


def test_broken_archives(tmp_path, files):
    path = tmp_path / "cifar-10-binary.tar.gz"
    contents = files.binary_files(files.arrays())
    files.write_tar(path, "cifar-10-batches-bin", contents)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fails(Cifar10, tmp_path, "truncated or not a .tar.gz")
    path.write_bytes(b"no archive")
    fails(Cifar10, tmp_path, "cifar-10-binary.tar.gz")
    del contents["test_batch.bin"]
    files.write_tar(path, "cifar-10-batches-bin", contents)
    fails(Cifar10, tmp_path, "has no 'cifar-10-batches-bin/test_batch.bin'")
    folder = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    folder.type = tarfile.DIRTYPE
    files.write_tar(path, "cifar-10-batches-bin", contents, [folder])
    fails(Cifar10, tmp_path, "is not a regular file")


def test_no_permission(tmp_path, files, monkeypatch):
    files.write(tmp_path, files.binary_files(files.arrays()))
    from pathlib import Path

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    fails(Cifar10, tmp_path, "cannot read .*data_batch_1.bin: Permission denied")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError("no route\nto host"), "to host"),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError("File not found or corrupted."), "File not found"),
        (ImportError("No module named 'torchvision'"), "torchvision"),
    ],
)
def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch, error, reason):
    def fetch(root, train, download):
        assert socket.getdefaulttimeout() is not None
        raise error

    monkeypatch.setenv("FILTRUN_DATA", str(tmp_path))
    module = types.SimpleNamespace(datasets=types.SimpleNamespace(CIFAR10=fetch))
    monkeypatch.setattr("filtrun.compat.torchvision", lambda: module)
    with pytest.raises(UserError) as caught:
        Cifar10().setup(0)
    message = str(caught.value)
    assert message.startswith("data=cifar10: CIFAR-10 is not here and could not be downloaded (") and reason in message
    assert message.endswith(
        "put cifar-10-binary.tar.gz or the folder cifar-10-batches-bin under DIR and pass data.root=DIR"
    )
    assert len(message.splitlines()) == 1
    assert socket.getdefaulttimeout() is None and list(tmp_path.iterdir()) == []


def test_truncated_png_names_the_file(tmp_path, files):
    from filtrun.data.images import decode

    buffer = io.BytesIO()
    files.image(files.arrays()["train"][0][0]).save(buffer, "PNG")
    path = tmp_path / "cut.png"
    path.write_bytes(buffer.getvalue()[:200])
    with pytest.raises(UserError, match="cut.png is not an image that can be read"):
        decode(path)
