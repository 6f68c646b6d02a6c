"""Task denoise: remove Gaussian or Poisson-Gaussian noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from filtrun.context import mix_seed
from filtrun.degrade.noise import gaussian, poisson_gaussian, row_noise, uniform
from filtrun.errors import UserError
from filtrun.options import opt
from filtrun.task import Metric
from filtrun.tasks.image_to_image import QUALITY, ImageToImage
from filtrun.tasks.pair import Pair, pair


@dataclass
class Denoise(ImageToImage):
    """Denoising of images with noise of standard deviation `sigma` on the scale of 0 to 255, not clipped.

    With `blind` the training noise is drawn from a range for each image. A model whose forward takes `sigma` is told
    it. Further test `levels` are reported as ``psnr_s15``; one test image has the same noise at every level, scaled.
    """

    sigma: float = opt(25.0, "standard deviation of the noise on the scale of 0 to 255", low=0)
    blind: list[float] = opt([], "training: draw sigma from this range [low, high]; empty: always sigma")
    levels: list[float] = opt([], "further noise levels of the test; empty: sigma alone")
    noise: str = opt("gaussian", "kind of noise", choices=("gaussian", "poisson_gaussian"))
    peak: float = opt(255.0, "photons at white, for poisson_gaussian", low=1)

    rows: float = opt(
        0.0, "standard deviation of noise that the pixels of a row share, on the scale of 0 to 255", low=0
    )

    kind: ClassVar[str] = "denoise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blind and (len(self.blind) != 2 or not 0 <= self.blind[0] <= self.blind[1]):
            raise UserError(f"task.blind={self.blind} must be [low, high], such as [0, 55]")
        if any(level < 0 for level in self.levels):
            raise UserError(f"task.levels={self.levels} must not be negative")
        more = {}
        for level in self.levels:
            for name in ("psnr", "ssim"):
                known = QUALITY[name]
                more[f"{name}_s{level:g}".replace(".", "_")] = Metric(
                    f"{known.title}, sigma {level:g}", known.better, known.meaning, known.format
                )
        self.metrics = {**QUALITY, **more}  # type: ignore[misc]

    def noisy(self, clean: Tensor, sigma: Tensor, generator: torch.Generator | None) -> Pair:
        """The pair of clean images with noise of `sigma` (N,), on the scale of 0 to 1."""
        if self.noise == "gaussian":
            x = gaussian(clean, sigma, generator)
        else:
            x = poisson_gaussian(clean, self.peak, sigma, generator)
        if self.rows:
            x = row_noise(x, self.rows / 255, generator)
        return pair(x, clean, sigma=sigma)

    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Pair:
        low, high = self.blind if self.blind and generator is None else (self.sigma, self.sigma)
        return self.noisy(clean, uniform(len(clean), low / 255, high / 255, clean.device, generator), generator)

    def given(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Pair:
        return pair(x, y, sigma=x.new_full((len(x),), self.sigma / 255))

    def test_pairs(self, run: Any, number: int, image: Tensor, target: Tensor | None) -> Iterator[tuple[str, Pair]]:
        if target is not None or not self.levels:
            yield from super().test_pairs(run, number, image, target)
            return
        for level in self.levels:
            generator = torch.Generator().manual_seed(mix_seed(self.degrade_seed, number))
            sigma = image.new_full((len(image),), level / 255)
            yield f"s{level:g}".replace(".", "_"), self.noisy(image, sigma, generator)

    def protocol(self) -> dict[str, Any]:
        levels = ", ".join(f"{level:g}" for level in self.levels or [self.sigma])
        kind = "Gaussian" if self.noise == "gaussian" else f"Poisson ({self.peak:g} photons at white) and Gaussian"
        kind += f" and row noise of {self.rows:g}" if self.rows else ""
        trained = f"drawn from {self.blind}" if self.blind else f"{self.sigma:g}"
        return {"noise": f"{kind}, not clipped", "sigma": f"{levels} of 255 (training: {trained})"}
