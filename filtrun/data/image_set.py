"""Photographs of any size: training tiles in one tensor, whole images for the test, single or in pairs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from filtrun.data.base import Data
from filtrun.data.hdr import read_image
from filtrun.data.images import is_grey, readable
from filtrun.data.split import Split, permutation
from filtrun.errors import UserError
from filtrun.options import opt

CACHE_BYTES = 256 << 20
_HEAD = 16384  # bytes hashed at either end of a file


@dataclass(frozen=True)
class Picture:
    """One image file, or two: the input `path` and the `target` it should become."""

    name: str
    path: Path
    target: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.target is None else [self.path, self.target]


class ImageSet:
    """Whole images, decoded when asked for; small sets stay decoded.

    ``set[i]`` is (name, image, target): float32 (1, C, H, W); `target` is None for single images.
    """

    def __init__(self, pictures: Sequence[Picture], read: Callable[[Picture], tuple[Tensor, Tensor | None]]) -> None:
        self.pictures, self._read = list(pictures), read
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.pictures]

    def grey(self, i: int) -> bool:
        """Whether the file of image i, of a pair the target's, has one channel (and alpha)."""
        return is_grey(self.pictures[i].files[-1])

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> tuple[str, Tensor, Tensor | None]:
        found = self._kept.get(i)
        if found is None:
            found = self._read(self.pictures[i])
            size = sum(t.numel() * t.element_size() for t in found if t is not None)
            if self._bytes + size <= CACHE_BYTES:
                self._kept[i], self._bytes = found, self._bytes + size
        image, target = found
        return self.pictures[i].name, unit(image)[None], None if target is None else unit(target)[None]


