"""The 8x8 digits that come with scikit-learn: the embedded set, there without a network."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from filtrun.data.base import Data
from filtrun.data.split import Split, stratified
from filtrun.errors import UserError
from filtrun.options import opt


@functools.cache
def _parts(load: Callable[..., Any]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, images, labels) of each split, read once a process: the cells of a sweep all do."""
    pixels, labels = map(torch.from_numpy, load(return_X_y=True))
    images = (pixels.reshape(-1, 1, 8, 8) * 255 / 16).round().to(torch.uint8)
    rows = stratified(labels, 0.2, "digits")
    return [(name, images[some], labels[some]) for name, some in zip(("train", "test"), rows, strict=True)]


@dataclass
class Digits(Data):
    """1797 grey 8x8 images of ten digits; 0..16 in the source becomes 0..255 by round(v * 255 / 16).

    The set has no official split: one fifth of every class is the test set, always the same fifth. The training
    images are the other four fifths, less the validation images.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (its test
    part), as in ``sklearn.datasets.load_digits``.
    """

    target: list[int] = opt([7, 8, 9], "class ids held out from the base (new or to be forgotten)")

    name: ClassVar[str] = "digits"
    licence: ClassVar[str] = "CC BY 4.0 (UCI Machine Learning Repository)"
    classes: ClassVar[Sequence[str]] = tuple("0123456789")
    channels: ClassVar[int] = 1
    image_size: ClassVar[int] = 8

    def _load(self) -> dict[str, Split]:
        if self.root is not None:
            raise UserError("data.root has no meaning for digits, which come with scikit-learn; leave it out")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("data=digits comes with scikit-learn; install it with: pip install scikit-learn") from error
        return {name: Split(images.clone(), labels.clone(), name=name) for name, images, labels in _parts(load_digits)}

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        if importlib.util.find_spec("sklearn") is None:
            return False, "comes with scikit-learn: pip install scikit-learn"
        return True, "comes with scikit-learn"
