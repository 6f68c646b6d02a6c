"""CIFAR-10 and CIFAR-100: 60,000 colour images of 32x32 pixels.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from filtrun.data.fileset import FileSet
from filtrun.data.formats import Batches, Layout
from filtrun.options import opt

_LICENCE = "no licence stated; free to use with citation (Krizhevsky 2009)"

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100_CLASSES = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()
)

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_LAYOUT = Layout(
    title="CIFAR-10",
    shape=(3, 32, 32),
    classes=CIFAR10_CLASSES,
    python=Batches("cifar-10-batches-py", "cifar-10-python.tar.gz", _TRAIN, ("test_batch",), "labels"),
    binary=Batches(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"{name}.bin" for name in _TRAIN),
        ("test_batch.bin",),
        label=0,
    ),
)
CIFAR100_LAYOUT = Layout(
    title="CIFAR-100",
    shape=(3, 32, 32),
    classes=CIFAR100_CLASSES,
    python=Batches("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "fine_labels"),
    # a record starts with the coarse label, then the fine one
    binary=Batches("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), 1, label_bytes=2),
)


@dataclass
class Cifar10(FileSet):
    """50,000 training and 10,000 test images of 10 classes.

    Accepts the official python or binary version (folder or .tar.gz), a tree of image files or an npz; see
    `filtrun.data.formats`. The default augmentation is that of He et al. (arXiv:1512.03385, section 4.2), with
    reflected instead of black borders.
    """

    target: list[int] = opt([8, 9], "class ids held out from the base (new or to be forgotten)")
    crop_pad: int = opt(4, "training: pad by this many pixels and crop back", low=0, source="arXiv:1512.03385, 4.2")
    flip: bool = opt(True, "training: mirror every other image left to right", source="arXiv:1512.03385, 4.2")

    name: ClassVar[str] = "cifar10"
    licence: ClassVar[str] = _LICENCE
    classes: ClassVar[Sequence[str]] = CIFAR10_CLASSES
    channels: ClassVar[int] = 3
    image_size: ClassVar[int] = 32
    layout: ClassVar[Layout] = CIFAR10_LAYOUT
    torchvision: ClassVar[str] = "CIFAR10"


@dataclass
class Cifar100(Cifar10):
    """50,000 training and 10,000 test images of 100 classes (the fine labels, alphabetical)."""

    target: list[int] = opt(list(range(80, 100)), "class ids held out from the base (new or to be forgotten)")

    name: ClassVar[str] = "cifar100"
    classes: ClassVar[Sequence[str]] = CIFAR100_CLASSES
    layout: ClassVar[Layout] = CIFAR100_LAYOUT
    torchvision: ClassVar[str] = "CIFAR100"
