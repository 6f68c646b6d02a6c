"""A user's own images: a folder of class folders, of train/test folders, or of loose files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from filtrun.data.base import Data, folder_of
from filtrun.data.images import SUFFIXES, decode, decode_all, image_files, readable, subfolders
from filtrun.data.split import LazyImages, Split, stratified
from filtrun.errors import UserError
from filtrun.options import opt

_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_HEAD = 16384  # bytes hashed at either end of a file


class ImageFiles:
    """Image files that are decoded when asked for (see `filtrun.data.split.LazyImages`)."""

    def __init__(self, paths: Sequence[str], channels: int, size: int) -> None:
        self.paths, self.channels, self.size = list(paths), channels, size
        self.shape = (len(self.paths), channels, size, size)

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: list[int]) -> ImageFiles:
        return ImageFiles([self.paths[i] for i in rows], self.channels, self.size)

    def decode(self, rows: list[int]) -> Tensor:
        """uint8 (len(rows), C, size, size)."""
        out = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for i, row in enumerate(rows):
            out[i] = torch.from_numpy(decode(self.paths[row], self.channels, self.size))
        return out


@dataclass
class Folder(Data):
    """Images below `root`, laid out in one of these ways.

    - ``train/CLASS/...`` and ``test/CLASS/...`` (and ``val/CLASS/...``; without a test folder val is the test set),
    - ``CLASS/...``: a fifth of every class, always the same, is the test set,
    - loose files, also within ``train/`` and ``test/``: one class called "images".

    The shorter side is resized to `size` and the centre square is cropped; transparency is laid over white and the
    EXIF orientation is applied. Files in folders below a class folder belong to that class.

    Raises:
        UserError: a file that is not an image, a class folder without images, a test class that training lacks.
    """

    size: int = opt(64, "side of the square images in pixels", low=1, high=8192)
    channels: int = opt(3, "1: grey, 3: RGB", choices=(1, 3))  # type: ignore[misc]
    in_memory: bool | str = opt(
        "auto", "decode everything at the start; auto: if it fits", choices=("auto", True, False)
    )
    memory_mb: int = opt(2048, "what in_memory=auto may use for decoded images", low=0)
    workers: int | None = opt(
        None, "decoding processes for images that are not in memory; null: by the machine's cores", low=0, high=256
    )

    name: ClassVar[str] = "folder"
    licence: ClassVar[str] = "the user's own"

    def _load(self) -> dict[str, Split]:
        self._root = folder_of(self.root)
        self.image_size = self.size  # type: ignore[misc]
        files = self._scan()
        total = sum(len(paths) for paths, _ in files.values()) * self.channels * self.size**2
        resident = total <= self.memory_mb << 20 if self.in_memory == "auto" else bool(self.in_memory)
        self._files = files
        sets = {}
        for part, (paths, labels) in files.items():
            images: Tensor | LazyImages
            if resident:
                images = decode_all(paths, self.channels, self.size, self.size, convert=True)
            else:
                images = ImageFiles([str(path) for path in paths], self.channels, self.size)
            sets[part] = Split(images, torch.tensor(labels, dtype=torch.long), name=part)
        return sets

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        if root is None:
            return False, "your own images: pass data.root=DIR"
        try:
            return True, str(folder_of(root))
        except UserError as error:
            return False, str(error)

    def _digest(self) -> str:
        """From relative paths, sizes and both ends of every file, so large photos are not read through."""
        digest = hashlib.blake2b(f"{self.size} {self.channels}".encode(), digest_size=16)
        for part in sorted(self._files):
            for path, label in zip(*self._files[part], strict=True):
                with readable(path), open(path, "rb") as file:
                    length = path.stat().st_size
                    digest.update(f"\0{part}\0{path.relative_to(self._root).as_posix()}\0{length}\0{label}\0".encode())
                    digest.update(file.read(_HEAD))
                    file.seek(max(_HEAD, length - _HEAD))
                    digest.update(file.read(_HEAD))
        return digest.hexdigest()

    def _scan(self) -> dict[str, tuple[list[Path], list[int]]]:
        """Paths and labels of each part, from the file names alone; sets the classes."""
        if not self._root.is_dir():
            raise UserError(f"data.root={self.root} is not a folder")
        folders = subfolders(self._root)
        parts = {part: folders[n] for part, names in _PARTS.items() for n in names if n in folders}
        if "train" not in parts:
            classes = _by_class(self._root)
            self.classes = tuple(classes)  # type: ignore[misc]
            return _with_test(*_flatten(classes, self.classes))
        trees = {part: _by_class(folder) for part, folder in parts.items()}
        self.classes = tuple(trees["train"])  # type: ignore[misc]
        for part, tree in trees.items():
            for name in tree:
                if name not in self.classes:
                    raise UserError(f"{parts[part]} has class {name!r}, which {parts['train']} has not")
        files = {part: _flatten(tree, self.classes) for part, tree in trees.items()}
        if "test" not in files and "val" in files:
            files["test"] = files.pop("val")
        return files if "test" in files else _with_test(*files["train"])


def _with_test(paths: list[Path], labels: list[int]) -> dict[str, tuple[list[Path], list[int]]]:
    """A fifth of every class, always the same, becomes the test set."""
    parts = zip(("train", "test"), stratified(torch.tensor(labels), 0.2, "files"), strict=True)
    return {
        part: ([paths[i] for i in rows.tolist()], [labels[i] for i in rows.tolist()])
        for part, rows in parts
        if len(rows)
    }


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files by class name; loose files are the class "images".

    Raises:
        UserError: images lie beside class folders, or there are none.
    """
    folders = subfolders(folder)
    if not folders:
        try:
            return {"images": image_files(folder)}
        except UserError as error:
            if "has no images" in str(error):
                raise UserError(f"{folder} has no images and no class folders") from error
            raise
    with readable(folder):
        loose = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if loose:
        raise UserError(f"{folder} has class folders and loose images ({loose[0]}); move them into a class folder")
    return {name: image_files(path) for name, path in folders.items()}


def _flatten(tree: dict[str, list[Path]], classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    pairs = [(path, classes.index(name)) for name, paths in tree.items() for path in paths]
    return [path for path, _ in pairs], [label for _, label in pairs]
