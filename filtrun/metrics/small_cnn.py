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


def train_small_cnn(
    net: SmallCNN, images: Tensor, labels: Tensor, *, epochs: int = 8, batch_size: int = 64, lr: float = 4e-3,
    weight_decay: float = 1e-2, seed: int = 0,
) -> SmallCNN:  # fmt: skip
    """Train in place with AdamW and a one-cycle rate; return the net in eval mode.

    Args:
        net: on the device of the data.
        images: (N, C, H, W) in [0, 1]. labels: (N,) int64.
        epochs, batch_size, lr (peak), weight_decay: recipe; the defaults fit digits in seconds.
        seed: order of the batches, from an own generator.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * max(1, len(images) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    net.train()
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for rows in order[: max(1, len(order) // batch_size) * batch_size].split(batch_size):
                loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()
