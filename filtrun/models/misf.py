"""MISF: Multi-level Interactive Siamese Filtering for High-Fidelity Image Inpainting (CVPR 2022, arXiv 2203.06304).

Official code tsingqguo/misf. An encoder-decoder fills the hole while a second branch predicts, for every pixel, the
kernels that filter its deep feature map ("semantic filtering") and its output image ("image-level filtering").

Where this differs from the official code, on purpose:

- It takes images of any size: they are padded by repeating the border, and the output is cut back. The official code
  swaps height and width when it brings the semantic kernels to size, which is harmless for square images only;
  ``official_sides=true`` does the same.
- A convolution that nothing uses (327 parameters) is left out, unless ``unused_layer=true`` asks for it.

The expansion of the kernels along the channels is theirs by default (see `expand_kernels`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError, unknown
from filtrun.models.misf_parts import KernelPredictor, ResidualBlock, expand_kernels, pixelwise_filter

FILTERS = ("both", "semantic", "image", "none")
EXPANSIONS = ("official", "grouped")


class MISF(nn.Module):
    """Inpainting generator ``forward(x, mask)``; 23,059,166 parameters for RGB at width 64 (23,059,493 with the unused
    layer), about 130 billion multiply-adds at 256 x 256.

    Args:
        in_channels: image channels C.
        width: channels at full resolution (paper: 64); 16 gives 1.4 million parameters.
        blocks: residual blocks in the middle.
        kernel_size: odd side of the predicted kernels, both levels.
        filtering: both | semantic | image | none: which levels are filtered (the paper's ablation). A level that is
            switched off has no layer that would get no gradient.
        expand: official | grouped, see `expand_kernels`.
        official_sides: resize the semantic kernels to (W/4, H/4) as the official code does; scrambles them for images
            that are not square.
        unused_layer: hold the unused convolution too, to load or count the released weights.

    Raises:
        UserError: a value outside what is said above.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        blocks: int = 8,
        kernel_size: int = 3,
        filtering: str = "both",
        expand: str = "official",
        official_sides: bool = False,
        unused_layer: bool = False,
    ) -> None:
        super().__init__()
        if filtering not in FILTERS:
            raise unknown("model.filtering", filtering, FILTERS)
        if expand not in EXPANSIONS:
            raise unknown("model.expand", expand, EXPANSIONS)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"model.kernel_size={kernel_size} must be odd, e.g. 3")
        for key, value, low in (("width", width, 1), ("blocks", blocks, 0)):
            if value < low:
                raise UserError(f"model.{key}={value} is out of range; allowed is [{low}, inf]")
        self.in_channels, self.width, self.kernel_size = in_channels, width, kernel_size
        self.filtering, self.expand, self.official_sides = filtering, expand, official_sides
        self.encoder0 = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(in_channels + 1, width, 7), nn.InstanceNorm2d(width), nn.ReLU()
        )
        self.encoder1 = _half(width, 2 * width)
        self.encoder2 = _half(2 * width, 4 * width)
        self.middle = nn.Sequential(*[ResidualBlock(4 * width) for _ in range(blocks)])
        self.decoder = nn.Sequential(
            *_double(4 * width, 2 * width),
            *_double(2 * width, width),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, in_channels, 7),
        )
        self.kpn_model: KernelPredictor | None = None
        if filtering != "none":
            levels = {"semantic": filtering != "image", "image": filtering != "semantic"}
            self.kpn_model = KernelPredictor(
                in_channels + 1, in_channels, width, kernel_size, unused_layer=unused_layer, **levels
            )
        self.apply(lambda module: _start(module, 0.02 * (64 / width) ** 0.5))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Fill the holes.

        Args:
            x: (N, C, H, W) in [0, 1]; what it holds inside the hole does not matter.
            mask: (N, 1, H, W), 1 in the hole and 0 outside.

        Returns:
            (N, C, H, W) in [0, 1], also outside the hole an output of the network: see `composite`.
        """
        height, width = x.shape[-2:]
        z = torch.cat([x * (1 - mask), mask], dim=1)
        below, right = max(12, height + -height % 4) - height, max(12, width + -width % 4) - width
        if below or right:  # the dilated blocks reflect two pixels of the quarter-size feature map
            z = F.pad(z, (0, right, 0, below), mode="replicate")
        out = self.fill(z)
        return out[..., :height, :width]

    def fill(self, z: Tensor) -> Tensor:
        """The network itself: z (N, C + 1, H, W) of masked image and mask, sides multiples of 4 and at least 12."""
        half = self.encoder1(self.encoder0(z))
        feature = self.encoder2(half)
        semantic, image = self.predict(z, half)
        if semantic is not None:
            feature = pixelwise_filter(feature, semantic, self.kernel_size)
        y = self.decoder(self.middle(feature))
        if image is not None:
            y = pixelwise_filter(y, image, self.kernel_size)
        return (torch.tanh(y) + 1) / 2

    def predict(self, z: Tensor, half: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Kernels of the deep feature map (N, 4w * k^2, H/4, W/4) and of the image (N, C * k^2, H, W), or None."""
        if self.kpn_model is None:
            return None, None
        semantic, image = self.kpn_model(z, half)
        if semantic is not None:
            if self.official_sides:
                n, c, h, w = semantic.shape
                semantic = F.interpolate(semantic, size=(w, h), mode="nearest").reshape(n, c, h, w)
            semantic = expand_kernels(semantic, self.width, 4, self.expand)
        return semantic, image


def _half(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.InstanceNorm2d(outputs), nn.ReLU())


def _double(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.InstanceNorm2d(outputs), nn.ReLU()]


def _start(module: nn.Module, std: float) -> None:
    """Normal weights and zero biases: the official code starts every convolution of width 64 at N(0, 0.02^2); narrower
    ones start wider, so that as much of the signal gets through."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
