"""Task derain: remove rain streaks, synthetic or from pairs of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from filtrun.degrade.rain import add_rain, streaks
from filtrun.errors import UserError
from filtrun.options import opt
from filtrun.tasks.image_to_image import ImageToImage
from filtrun.tasks.pair import Pair, pair


@dataclass
class Derain(ImageToImage):
    """Rain removal; PSNR and SSIM are of the luma, as in the tables since MPRNet (older ones: ``task.measure=rgb``).

    With data=pairs the inputs are given; else streaks of random density, length, direction and brightness are laid
    over clean photographs.
    """

    measure: str = opt("y", "what PSNR and SSIM compare: all channels, or luma", choices=("rgb", "y"))
    mode: str = opt("additive", "how rain meets the image", choices=("additive", "screen"))
    density: list[float] = opt([0.002, 0.012], "share of pixels with a streak, lowest and highest")
    length: list[float] = opt([9.0, 31.0], "length of the streaks in pixels, lowest and highest")
    lean: float = opt(30.0, "largest angle from the vertical, degrees", low=0, high=90)
    thickness: list[float] = opt([0.5, 1.2], "standard deviation across a streak in pixels, lowest and highest")
    brightness: list[float] = opt([0.2, 0.6], "of the brightest streaks, lowest and highest")

    kind: ClassVar[str] = "derain"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("density", "length", "thickness", "brightness"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise UserError(f"task.{name}={bounds} must be [lowest, highest], both above 0")

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Pair:
        def bounds(values: list[float]) -> tuple[float, float]:
            return values[0], values[1]

        layer = streaks(
            len(clean), *clean.shape[-2:], density=bounds(self.density), length=bounds(self.length), lean=self.lean,
            thickness=bounds(self.thickness), brightness=bounds(self.brightness), device=clean.device,
            generator=generator,
        )  # fmt: skip
        return pair(add_rain(clean, layer, self.mode), clean)

    def protocol(self) -> dict[str, Any]:
        shape = f"length {self.length} pixels, up to {self.lean:g} degrees, brightness {self.brightness}"
        return {"rain": f"synthetic, {self.mode}: density {self.density}, {shape}"}
