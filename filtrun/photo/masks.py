"""Holes a user marks: one mask image, a folder of them, or a colour in the images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from filtrun.data.hdr import ALL_SUFFIXES
from filtrun.data.images import decode
from filtrun.errors import UserError
from filtrun.photo.read import Photo


class Masks:
    """Holes of each image, white (128 and above of 255) in a mask file.

    Args:
        text: an image file for all images, a folder whose files are matched by name (``sub/a.jpg`` takes
            ``sub/a.png`` or else ``a.png``, whatever the suffix), or ``#rrggbb``: pixels of exactly this colour.

    Raises:
        UserError: no such file or folder, no colour, or a mask file that cannot be read.
    """

    def __init__(self, text: str) -> None:
        path = Path(text).expanduser()
        self.colour: tuple[int, ...] | None = None
        self.folder: Path | None = None
        self.file: Path | None = None
        if path.is_dir():
            self.folder = path
        elif path.exists():
            self.file = path
            self.holes = _read(path)
        elif re.fullmatch(r"#[0-9a-fA-F]{6}", text):
            self.colour = tuple(bytes.fromhex(text[1:]))
        elif text.startswith("#"):
            raise UserError(f"--mask {text} is no colour; write it as '#rrggbb', such as '#ff00ff'")
        else:
            raise UserError(f"--mask {text}: there is no such file or folder")

    @property
    def files(self) -> list[Path]:
        """Mask files known before any image is read."""
        return [self.file] if self.file is not None else []

    def of(self, photo: Photo, name: Path) -> Tensor:
        """(1, 1, H, W), 1 = hole, for an image whose place in its folder is `name`.

        Raises:
            UserError: naming the image: no mask by its name, one of another size, or no pixel of the colour.
        """
        if self.colour is not None:
            holes = _coloured(photo, self.colour)
            if not holes.any():
                told = "#" + bytes(self.colour).hex()
                raise UserError(f"{photo.path} has no pixel that is exactly {told}; JPEG and WebP change colours, "
                                "so mark holes in a PNG or use a mask file")  # fmt: skip
        else:
            path = self.file or self._named(photo.path, name)
            holes = self.holes if self.file else _read(path)
            if holes.shape != photo.size:
                (h, w), (height, width) = holes.shape, photo.size
                raise UserError(f"{photo.path} is {width}x{height} pixels, but its mask {path} is {w}x{h}; "
                                "resize the mask to the image's size")  # fmt: skip
        return torch.from_numpy(holes).float()[None, None]

    def _named(self, path: Path, name: Path) -> Path:
        assert self.folder is not None
        for stem in dict.fromkeys((name.with_suffix(""), Path(name.stem))):
            place = (self.folder / stem).parent
            if not place.is_dir():
                continue
            near = [p for p in place.iterdir() if p.stem == stem.name and p.suffix.lower() in ALL_SUFFIXES]
            if near:
                return min(near, key=lambda p: (p.suffix.lower() != ".png", p))
        raise UserError(f"{path} has no mask: there is no {name.stem}.png in {self.folder}")


def _read(path: Path) -> np.ndarray:
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"the mask {path} is empty (0 bytes)")
    return decode(path, 1)[0] >= 128


def _coloured(photo: Photo, colour: tuple[int, ...]) -> np.ndarray:
    pixels = photo.pixels
    if pixels.dtype != np.uint8:
        pixels = (pixels.clip(0, photo.peak) / photo.peak * 255).round().astype(np.uint8)
    return (pixels == np.array(colour, dtype=np.uint8)).all(-1)