def unit(image: Tensor) -> Tensor:
    """uint8 as float32 / 255; float32 as it is."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


@dataclass
class ImageData(Data):
    """Base of the sets image-to-image tasks work on.

    ``split("train")`` holds square tiles (uint8, or float32 for more than 8 bits) cut on a grid from every training
    image; ``split("test")`` the centre tile of each test image; ``images("test")`` the whole images. In a paired set
    (`paired`) a tile has input and target stacked along the channels, (2C, P, P); a target `ratio` times larger has
    its input enlarged by repeating pixels.
    """

    patch: int = opt(96, "side of the stored training tiles in pixels; training crops are cut from them", low=8)
    stride: int = opt(64, "distance of the tiles in an image", low=1)
    patches: int = opt(20000, "at most this many tiles, the same share of every image; 0: all", low=0)
    val_images: int = opt(0, "training images kept aside, for task.split=val", low=0)
    channels: int = opt(3, "1: grey, 3: RGB", choices=(1, 3))  # type: ignore[misc]
    resize: int = opt(0, "resize the shorter side to this first (bicubic, antialiased); 0: as it is", low=0)
    square: bool = opt(False, "keep the centre square only")
    flip: bool = opt(True, "training: mirror every other tile")  # type: ignore[misc]
    rotate: bool = opt(True, "training: turn tiles by 0, 90, 180 or 270 degrees")

    # a class has no meaning here: what labelled sets offer for it is fixed
    source: ClassVar[Any] = None  # type: ignore[misc]
    target: ClassVar[Any] = []  # type: ignore[misc]
    few_shot: ClassVar[int] = 0  # type: ignore[misc]
    val_fraction: ClassVar[float] = 0.0  # type: ignore[misc]
    crop_pad: ClassVar[int] = 0  # type: ignore[misc]
    cutout: ClassVar[int] = 0  # type: ignore[misc]
    crop_padding: ClassVar[str] = "reflect"  # type: ignore[misc]
    alternate_flip: ClassVar[bool] = False  # type: ignore[misc]
    brightness: ClassVar[float] = 0.0  # type: ignore[misc]
    contrast: ClassVar[float] = 0.0  # type: ignore[misc]
    saturation: ClassVar[float] = 0.0  # type: ignore[misc]
    hue: ClassVar[float] = 0.0  # type: ignore[misc]
    classes: ClassVar[Sequence[str]] = ("images",)
    paired: ClassVar[bool] = False
    ratio: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = self.patch  # type: ignore[misc]
        self._pictures_of: dict[str, list[Picture]] = {}
        self._image_sets: dict[str, ImageSet] = {}
        self.sizes: dict[str, list[tuple[int, ...]]] = {}
        """(H, W) of each image of a part, of a pair the target's; known once the set is set up."""

    def _pictures(self) -> dict[str, list[Picture]]:
        """The files: "train" and "test"; to be written by a data set."""
        raise NotImplementedError

    def augmentation(self) -> None:
        """None: crops depend on the task, which makes them from `flip` and `rotate`."""
        return None

    # ---- whole images

    def images(self, name: str) -> ImageSet:
        """The whole images of "train", "val" or "test"."""
        if name not in self._image_sets:
            if not self._files().get(name):
                raise UserError(f"{self.name} has no {name} images; set data.val_images" if name == "val" else
                                f"{self.name} has no {name} images")  # fmt: skip
            self._image_sets[name] = ImageSet(self._files()[name], self.read)
        return self._image_sets[name]

    def read(self, picture: Picture) -> tuple[Tensor, Tensor | None]:
        """Image and target (None for single images), each (C, H, W), uint8 or float32.

        Raises:
            UserError: naming the file that cannot be read, or the pair that differs in size.
        """
        image = read_image(picture.path, self.channels)
        if picture.target is None:
            return self._sized(image, 1), None
        target = read_image(picture.target, self.channels)
        if self.square or not self.resize:  # the middles of two images that differ show other things
            self._check_pair(picture, image, target)
        image, target = self._sized(image, 1), self._sized(target, self.ratio)
        self._check_pair(picture, image, target)
        return image, target

    def _check_pair(self, picture: Picture, image: Tensor, target: Tensor) -> None:
        if tuple(target.shape[-2:]) != tuple(n * self.ratio for n in image.shape[-2:]):
            told = f"{self.ratio} times the size of " if self.ratio > 1 else "the size of "
            raise UserError(
                f"{picture.target} is {target.shape[-2]}x{target.shape[-1]} pixels, but must be {told}{picture.path}, "
                f"which is {image.shape[-2]}x{image.shape[-1]}"
            )

    def _sized(self, image: Tensor, ratio: int) -> Tensor:
        if self.square:
            side = min(image.shape[-2:])
            top, left = ((n - side) // 2 for n in image.shape[-2:])
            image = image[:, top : top + side, left : left + side]
        wanted = self.resize * ratio
        if wanted and min(image.shape[-2:]) != wanted:
            scale = wanted / min(image.shape[-2:])
            size = [max(wanted, round(n * scale / ratio) * ratio) for n in image.shape[-2:]]
            resized = F.interpolate(unit(image)[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
            image = (resized * 255).round().clamp(0, 255).byte() if image.dtype == torch.uint8 else resized.clamp(min=0)
        return image.contiguous()

    # ---- tiles

    def _files(self) -> dict[str, list[Picture]]:
        if not self._pictures_of:
            found = self._pictures()
            if self.val_images:
                train = found["train"]
                if self.val_images >= len(train):
                    raise UserError(f"data.val_images={self.val_images} leaves none of {len(train)} training images")
                aside = set(permutation(len(train), "val", self.name)[: self.val_images].tolist())
                found["val"] = [p for i, p in enumerate(train) if i in aside]
                found["train"] = [p for i, p in enumerate(train) if i not in aside]
            _check_apart(found)
            self._pictures_of = found
        return self._pictures_of

    def _load(self) -> dict[str, Split]:
        files = self._files()
        sets = {}
        for name, pictures in files.items():
            images = self.images(name) if pictures else None
            if images is None:
                continue
            most = -(-self.patches // len(pictures)) if self.patches else 0
            tiles = [
                self._tiles(images.pictures[i], i, most if name == "train" else 1, name) for i in range(len(images))
            ]
            deep = any(t.dtype != torch.uint8 for t in tiles)
            together = torch.cat([unit(t) if deep else t for t in tiles])
            if name == "train" and self.patches:
                together = together[: self.patches]
            sets[name] = Split(together, torch.zeros(len(together), dtype=torch.long), name=name)
        return sets

    def _tiles(self, picture: Picture, number: int, most: int, part: str) -> Tensor:
        """(n, C or 2C, P, P): the grid of one training image, or `most` tiles of it; else the centre tile."""
        image, target = self.read(picture)
        self.sizes.setdefault(part, []).append(tuple((image if target is None else target).shape[-2:]))
        if target is not None:
            larger = image.repeat_interleave(self.ratio, 1).repeat_interleave(self.ratio, 2)
            both = (larger, target) if larger.dtype == target.dtype else (unit(larger), unit(target))
            image = torch.cat(both)
        image = _at_least(image, self.patch)
        if part != "train":
            top, left = ((n - self.patch) // 2 // self.ratio * self.ratio for n in image.shape[-2:])
            return image[None, :, top : top + self.patch, left : left + self.patch].clone()
        rows, columns = (grid(n, self.patch, self.stride, self.ratio) for n in image.shape[-2:])
        places = [(y, x) for y in rows for x in columns]
        if most and len(places) > most:
            places = [places[i] for i in permutation(len(places), "tiles", number)[:most].sort().values.tolist()]
        return torch.stack([image[:, y : y + self.patch, x : x + self.patch] for y, x in places])

    def _digest(self) -> str:
        """From names, sizes and both ends of every file, and how tiles are cut."""
        how = (self.patch, self.stride, self.patches, self.channels, self.resize, self.square, self.ratio)
        digest = hashlib.blake2b(str(how).encode(), digest_size=16)
        for name, pictures in sorted(self._files().items()):
            for picture in pictures:
                for path in picture.files:
                    with readable(path), open(path, "rb") as file:
                        length = path.stat().st_size
                        digest.update(f"\0{name}\0{picture.name}\0{length}\0".encode())
                        digest.update(file.read(_HEAD))
                        file.seek(max(_HEAD, length - _HEAD))
                        digest.update(file.read(_HEAD))
        return digest.hexdigest()

    def mean_std(self) -> tuple[list[float], list[float]]:
        if self._stats is None:
            self.setup(self.seed or 0)
            images = self._sets["train"].images
            assert isinstance(images, Tensor)
            if images.dtype == torch.uint8:
                return super().mean_std()
            spread, middle = torch.std_mean(images.double(), dim=(0, 2, 3))
            self._stats = (middle.tolist(), spread.tolist())
        return self._stats


def _check_apart(pictures: dict[str, list[Picture]]) -> None:
    """Raise UserError for a file that is in two parts: what a model was trained on says nothing about it."""
    seen: dict[str, tuple[str, Path]] = {}
    for part, some in pictures.items():
        for path in (path for picture in some for path in picture.files):
            other, first = seen.setdefault(os.path.realpath(path), (part, path))
            if other != part:
                told = f" (as {first})" if first != path else ""
                raise UserError(f"{path} is both a {other} and a {part} image{told}; keep the parts disjoint")


def _at_least(image: Tensor, side: int) -> Tensor:
    """(C, H, W) extended by mirroring, or repeating its edge, until no side is below `side`."""
    from filtrun.tiles import pad_to

    if min(image.shape[-2:]) >= side:
        return image
    padded = pad_to(unit(image)[None], 1, side)[0]
    return (padded * 255).round().byte() if image.dtype == torch.uint8 else padded


def grid(length: int, side: int, stride: int, multiple: int = 1) -> list[int]:
    """Starts of tiles of `side` pixels every `stride`, the last one flush with the end; multiples of `multiple`."""
    starts = list(range(0, length - side + 1, max(stride // multiple, 1) * multiple))
    last = (length - side) // multiple * multiple
    return starts if starts[-1] == last else [*starts, last]
