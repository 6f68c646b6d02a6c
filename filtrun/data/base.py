"""The base of every data set: options, named splits, class-wise views, few shots and a content fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from filtrun.data.augment import Augment
from filtrun.data.split import Batch, LazyImages, Split, stratified
from filtrun.errors import UserError, unknown
from filtrun.options import check_options, opt

__all__ = ["Batch", "Data", "LazyImages", "Split"]

_WHICH = {"all": "all", "source": "source", "target": "target", "forget": "target", "retain": "source"}


@dataclass
class Data:
    """A labelled image set: options as fields, everything else once ``setup(seed)`` has read it.

    A subclass sets `name`, `licence` (and, if known beforehand, `classes`, `channels`, `image_size`) and reads its
    files in ``_load``.

    Attributes:
        name, licence: what it is called and under which terms it is published.
        classes: names by class id; `num_classes` of them.
        channels, image_size: images are (channels, image_size, image_size).
        source, target: class ids, disjoint; a `source` of null becomes every class outside `target`.

    Raises:
        UserError: an option out of range (on construction), class ids that do not exist or overlap, files that are
            missing or broken (in ``setup``).
    """

    root: str | None = opt(None, "folder or file with the images; null: the default place")
    source: list[int] | None = opt(None, "class ids to train a base on; null: every class outside target")
    target: list[int] = opt([], "class ids held out from the base (new or to be forgotten)")
    few_shot: int = opt(0, "training images per class in the 'all' and 'target' splits; 0: all of them", low=0)
    val_fraction: float = opt(0.1, "part of every training class kept for validation", low=0.0, high=0.9)
    crop_pad: int = opt(0, "training: pad by this many pixels and crop back at a random place", low=0)
    flip: bool = opt(False, "training: mirror every other image left to right")
    cutout: int = opt(0, "training: side of a random grey square", low=0)
    crop_padding: str = opt("reflect", "training: what crop_pad adds", choices=("reflect", "zero"))
    alternate_flip: bool = opt(False, "training: flip mirrors the other half of the images in every next epoch",
                               source="arXiv:2404.00498, 3.6")  # fmt: skip
    brightness: float = opt(0.0, "training: brightness times a factor uniform in 1 +- this", low=0.0)
    contrast: float = opt(0.0, "training: contrast times a factor uniform in 1 +- this", low=0.0)
    saturation: float = opt(0.0, "training: saturation times a factor uniform in 1 +- this", low=0.0)
    hue: float = opt(0.0, "training: hue turned by up to this part of a circle", low=0.0, high=0.5)

    name: ClassVar[str] = "data"
    licence: ClassVar[str] = ""
    places: ClassVar[tuple[str, ...]] = ("root",)
    """Options that say where files lie and not what is in them: they are in no key."""
    classes: ClassVar[Sequence[str]] = ()
    channels: ClassVar[int] = 3
    image_size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_options(self, "data")
        self.seed: int | None = None
        self._sets: dict[str, Split] = {}
        self._splits: dict[tuple[str, str], Split] = {}
        self._fingerprint: str | None = None
        self._stats: tuple[list[float], list[float]] | None = None
        self._asked_source = self.source
        if self.classes:
            self._check_classes()

    # ---- to be written by a data set

    def _load(self) -> dict[str, Split]:
        """Read the files: "train" and "test", and "val" if the set comes with one; set classes and sizes."""
        raise NotImplementedError

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        """Whether the set can be read without a network, and where it is or how to get it (one line)."""
        return True, "always there"

    # ---- for everyone

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def setup(self, seed: int = 0) -> Data:
        """Read the files once and cut the splits for `seed` (validation set, few shots); returns self."""
        if not self._sets:
            self._sets = self._load()
            self._check_classes()
        if seed != self.seed:
            self.seed, self._splits = seed, {}
        return self

    def split(self, name: str, which: str = "all") -> Split:
        """A split on the CPU (``.to(device)`` moves and remembers it).

        Args:
            name: "train", "val" or "test". Validation images are cut from the training set, class by class.
            which: "all", "source" (alias "retain") or "target" (alias "forget"). Labels keep their ids. With
                `few_shot`, "train" of "all" and "target" holds that many images per class; "source" stays whole, as
                it is what a base is trained on.

        Raises:
            UserError: unknown name, no validation images (``data.val_fraction=0``), no target classes, or no image.
        """
        if self.seed is None:
            raise RuntimeError(f"{type(self).__name__}.setup(seed) comes before split()")
        if name not in ("train", "val", "test"):
            raise unknown("split", name, ("train", "val", "test"))
        if which not in _WHICH:
            raise unknown("part of the classes", which, _WHICH)
        key = (name, _WHICH[which])
        if key not in self._splits:
            self._splits[key] = self._cut(*key)
        return self._splits[key]

    def augmentation(self) -> Augment | None:
        """The training augmentation the options ask for, or None."""
        augment = Augment(
            crop_pad=self.crop_pad, flip=self.flip, cutout=self.cutout, padding=self.crop_padding,
            alternate=self.flip and self.alternate_flip, brightness=self.brightness, contrast=self.contrast,
            saturation=self.saturation, hue=self.hue,
        )  # fmt: skip
        return augment if augment else None

    def fingerprint(self) -> str:
        """32 hex digits that depend on the images and labels only, not on where or in which format they lie."""
        if self._fingerprint is None:
            self.setup(self.seed or 0)
            self._fingerprint = self._digest()
        return self._fingerprint

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the whole training set (validation included), in [0, 1].

        Exact for tensor-backed sets; a stream is judged by at most 1000 images spread over it.
        """
        if self._stats is None:
            self.setup(self.seed or 0)
            train = self._sets["train"]
            step = 1 if train.tensor_backed else -(-len(train) // 1000)
            images = train.images if isinstance(train.images, Tensor) else train.read(torch.arange(0, len(train), step))
            self._stats = _mean_std(images)
        return self._stats

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._sets):
            split = self._sets[name]
            assert isinstance(split.images, Tensor), "a streaming set writes its own _digest"
            digest.update(f"{name} {tuple(split.images.shape)}".encode())
            for tensor in (split.images, split.labels):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def _cut(self, name: str, which: str) -> Split:
        title = name if which == "all" else f"{name}/{which}"
        if name in self._sets and (name == "test" or "val" in self._sets):
            split = self._sets[name]
        else:
            train = self._sets["train"]
            rest, part = stratified(train.labels, self.val_fraction, "val", self.seed)
            if name == "val" and not len(part):
                raise UserError(f"data.val_fraction={self.val_fraction} leaves no validation images; try 0.1")
            split = train if not len(part) else train.subset(rest if name == "train" else part, title)
        if which == "target" and not self.target:
            raise UserError(f"data.target is empty, but a part of {self.name} has to be held out; try data.target=[0]")
        if which != "all":
            split = split.of_classes(self.target if which == "target" else self.source or [], title)
        if not len(split):
            raise UserError(f"{self.name}: the split {title!r} has no images")
        if self.few_shot and name == "train" and which != "source":
            assert self.seed is not None
            split = split.few_shot(self.few_shot, self.seed, title)
        return split

    def _check_classes(self) -> None:
        """Check `source` and `target` against the classes, and fill in a `source` of null."""
        for key, ids in (("source", self._asked_source or []), ("target", self.target)):
            bad = [c for c in ids if not 0 <= c < self.num_classes]
            if bad:
                raise UserError(f"data.{key} has {bad[0]}, but {self.name} has classes 0..{self.num_classes - 1}")
            if len(set(ids)) != len(ids):
                raise UserError(f"data.{key}={ids} names a class twice")
        if self._asked_source is None:
            self.source = [c for c in range(self.num_classes) if c not in self.target]
        both = sorted(set(self.source or []) & set(self.target))
        if both:
            raise UserError(f"data.source and data.target both have class {both[0]}; a class belongs to one of them")
        if not self.source:
            only = f"has the single class {self.classes[0]!r}" if self.num_classes == 1 else "has no class left"
            raise UserError(f"data.target={self.target} leaves no source class: {self.name} {only}")


def _mean_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of uint8 (N, C, H, W) from exact histograms, on a scale of [0, 1]."""
    values, means, stds = torch.arange(256, dtype=torch.float64) / 255, [], []
    for c in range(images.shape[1]):
        counts = torch.bincount(images[:, c].flatten(), minlength=256).double()
        mean = (counts * values).sum() / counts.sum()
        means.append(mean.item())
        stds.append(((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt().item())
    return means, stds


def folder_of(root: str | None, key: str = "data.root") -> Path:
    """`root` as an existing absolute path, ``~`` expanded.

    Raises:
        UserError: it is not set or does not exist.
    """
    if not root:
        raise UserError(f"{key} is not set; pass {key}=DIR")
    path = Path(root).expanduser().absolute()
    try:
        found = path.exists()
    except OSError as error:
        raise UserError(f"{key}={root}: {error.strerror or error}") from error
    if not found:
        raise UserError(f"{key}={root} does not exist")
    return path
