"""MNIST and Fashion-MNIST: 70,000 grey images of 28x28 pixels in ten classes.

Sources: Y. LeCun, C. Cortes and C. Burges, http://yann.lecun.com/exdb/mnist/; H. Xiao, K. Rasul and R. Vollgraf,
"Fashion-MNIST", arXiv:1708.07747.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from filtrun.data.fileset import FileSet
from filtrun.data.formats import Layout
from filtrun.options import opt

MNIST_CLASSES = tuple("0123456789")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass
class Mnist(FileSet):
    """60,000 training and 10,000 test images of handwritten digits.

    Accepts the four idx files (.gz or not), a tree of image files or an npz; see `filtrun.data.formats`.
    """

    target: list[int] = opt([8, 9], "class ids held out from the base (new or to be forgotten)")

    name: ClassVar[str] = "mnist"
    licence: ClassVar[str] = "CC BY-SA 3.0"
    classes: ClassVar[Sequence[str]] = MNIST_CLASSES
    channels: ClassVar[int] = 1
    image_size: ClassVar[int] = 28
    layout: ClassVar[Layout] = Layout("MNIST", (1, 28, 28), MNIST_CLASSES, idx=("MNIST/raw", "MNIST", "mnist", "raw"))
    torchvision: ClassVar[str] = "MNIST"


@dataclass
class FashionMnist(Mnist):
    """60,000 training and 10,000 test images of articles of clothing."""

    name: ClassVar[str] = "fashion_mnist"
    licence: ClassVar[str] = "MIT"
    classes: ClassVar[Sequence[str]] = FASHION_CLASSES
    layout: ClassVar[Layout] = Layout(
        "Fashion-MNIST",
        (1, 28, 28),
        FASHION_CLASSES,
        idx=("FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "fashion_mnist", "fashion", "raw"),
    )
    torchvision: ClassVar[str] = "FashionMNIST"
