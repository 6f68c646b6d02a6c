"""Stochastic head tuning, a two-layer network, and pictures of stripes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from filtrun.context import Run
from filtrun.data.base import Data
from filtrun.data.split import Split
from filtrun.method import Method
from filtrun.options import opt


@dataclass
class NoisyHead(Method):
    """Train the classification head with a little noise on its gradient."""

    noise: float = opt(0.01, "standard deviation of the noise added to the gradient", low=0)

    trains: ClassVar = "part"
    tasks: ClassVar = ("classify",)
    paper: ClassVar[str] = "an example (2026)"

    def edit_model(self, run: Run) -> None:
        self.head = run.task.head(run.model)
        run.claim(self, self.head)
        for parameter in self.head:
            parameter.requires_grad_(True)

    def after_backward(self, run: Run) -> None:
        for parameter in self.head:
            parameter.grad += self.noise * torch.randn_like(parameter)

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {"noise": self.noise}


class TwoLayers(nn.Module):
    """Images (N, C, H, W), normalised -> logits (N, K)."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_channels * image_size**2, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)).relu())


@dataclass
class Stripes(Data):
    """Grey 8x8 images: horizontal, vertical, or diagonal stripes, at a random offset."""

    target: list[int] = opt([2], "class ids held out from the base")
    images: int = opt(300, "training images", low=30)

    name: ClassVar[str] = "stripes"
    licence: ClassVar[str] = "CC0"
    classes: ClassVar = ("horizontal", "vertical", "diagonal")
    channels: ClassVar[int] = 1
    image_size: ClassVar[int] = 8

    def _load(self) -> dict[str, Split]:
        return {"train": self._draw(self.images, "train", 0), "test": self._draw(60, "test", 1)}

    def _draw(self, count: int, name: str, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 3
        offset = torch.randint(4, (count, 1, 1), generator=generator)
        rows, columns = torch.arange(8).view(1, 8, 1), torch.arange(8).view(1, 1, 8)
        direction = torch.tensor([[1, 0], [0, 1], [1, 1]])[labels]
        phase = rows * direction[:, :1, None] + columns * direction[:, 1:, None] + offset
        return Split(((phase % 4 < 2) * 255).to(torch.uint8).unsqueeze(1), labels, name=name)
