"""Pairs of images: an input and what it should become, in two folders or by the lists of MIT-Adobe FiveK."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from filtrun.data.base import folder_of
from filtrun.data.image_set import ImageData, Picture
from filtrun.data.images import readable, subfolders
from filtrun.data.images_folder import existing_folder, find_images
from filtrun.data.split import permutation
from filtrun.errors import UserError, closest
from filtrun.options import opt

_TARGETS = ("_target", "_gt", "_clean", "_hr", "_expertc", "_out")
_TAGS = (*_TARGETS, "_input", "_rainy", "_noisy", "_lr", "_in")


def pair_key(path: Path, folder: Path) -> str:
    """What two files of a pair share: path in the folder without suffix, and without an ending such as ``_input``."""
    stem = path.relative_to(folder).with_suffix("").as_posix()
    tag = next((t for t in _TAGS if stem.lower().endswith(t)), "")
    return stem[: len(stem) - len(tag)]


def matched(inputs: Path, targets: Path, keys: tuple[str, str] = ("data.input", "data.target")) -> list[Picture]:
    """Pairs of the images in two folders by name (in one folder: by the endings ``_input`` and ``_target``).

    Raises:
        UserError: two files of one name, or an input without a target (names it and the closest target).
    """
    names: list[dict[str, Path]] = []
    together = inputs.resolve() == targets.resolve()
    for wanted, folder in enumerate((inputs, targets)):
        found: dict[str, Path] = {}
        for path in find_images(folder):
            if together and path.stem.lower().endswith(_TARGETS) != bool(wanted):
                continue
            other = found.setdefault(pair_key(path, folder), path)
            if other != path:
                raise UserError(f"{other} and {path} have the same name: one input needs one target")
        names.append(found)
    for name, path in names[0].items():
        if name not in names[1]:
            raise UserError(
                f"{path} has no partner: {keys[1]}={targets} has no image {name!r}{closest(name, names[1])}"
            )
    if len(names[1]) > len(names[0]):
        extra = next(path for name, path in names[1].items() if name not in names[0])
        raise UserError(f"{extra} has no partner: {keys[0]}={inputs} has no image of that name")
    return [Picture(name, path, names[1][name]) for name, path in names[0].items()]


class PairData(ImageData):
    """Base of paired sets."""

    paired: ClassVar[bool] = True


@dataclass
class Pairs(PairData):
    """Images matched by name in the folders `input` and `target`.

    With ``train/`` and ``test/`` inside both folders these are the parts; else `test_input` and `test_target` are the
    test pairs; else a fifth of the pairs, always the same, is the test set. Names match without the suffix and without
    an ending such as _input, _target, _rainy or _clean. Files of 16 bits, .hdr and .exr are read as float.

    Raises:
        UserError: an image without a partner, a pair of different sizes, a folder that is missing or empty.
    """

    input: str | None = opt(None, "folder of input images")
    target: str | None = opt(None, "folder of target images, same names")  # type: ignore[assignment,misc]
    test_input: str | None = opt(None, "folder of test inputs")
    test_target: str | None = opt(None, "folder of test targets")
    ratio: int = opt(1, "how many times larger a target is than its input", low=1, high=8)  # type: ignore[misc]

    name: ClassVar[str] = "pairs"
    licence: ClassVar[str] = "the user's own"
    places: ClassVar[tuple[str, ...]] = ("root", "input", "target", "test_input", "test_target")

    def __post_init__(self) -> None:
        self.target_folder, self.target = self.target, []  # type: ignore[assignment]
        super().__post_init__()
        for size in ("patch", "resize"):
            if getattr(self, size) % self.ratio:
                raise UserError(f"data.{size}={getattr(self, size)} must be a multiple of data.ratio={self.ratio}")

    def _pictures(self) -> dict[str, list[Picture]]:
        if self.root is not None:
            raise UserError("data.root has no meaning for pairs; set data.input=DIR and data.target=DIR")
        folders = existing_folder(self.input, "data.input"), existing_folder(self.target_folder, "data.target")
        if self.test_input is not None or self.test_target is not None:
            keys = ("data.test_input", "data.test_target")
            inputs, targets = existing_folder(self.test_input, keys[0]), existing_folder(self.test_target, keys[1])
            return {"train": matched(*folders), "test": matched(inputs, targets, keys)}
        inside = [subfolders(f) for f in folders]
        if all({"train", "test"} <= set(f) for f in inside):
            return {part: matched(inside[0][part], inside[1][part]) for part in ("train", "test")}
        pairs = matched(*folders)
        if len(pairs) < 2:
            raise UserError(f"data.input={self.input} has one image: training and test need one each")
        aside_rows = set(permutation(len(pairs), "pairs")[: max(1, len(pairs) // 5)].tolist())
        return {
            "train": [p for i, p in enumerate(pairs) if i not in aside_rows],
            "test": [p for i, p in enumerate(pairs) if i in aside_rows],
        }

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        return False, "your own pairs: pass data.input=DIR data.target=DIR"


@dataclass
class FiveK(PairData):
    """MIT-Adobe FiveK retouched by expert C: 4500 pairs to train on, 498 to test on, by the lists of the LUT papers.

    `root` holds ``input/`` and ``expertC/`` (or ``target/``) in one of the published layouts, sub-folders such as
    ``JPG/480p`` or ``PNG/480p_16bits_XYZ_WB`` included, and lists of names (``train.txt`` or ``train_input.txt`` and
    ``train_label.txt``; ``test.txt``). Without lists the test set is a fifth of the pairs.

    Raises:
        UserError: a folder or an image of a list that is not there.
    """

    patch: int = opt(256, "side of the stored training tiles in pixels; training crops are cut from them", low=8)
    stride: int = opt(224, "distance of the tiles in an image", low=1)
    patches: int = opt(9000, "at most this many tiles, the same share of every image; 0: all", low=0)
    resolution: str = opt("480p", "480p: shorter side 480; full: about 4K", choices=("480p", "full"))
    input_format: str = opt("jpg", "8-bit sRGB (jpg) or 16-bit XYZ (png, tiff) inputs", choices=("jpg", "png", "tiff"))

    name: ClassVar[str] = "fivek"
    licence: ClassVar[str] = "research only (MIT-Adobe FiveK, licences of Adobe and MIT)"

    def _pictures(self) -> dict[str, list[Picture]]:
        root = existing_folder(self.root, "data.root")
        inside = {name.lower(): path for name, path in subfolders(root).items()}
        source = inside.get("input")
        target = next((inside[n] for n in ("expertc", "target", "gt") if n in inside), None)
        if source is None or target is None:
            raise UserError(f"data.root={self.root} must hold the folders input and expertC (FiveK of the LUT papers)")
        inputs, targets = self._of_size(source, self.input_format), self._of_size(target, "jpg")
        lists = {part: _listed(root, part) for part in ("train", "test")}
        if not lists["test"] or not lists["train"]:
            names = sorted(set(inputs) & set(targets))
            if len(names) < 2:
                raise UserError(f"data.root={self.root}: input and expertC share fewer than two names")
            aside = {names[i] for i in permutation(len(names), "fivek")[: max(1, len(names) // 5)].tolist()}
            lists = {"train": [n for n in names if n not in aside], "test": [n for n in names if n in aside]}
        return {part: [self._pair(n, inputs, targets, part) for n in names] for part, names in lists.items()}

    def _pair(self, name: str, inputs: dict[str, Path], targets: dict[str, Path], part: str) -> Picture:
        for what, found in (("input", inputs), ("expert C", targets)):
            if name not in found:
                raise UserError(
                    f"data.root={self.root}: the {part} list names {name}, but there is no {what} image of it"
                )
        return Picture(name, inputs[name], targets[name])

    def _of_size(self, folder: Path, kind: str) -> dict[str, Path]:
        """Name -> file in the sub-folders of the wanted format and size; all files when nothing tells them apart."""
        files = find_images(folder)
        suffixes = {"jpg": (".jpg", ".jpeg"), "png": (".png",), "tiff": (".tif", ".tiff")}[kind]
        of_kind = [f for f in files if f.suffix.lower() in suffixes] or files
        small = [f for f in of_kind if "480p" in f.relative_to(folder).as_posix().lower()]
        large = [f for f in of_kind if f not in set(small)]
        wanted = (small or large) if self.resolution == "480p" else (large or small)
        found: dict[str, Path] = {}
        for path in wanted:
            other = found.setdefault(path.stem, path)
            if other != path:
                raise UserError(f"{other} and {path} have the same name: one image of FiveK is needed once")
        return found

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        if root is None:
            return False, "MIT-Adobe FiveK under DIR: pass data.root=DIR"
        try:
            return True, str(folder_of(root))
        except UserError as error:
            return False, str(error)


def _listed(root: Path, part: str) -> list[str]:
    """Names in a set's lists of one part, in their order; empty when there is no list."""
    names: list[Any] = []
    for file in (f"{part}.txt", f"{part}_input.txt", f"{part}_label.txt"):
        path = root / file
        if path.is_file():
            with readable(path):
                text = path.read_text(encoding="utf-8-sig", errors="replace")
                lines = [line.strip() for line in text.splitlines()]
            names += [Path(line.split()[0]).stem for line in lines if line]
            if file == f"{part}.txt":
                break
    return list(dict.fromkeys(names))
