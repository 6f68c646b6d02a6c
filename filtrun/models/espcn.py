"""ESPCN: every convolution at low resolution, the last one's channels rearranged into the enlarged image.

Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network", CVPR 2016 (arXiv 1609.05158).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from filtrun.errors import UserError, unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class ESPCN(nn.Module):
    """Three convolutions, 5x5 / 64, 3x3 / 32 and 3x3 / C r^2, then the pixel shuffle.

    Parameters for one channel: 21,284 (r = 2), 22,729 (r = 3), 24,752 (r = 4). Forward: (N, C, H, W) ->
    (N, C, r H, r W).

    Args:
        scale: r, how many times larger the output is.
        in_channels: C; the paper works on luma, so 1.
        activation: tanh (the paper's choice) or relu.
        order: channel order of the last layer. torch: as nn.PixelShuffle, c r^2 + r (row % r) + column % r. paper:
            its eq. 4 with x along the columns, C r (column % r) + C (row % r) + c. Trained weights of one order
            do not fit the other; training from scratch is the same.
        init: scaled (a widely used re-implementation's): normal weights of variance
            2 / (outputs of a kernel), standard deviation 0.001 in the last layer, zero biases; or default (torch's).

    Raises:
        UserError: an unknown activation, order or init, or a scale below 1.
    """

    def __init__(
        self,
        scale: int,
        in_channels: int = 1,
        activation: str = "tanh",
        order: str = "torch",
        init: str = "scaled",
    ) -> None:
        super().__init__()
        for key, value, allowed in (
            ("activation", activation, tuple(ACTIVATIONS)), ("order", order, ("torch", "paper")),
            ("init", init, ("default", "scaled")),
        ):  # fmt: skip
            if value not in allowed:
                raise unknown(f"model.{key}", value, allowed)
        if scale < 1:
            raise UserError(f"model.scale={scale} must be at least 1")
        act = ACTIVATIONS[activation]
        self.scale, self.order = scale, order
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 64, 5, padding=2), act(), nn.Conv2d(64, 32, 3, padding=1), act()
        )
        self.last = nn.Conv2d(32, in_channels * scale**2, 3, padding=1)
        if init == "scaled":
            for layer in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
                outputs = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
                nn.init.normal_(layer.weight, std=0.001 if layer is self.last else (2 / outputs) ** 0.5)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(self.last(self.body(x)), self.scale, self.order)


def shuffle(x: Tensor, r: int, order: str = "torch") -> Tensor:
    """Rearrange (N, C r^2, H, W) into (N, C, r H, r W); see `ESPCN` for the two orders."""
    if order == "paper":
        n, channels, h, w = x.shape
        x = x.view(n, r, r, channels // r**2, h, w).permute(0, 3, 2, 1, 4, 5).reshape(n, channels, h, w)
    return torch.pixel_shuffle(x, r)
