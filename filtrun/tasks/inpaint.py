"""Task inpaint: fill holes; metrics of the composited image, also by the share of the image that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from filtrun.context import mix_seed
from filtrun.degrade.masks import MaskFiles, box_masks, ratio_bins, stroke_masks
from filtrun.degrade.noise import uniform
from filtrun.errors import UserError
from filtrun.options import opt
from filtrun.task import Metric
from filtrun.tasks.image_to_image import QUALITY, ImageToImage
from filtrun.tasks.pair import Pair, pair

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Data


@dataclass
class Inpaint(ImageToImage):
    """Hole filling: the model is called with the image (holes are 0) and ``mask`` (N, 1, H, W), 1 = hole.

    Known pixels are put back before measuring. Every test image is tried in each bucket of hole `ratios`, the ratio
    drawn within it; with a folder of masks image `i` gets mask `i` modulo their number and falls into the bucket of
    that mask's ratio. ``psnr_20_40`` is the PSNR of holes of 20 to 40 %.
    """

    masks: str = opt("strokes", "where holes are from", choices=("strokes", "box", "folder"))
    mask_root: str | None = opt(None, "folder of mask images, for masks=folder")
    mask_hole: str = opt("white", "colour of the holes in these images", choices=("white", "black"))
    ratios: list[float] = opt([0.01, 0.2, 0.4, 0.6], "edges of the buckets of hole ratios; training draws from all")
    strokes: int = opt(4, "most strokes of a mask", low=1, high=32)

    kind: ClassVar[str] = "inpaint"
    reported: ClassVar[tuple[str, ...]] = ("psnr", "ssim", "l1", "lpips")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bins = ratio_bins(self.ratios)
        self.files = MaskFiles(self.mask_root, self.mask_hole) if self.masks == "folder" else None
        if self.masks != "folder" and self.mask_root is not None:
            raise UserError(f"task.mask_root is set but task.masks={self.masks}; set task.masks=folder to use it")
        more = {}
        for low, high in self.bins:
            for name in self.reported:
                known = QUALITY[name]
                title = f"{known.title}, {low:.0%} to {high:.0%}"
                more[f"{name}_{bucket(low, high)}"] = Metric(title, known.better, known.meaning, known.format)
        self.metrics = {**QUALITY, **more}  # type: ignore[misc]

    def check_data(self, data: Data) -> None:
        super().check_data(data)
        if self.paired(data):
            raise UserError(f"task=inpaint makes its own holes and needs single images, not data={data.name}")

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        if self.files is not None:
            self.files.check()

    def holes(self, ratio: Tensor, height: int, width: int, generator: torch.Generator | None) -> Tensor:
        """Masks (N, 1, height, width) of the given share (N,) of holes."""
        if self.masks == "box":
            return box_masks(ratio, height, width, generator)
        return stroke_masks(ratio, height, width, strokes=self.strokes, generator=generator)

    def masked(self, clean: Tensor, mask: Tensor) -> Pair:
        """The pair of clean images with holes."""
        return pair(clean * (1 - mask), clean, mask=mask)

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Pair:
        n, height, width = len(clean), *clean.shape[-2:]
        if self.files is not None:
            return self.masked(clean, self.files.choose(n, height, width, clean.device, generator))
        ratio = uniform(n, self.ratios[0], self.ratios[-1], clean.device, generator)
        return self.masked(clean, self.holes(ratio, height, width, generator))

    def given(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Pair:
        raise UserError("task=inpaint needs a mask beside the image: use restore with a pair that has one")

    def test_pairs(self, run: Any, number: int, image: Tensor, target: Tensor | None) -> Iterator[tuple[str, Pair]]:
        height, width = image.shape[-2:]
        if self.files is not None:
            mask = self.files.at(number, height, width).to(image.device)
            share = float(mask.mean())
            inside = [bucket(a, b) for a, b in self.bins if a <= share < b or (share == b == self.ratios[-1])]
            yield (inside[0] if inside else ""), self.masked(image, mask)
            return
        for i, (low, high) in enumerate(self.bins):
            generator = torch.Generator().manual_seed(mix_seed(self.degrade_seed, number, i))
            ratio = uniform(1, low, high, image.device, generator)
            yield bucket(low, high), self.masked(image, self.holes(ratio, height, width, generator))

    def composite(self, made: Pair, out: Tensor) -> Tensor:
        assert made.mask is not None
        return made.x * (1 - made.mask) + out * made.mask

    def protocol(self) -> dict[str, Any]:
        if self.files is not None:
            kind = (
                f"{len(self.files)} mask files, image i with mask i modulo their number, resized to the nearest pixel"
            )
        else:
            kind = "random strokes" if self.masks == "strokes" else "one random box"
        buckets = ", ".join(f"{low:.0%} to {high:.0%}" for low, high in self.bins)
        return {"masks": kind, "hole_ratios": buckets, "measured_image": "composite: known pixels are put back"}


def bucket(low: float, high: float) -> str:
    """Name of a bucket of hole ratios, in whole percent: ``20_40``."""
    return f"{round(low * 100)}_{round(high * 100)}"
