"""The photographs that come with scikit-image and scikit-learn: real images without files or network."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from filtrun.data.image_set import ImageData, Picture
from filtrun.data.images_folder import existing_folder, pictures_in
from filtrun.errors import UserError
from filtrun.options import opt

FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
PHOTOS: dict[str, list[str]] = {
    "train": [
        "skimage/astronaut.png", "skimage/camera.png", "skimage/coffee.png", "skimage/motorcycle_left.png",
        "skimage/brick.png", "skimage/grass.png", "skimage/gravel.png", "skimage/hubble_deep_field.jpg",
        "skimage/ihc.png", "skimage/page.png", "skimage/text.png", "sklearn/china.jpg",
    ],
    "test": ["skimage/chelsea.png", "skimage/rocket.jpg", "skimage/coins.png", "sklearn/flower.jpg"],
}  # fmt: skip


def photographs(part: str) -> list[Picture]:
    """The embedded photographs of "train" or "test".

    Raises:
        UserError: a package that has them is not installed, or has dropped one.
    """
    found = []
    for entry in PHOTOS[part]:
        package, _, name = entry.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the photograph {name} comes with {package}: pip install scikit-{package[2:]}")
        path = Path(spec.origin).parent / FOLDERS[package] / name
        if not path.is_file():
            raise UserError(f"this version of scikit-{package[2:]} has no photograph {name}: {path} is missing")
        found.append(Picture(Path(name).stem, path))
    return found


@dataclass
class Photos(ImageData):
    """Twelve photographs to train on, four others (cat, rocket, coins, flower) to test on.

    They are read from the installed packages; grey ones count as RGB with equal channels.

    Raises:
        UserError: a named folder that is missing or has no images.
    """

    test: str | None = opt(None, "folder of test images instead of the four (Set5, for example)")
    train: str | None = opt(None, "folder of training images added to the twelve")

    name: ClassVar[str] = "photos"
    licence: ClassVar[str] = "public domain, CC0 and CC BY 2.0 (see the README files of both packages)"
    places: ClassVar[tuple[str, ...]] = ("root", "test", "train")

    def _pictures(self) -> dict[str, list[Picture]]:
        if self.root is not None:
            raise UserError("data.root has no meaning for photos; use data.test=DIR or data.train=DIR, or data=images")
        extra = pictures_in(existing_folder(self.train, "data.train")) if self.train is not None else []
        test = photographs("test") if self.test is None else pictures_in(existing_folder(self.test, "data.test"))
        return {"train": photographs("train") + extra, "test": test}

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        try:
            photographs("train")
        except UserError as error:
            return False, str(error)
        return True, "comes with scikit-image and scikit-learn"
