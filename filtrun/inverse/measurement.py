"""A measurement of images: what was measured, by which operator, under how much noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.inverse.operators import Operator


@dataclass(frozen=True)
class Measurement:
    """y = H x + n for images x (N, C, H, W) in [-1, 1], n white with standard deviation `noise`."""

    y: Tensor
    operator: Operator
    noise: float = 0.0

    def residual(self, x: Tensor) -> Tensor:
        """H x - y, of y's shape."""
        return self.operator.forward(x) - self.y

    @property
    def count(self) -> int:
        """Numbers measured, of all images together."""
        return len(self.y) * self.operator.count


def pseudo_inverse(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    measurement: Measurement,
    generator: torch.Generator | None = None,
) -> Tensor:
    """H^+ y, in the form of a solver that asks no network: what a measurement gives by itself."""
    return measurement.operator.pinv(measurement.y)
