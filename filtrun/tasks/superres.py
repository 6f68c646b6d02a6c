"""Task superres: enlarge images 2, 3 or 4 times; PSNR and SSIM of the luma as the tables of the field report them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from filtrun.degrade.bicubic import imresize, modcrop
from filtrun.errors import UserError
from filtrun.metrics.image import from_ycbcr, full_range, luma, round8, ycbcr
from filtrun.options import opt
from filtrun.tasks.image_to_image import ImageToImage
from filtrun.tasks.pair import Pair, pair

if TYPE_CHECKING:
    from filtrun.data.base import Data


@dataclass
class SuperRes(ImageToImage):
    """Super-resolution of bicubically shrunk images.

    The ground truth is cropped to a multiple of the scale, shrunk as MATLAB's ``imresize`` does and rounded to 8 bits.
    Numbers are those of the studio-range luma without `scale` pixels at each border (``task.border=null``). A `luma`
    model sees and gives luma / 255; chroma is enlarged bicubically. Grey files are measured as they are: the tables'
    protocol calls ``rgb2ycbcr`` for colour only, which takes 1.32 dB from Set14's "bridge".
    """

    crop: int = opt(48, "side of the enlarged training crop, in pixels; rounded down to a multiple of the scale", low=8)
    measure: str = opt("y", "what PSNR and SSIM compare: all channels, or luma", choices=("rgb", "y"))
    border: int | None = opt(None, "pixels at each side that do not count; null: the scale", low=0)  # type: ignore[assignment]
    scale: int = opt(3, "how many times larger", choices=(2, 3, 4))
    luma: bool = opt(False, "the model works on luma (one channel)")
    round_input: bool = opt(True, "low-resolution images have 8 bits")

    kind: ClassVar[str] = "superres"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in (2, 3, 4):
            raise UserError(f"task.scale={self.scale} is not allowed; choose from 2, 3, 4")
        self.ratio = self.scale  # type: ignore[misc]
        self.margin = 4 * self.scale  # type: ignore[misc]
        self.crop -= self.crop % self.scale
        if self.border is None:
            self.border = self.scale

    def sizes(self, data: Data) -> dict[str, Any]:
        return super().sizes(data) | {"scale": self.scale, "in_channels": 1 if self.luma else data.channels}

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Pair:
        clean = modcrop(clean, self.scale)
        small = imresize(clean, 1, self.scale)
        small = round8(small) if self.round_input else small
        return self.given(small, clean, generator)

    def given(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Pair:
        return pair(luma(x), luma(y), colour=x) if self.luma else pair(x, y)

    def make_pair(self, run: Any, batch: Any, generator: torch.Generator | None = None) -> Pair:
        made = super().make_pair(run, batch, generator)
        edge = self.margin // self.scale  # shrinking mirrored the crop's border there: no pixel of a real image
        made.x = made.x[..., edge:-edge, edge:-edge]
        made.y = made.y[..., self.margin : -self.margin, self.margin : -self.margin]
        if made.colour is not None:
            made.colour = made.colour[..., edge:-edge, edge:-edge]
        return made

    def baseline(self, made: Pair) -> Tensor:
        return imresize(made.x, self.scale, 1)

    def colours(self, made: Pair, image: Tensor) -> Tensor:
        if not self.luma or made.colour is None or made.colour.shape[1] == 1:
            return full_range(image) if self.luma else image
        chroma = imresize(ycbcr(made.colour), self.scale, 1)[:, 1:]
        return from_ycbcr(torch.cat([image, chroma], 1))

    def as_luma(self, image: Tensor) -> bool:
        return self.measure == "y" and not self.luma

    def compare(self, image: Tensor, target: Tensor, names: list[str], grey: bool = False) -> dict[str, float]:
        if grey and self.luma:
            image, target = full_range(image), full_range(target)
        return super().compare(image, target, names, grey)

    def apply(self, run: Any, image: Tensor) -> Tensor:
        made = self.given(image, imresize(image, self.scale, 1), None)
        return self.colours(made, self.restore(run, made)).clamp(0, 1)

    def protocol(self) -> dict[str, Any]:
        bits = "rounded to 8 bits" if self.round_input else "not rounded"
        return {
            "low_resolution": f"antialiased bicubic (a = -0.5, as MATLAB's imresize) by 1/{self.scale}, {bits}",
            "ground_truth": f"cropped to a multiple of {self.scale}",
            "model_input": "luma" if self.luma else "RGB",
        }
