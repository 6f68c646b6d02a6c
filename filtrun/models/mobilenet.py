"""MobileNetV2 with strides for small images.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018 (arXiv
1801.04381), Table 2. The ImageNet form halves the image five times; on 32x32 images the common CIFAR form drops the
stride of the stem and that of the first 24-channel block, which leaves a 4x4 map. 2.24 M parameters for ten classes.
"""

from __future__ import annotations

import torch
from torch import nn

from filtrun.errors import UserError

# expansion, channels, blocks, stride of the first block (paper's Table 2)
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
LAST = 1280
SMALLEST_MAP = 2  # pixels: no stride goes below


def scaled(channels: float, divisor: int = 8) -> int:
    """Round a scaled channel count to a multiple of `divisor`, never more than 10 % down (as in the official code)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; adds its input where shape and stride allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        layers = [] if expansion == 1 else _convolution(inputs, hidden, 1)
        layers += _convolution(hidden, hidden, 3, stride, groups=hidden)
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def strides_for(image_size: int) -> list[int]:
    """Strides of the stem and the seven stages for a given image side.

    The paper's five halvings for 128 pixels or more, one less (stem) below that, two less (stem and 24-channel stage)
    below 64; then later ones are dropped as soon as the map would get narrower than `SMALLEST_MAP`.
    """
    strides = [2] + [stage[3] for stage in STAGES]
    if image_size < 128:
        strides[0] = 1
    if image_size < 64:
        strides[2] = 1
    side = image_size
    for i, stride in enumerate(strides):
        if stride == 2 and side // 2 < SMALLEST_MAP:
            strides[i] = 1
        elif stride == 2:
            side //= 2
    return strides


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residual blocks, 1x1 convolution to 1280 channels, global mean, `classifier` head.

    Args:
        in_channels: image channels.
        num_classes: outputs K of the head.
        image_size: side of the training images in pixels, sets the strides (see `strides_for`).
        width: the paper's width multiplier; channels are rounded to multiples of 8.
        dropout: probability in [0, 1) before the head.

    Raises:
        UserError: for a width of 0 or less or a dropout outside [0, 1).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 32,
        width: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if width <= 0:
            raise UserError(f"model.width={width} must be above 0; the paper uses 0.35 to 1.4")
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout={dropout} is out of range; allowed is [0, 1)")
        self.in_channels, self.num_classes = in_channels, num_classes
        stem, *strides = strides_for(image_size)
        now = scaled(32 * width)
        layers = _convolution(in_channels, now, 3, stem)
        for (expansion, channels, count, _), stride in zip(STAGES, strides, strict=True):
            wide = scaled(channels * width)
            for i in range(count):
                layers.append(InvertedResidual(now, wide, stride if i == 0 else 1, expansion))
                now = wide
        last = scaled(LAST * max(1.0, width))
        self.features = nn.Sequential(*layers, *_convolution(now, last, 1))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # a depthwise filter feeds kernel^2 outputs, not kernel^2 x channels as torch's fan_out counts
                kernel = module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=(2 * module.groups / (kernel * module.out_channels)) ** 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, C, H, W) to logits (N, K)."""
        return self.classifier(self.dropout(self.features(x).mean(dim=(2, 3))))
