"""VGG-16 with batch norm in its CIFAR form.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015 (arXiv
1409.1556), configuration D. For 32x32 images the usual form in pruning papers (Li et al., "Pruning Filters for
Efficient ConvNets", ICLR 2017, and later ones) keeps the 13 convolutions, each with batch norm, and replaces the
three wide linear layers by one from the 512 pooled channels: 14.7 M parameters instead of 138 M.
"""

from __future__ import annotations

import torch
from torch import nn

from filtrun.errors import UserError

STAGES = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]


class VGG16(nn.Module):
    """13 x (3x3 convolution, batch norm, ReLU), 2x2 max pools between the stages, global mean, linear head.

    A pool follows each stage as long as the map is at least 2 pixels wide, so that 8x8 images pass (three pools
    instead of five). The convolutions carry no bias: the batch norm after each has one.

    Args:
        in_channels: image channels.
        num_classes: outputs K of the head.
        image_size: side of the training images in pixels; sets the number of pools. Larger images pass too.
        width: multiplies all channel counts; 1.0 is the paper's.
        dropout: probability in [0, 1) before the head.

    Raises:
        UserError: for a width that leaves no channel or a dropout outside [0, 1).
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
        if width * 64 < 1:
            raise UserError(f"model.width={width} leaves no channel; it must be at least {1 / 64}")
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout={dropout} is out of range; allowed is [0, 1)")
        self.in_channels, self.num_classes = in_channels, num_classes
        layers: list[nn.Module] = []
        now, side = in_channels, image_size
        for stage in STAGES:
            for channels in stage:
                wide = int(channels * width)
                layers += [nn.Conv2d(now, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
                now = wide
            if side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(now, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, C, H, W) to logits (N, K); H and W at least those of `image_size`."""
        return self.classifier(self.dropout(self.features(x).mean(dim=(2, 3))))
