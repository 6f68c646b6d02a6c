"""A small convolutional classifier: the judge of generated digits, and their feature network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from filtrun.errors import UserError


class SmallCNN(nn.Module):
    """Three convolutions, global pooling and a linear head; about 95 000 parameters for any image size.

    Args:
        num_classes: number of classes K.
        in_channels: 1 or 3 (any number works).
        image_size: square size; only checked, from 8 to 64.
        width: channels of the first convolution; the features have 4 * width.
        seed: seed of the initial weights, drawn without touching torch's global generator; None draws from it.

    forward(x (N, C, H, W) in [0, 1]) -> logits (N, K); features(x) -> (N, 4 * width).
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, image_size: int = 8, width: int = 32, seed: int | None = None
    ) -> None:
        super().__init__()
        if not 8 <= image_size <= 64:
            raise UserError(f"image_size={image_size} is not allowed for SmallCNN; allowed is 8 to 64")
        # forking keeps the weights of the judge apart from those of the run that it judges
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            pool = [nn.MaxPool2d(2) if image_size > limit else nn.Identity() for limit in (15, 7)]
            self.body = nn.Sequential(
                *_block(in_channels, width), pool[0], *_block(width, 2 * width), pool[1], *_block(2 * width, 4 * width)
            )
            self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (N, 4 * width), at least 0, of images in [0, 1]."""
        return self.body(2 * x - 1).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
