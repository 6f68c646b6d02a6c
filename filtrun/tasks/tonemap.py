"""Task tonemap: retouch photographs, from pairs (input, retouched) or from a known adjustment to be undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from filtrun.degrade.exposure import adjust, scale_detail
from filtrun.degrade.noise import uniform
from filtrun.errors import UserError
from filtrun.metrics.image import round8
from filtrun.options import opt
from filtrun.tasks.image_to_image import ImageToImage
from filtrun.tasks.pair import Pair, pair


@dataclass
class ToneMap(ImageToImage):
    """Photo enhancement and tone mapping; PSNR, SSIM and colour difference of 8-bit RGB.

    With data=pairs or data=fivek the retouched images are given; HDR inputs come in linear light, above 1 too. Else
    inputs are made from photographs by a known operator: darker, of higher gamma and lower contrast (see
    `filtrun.degrade.exposure.adjust`), its three values drawn for each image. With `detail` other than 1 their fine
    structure is weaker or stronger too, which takes a local operator to undo (see `scale_detail`).
    """

    exposure: list[float] = opt([-1.5, -0.5], "stops, lowest and highest")
    gamma: list[float] = opt([1.0, 1.4], "exponent in sRGB, lowest and highest")
    contrast: list[float] = opt([0.6, 0.9], "factor of the distance from middle grey, lowest and highest")
    detail: list[float] = opt([1.0, 1.0], "factor of what a blur takes away, lowest and highest; 1: left as it is")
    detail_sigma: float = opt(4.0, "standard deviation of that blur in pixels", low=0.3, high=50)
    round_input: bool = opt(True, "self-made inputs have 8 bits")

    kind: ClassVar[str] = "tonemap"
    reported: ClassVar[tuple[str, ...]] = ("psnr", "ssim", "delta_e", "lpips")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("exposure", -16.0), ("gamma", 0.05), ("contrast", 0.05), ("detail", 0.0)):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not low <= bounds[0] <= bounds[1]:
                raise UserError(f"task.{name}={bounds} must be [lowest, highest], from {low:g} on")

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Pair:
        ranges = (self.exposure, self.gamma, self.contrast)
        stops, gamma, contrast = (uniform(len(clean), r[0], r[1], clean.device, generator) for r in ranges)
        x = clean
        if self.detail != [1.0, 1.0]:
            factor = uniform(len(clean), self.detail[0], self.detail[1], clean.device, generator)
            x = scale_detail(x, factor, self.detail_sigma)
        x = adjust(x, stops, gamma, contrast)
        return pair(round8(x) if self.round_input else x, clean)

    def protocol(self) -> dict[str, Any]:
        operator = f"exposure {self.exposure} stops in linear light, gamma {self.gamma}, contrast {self.contrast}"
        if self.detail != [1.0, 1.0]:
            operator = f"detail {self.detail} at {self.detail_sigma:g} pixels, {operator}"
        return {"operator": operator}
