"""Where the files of a well-known set may lie under a root, and how each layout becomes arrays.

Looked for in this order, in the root itself and in the usual subfolder: official python batches, official binary
batches, their .tar.gz, idx files (.gz or not), an npz, a tree of image files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from filtrun.data.archive import read_folder, read_tar
from filtrun.data.images import readable, subfolders
from filtrun.data.readers import from_binary, from_idx, from_npz, from_python, from_tree
from filtrun.data.split import Split, stratified
from filtrun.errors import UserError

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 (N, C, H, W), int64 (N,)
_IDX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Batches:
    """Official batch files: their folder, archive, file names, and where the label of a record is.

    `label` is the key of the labels in a python batch, or the position of the label byte in a binary record that
    starts with `label_bytes` bytes of labels.
    """

    folder: str
    archive: str
    train: Sequence[str]
    test: Sequence[str]
    label: str | int
    label_bytes: int = 1


@dataclass(frozen=True)
class Layout:
    """What a set looks like on disk.

    Attributes:
        title: its name in messages.
        shape: (C, H, W) of every image.
        classes: names by id.
        python, binary: its official batch files, if it has them.
        idx: subfolders in which its idx files may lie, if it has them.
    """

    title: str
    shape: tuple[int, int, int]
    classes: Sequence[str]
    python: Batches | None = None
    binary: Batches | None = None
    idx: Sequence[str] = ()

    def wanted(self) -> str:
        """What to put where, for messages."""
        if self.binary:
            return f"{self.binary.archive} or the folder {self.binary.folder}"
        return "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and " + (
            "t10k-labels-idx1-ubyte.gz"
        )


class Found(NamedTuple):
    kind: str  # python, binary, python archive, binary archive, idx, npz, tree
    path: Path


def locate(root: Path, layout: Layout, official: bool = False) -> Found | None:
    """Which layout lies under `root`, by file names alone; None if there is none.

    Args:
        official: only official files under their own folder or archive name (for a cache shared by several sets).
    """
    with readable(root):
        if root.is_file():
            return _locate_file(root, layout)
        for kind, batches in (("python", layout.python), ("binary", layout.binary)):
            for folder in [root / batches.folder] + [root] * (not official) if batches else []:
                if batches and any((folder / name).is_file() for name in (*batches.train, *batches.test)):
                    return Found(kind, folder)
        for kind, batches in (("binary", layout.binary), ("python", layout.python)):
            if batches and (root / batches.archive).is_file():
                return Found(f"{kind} archive", root / batches.archive)
        for folder in [root / name for name in layout.idx] + [root] * bool(layout.idx and not official):
            if any(_idx_path(folder, part, what) for part in _IDX for what in ("images", "labels")):
                return Found("idx", folder)
        if official:
            return None
        if any(path.suffix == ".npz" for path in root.iterdir()):
            return Found("npz", root)
    if {"train", "test"} & set(subfolders(root)):
        return Found("tree", root)
    return None


def _locate_file(path: Path, layout: Layout) -> Found:
    if path.suffix == ".npz":
        return Found("npz", path)
    for kind, batches in (("binary archive", layout.binary), ("python archive", layout.python)):
        if batches and path.name == batches.archive:
            return Found(kind, path)
    raise UserError(f"data.root={path} is a file, but not an .npz or an official archive of {layout.title}")


def read(found: Found, layout: Layout) -> dict[str, Split]:
    """The splits "train" and "test" of what `locate` found, uint8 (N, C, H, W) on the CPU.

    Raises:
        UserError: naming the file that is missing, cut off, corrupt or of the wrong shape.
    """
    kind, path = found
    if kind == "tree":
        arrays = {part: from_tree(path / part, layout.shape, layout.classes) for part in ("train", "test")}
    elif kind == "npz":
        arrays = _read_npz(path, layout)
    elif kind == "idx":
        arrays = {part: _read_idx(path, part) for part in _IDX}
    else:
        arrays = _read_batches(kind, path, layout)
    for part, (images, labels) in arrays.items():
        _check(images, labels, layout, f"{path} ({part})")
    if "test" not in arrays:
        return _with_test(*arrays["train"])
    return {part: _split(*pair, part) for part, pair in arrays.items()}


def _read_batches(kind: str, path: Path, layout: Layout) -> dict[str, Arrays]:
    batches = layout.python if kind.startswith("python") else layout.binary
    assert batches is not None
    names = [*batches.train, *batches.test]
    blobs = read_tar(path, batches.folder, names) if kind.endswith("archive") else read_folder(path, names)
    arrays = {}
    for part, files in (("train", batches.train), ("test", batches.test)):
        pairs = []
        for name in files:
            where, blob = f"{path}/{name}", blobs.pop(name)  # pop: the raw bytes go once they are arrays
            if isinstance(batches.label, str):
                pairs.append(from_python(blob, where, layout.shape, batches.label))
            else:
                pairs.append(from_binary(blob, where, layout.shape, batches.label_bytes, batches.label))
        images, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
        arrays[part] = (images, labels)
    return arrays


def _idx_path(folder: Path, part: str, what: str) -> Path | None:
    dims = 3 if what == "images" else 1
    for joint in ("-", "."):
        for suffix in ("", ".gz"):
            path = folder / f"{_IDX[part]}-{what}{joint}idx{dims}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _read_idx(folder: Path, part: str) -> Arrays:
    paths = {what: _idx_path(folder, part, what) for what in ("images", "labels")}
    for what, path in paths.items():
        if path is None:
            dims = 3 if what == "images" else 1
            raise UserError(f"{folder / f'{_IDX[part]}-{what}-idx{dims}-ubyte'} (or .gz) is missing")
    assert paths["images"] and paths["labels"]
    return from_idx(paths["images"], 3)[:, None], from_idx(paths["labels"], 1).astype(np.int64)


def _read_npz(path: Path, layout: Layout) -> dict[str, Arrays]:
    if path.is_file():
        return from_npz(path, layout.shape)
    files = sorted(path.glob("*.npz"))
    names = {file.name for file in files}
    if {"train.npz", "test.npz"} <= names:
        return {part: from_npz(path / f"{part}.npz", layout.shape)["train"] for part in ("train", "test")}
    if len(files) > 1:
        raise UserError(
            f"{path} has {len(files)} .npz files; name them train.npz and test.npz, or pass one as data.root"
        )
    return from_npz(files[0], layout.shape)


def _check(images: np.ndarray, labels: np.ndarray, layout: Layout, where: str) -> None:
    if not len(images):
        raise UserError(f"{where} has no images")
    if len(images) != len(labels):
        raise UserError(f"{where} has {len(images)} images but {len(labels)} labels")
    if images.shape[1:] != layout.shape:
        (c, h, w), (cc, hh, ww) = images.shape[1:], layout.shape
        raise UserError(f"{where}: images are {h}x{w} with {c} channels; {layout.title} has {hh}x{ww} with {cc}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(layout.classes):
        raise UserError(f"{where}: label {low if low < 0 else high} is outside 0..{len(layout.classes) - 1}")


def _split(images: np.ndarray, labels: np.ndarray, name: str) -> Split:
    images = np.require(images, requirements=["C", "W"])  # torch wants memory it may write to
    return Split(torch.from_numpy(images), torch.from_numpy(labels), name=name)


def _with_test(images: np.ndarray, labels: np.ndarray) -> dict[str, Split]:
    """One array without a test part: a fifth of every class, always the same, becomes the test set."""
    parts = zip(("train", "test"), stratified(torch.from_numpy(labels), 0.2, "files"), strict=True)
    return {name: _split(images[rows.numpy()], labels[rows.numpy()], name) for name, rows in parts}
