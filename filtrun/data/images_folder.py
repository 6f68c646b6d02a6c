"""Plain folders of photographs: Set5, Set14, BSD68, Kodak, DIV2K, Places2, CelebA, one's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from filtrun.data.base import folder_of
from filtrun.data.hdr import ALL_SUFFIXES
from filtrun.data.image_set import ImageData, Picture
from filtrun.data.images import readable, subfolders
from filtrun.errors import UserError
from filtrun.options import opt

_PARTS = {"train": ("train", "training", "train_hr"), "test": ("test", "testing", "val", "valid", "validation")}


def find_images(folder: Path) -> list[Path]:
    """Image files below `folder`, sorted by path; other files (lists, tables, licences) are passed over.

    Raises:
        UserError: the folder has no image, or cannot be read.
    """
    found = []
    with readable(folder):
        for where, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [
                Path(where, name)
                for name in names
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in ALL_SUFFIXES
            ]
    if not found:
        raise UserError(f"{folder} has no images ({' '.join(sorted(ALL_SUFFIXES))})")
    return sorted(found)


def pictures_in(folder: Path) -> list[Picture]:
    """Every image below `folder`, named by its path in it without suffix."""
    return [Picture(path.relative_to(folder).with_suffix("").as_posix(), path) for path in find_images(folder)]


def existing_folder(value: str | None, key: str) -> Path:
    """A folder a user named. Raises UserError when it is no folder."""
    path = folder_of(value, key)
    if not path.is_dir():
        raise UserError(f"{key}={value} is not a folder")
    return path


@dataclass
class ImagesFolder(ImageData):
    """Photographs below `root`: the test images, or ``train/`` and ``test/`` (``val/``) folders of them.

    Training images come from `train`, else from ``root/train``, else from the embedded photographs.

    Raises:
        UserError: a folder that is missing or has no images, or the same folder for both.
    """

    train: str | None = opt(None, "folder of training images; null: root/train, else the embedded photographs")

    name: ClassVar[str] = "images"
    licence: ClassVar[str] = "the user's own"
    places: ClassVar[tuple[str, ...]] = ("root", "train")

    def _pictures(self) -> dict[str, list[Picture]]:
        from filtrun.data.photos import photographs

        root = existing_folder(self.root, "data.root")
        inside = {name.lower(): path for name, path in subfolders(root).items()}
        parts = {part: inside[n] for part, names in _PARTS.items() for n in reversed(names) if n in inside}
        test = pictures_in(parts["test"] if "train" in parts and "test" in parts else root)
        if self.train is not None:
            train = pictures_in(existing_folder(self.train, "data.train"))
        elif "train" in parts and "test" in parts:
            train = pictures_in(parts["train"])
        else:
            train = photographs("train")
        return {"train": train, "test": test}

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        if root is None:
            return False, "your own photographs: pass data.root=DIR (and data.train=DIR)"
        try:
            return True, str(folder_of(root))
        except UserError as error:
            return False, str(error)
