"""The network of the CIFAR-10 speed run airbench94.

K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498; the layers and constants are those of
its version with Muon (KellerJordan/cifar10-airbench, airbench94_muon.py), which states 94.01 % in 2.59 s on an A100.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError


class Airbench94(nn.Module):
    """A fixed whitening layer, three groups of two convolutions, a global maximum and a linear head.

    `look_at` computes the first layer from training images. Whitening weights and batch-norm gains do not train, so
    they are buffers; convolutions and head have no bias. Logits are divided by the width of the head's input. The
    pools stop at one pixel, so that images of any side from 2 pass.

    Args:
        in_channels: image channels.
        num_classes: outputs K of the head.
        widths: channels of the three groups.
        whiten_eps: added to the patches' variances.
        bias_lr_factor, head_lr_factor: the learning rate of biases and of the head as multiples of the run's.
        bias_decay, head_decay: their weight decay; None: the run's.
        whiten_share: the first layer's bias trains for this part of the run, its learning rate falling to 0.

    Raises:
        UserError: for widths that are not three positive numbers, or a share outside (0, 1].
    """

    looks_at = 5000
    """How many training images `look_at` should be shown."""

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        widths: list[int] = [64, 256, 256],  # noqa: B006 - read by the config
        whiten_eps: float = 5e-4,
        bias_lr_factor: float = 1.0,
        head_lr_factor: float = 1.0,
        bias_decay: float | None = None,
        head_decay: float | None = None,
        whiten_share: float = 1.0,
    ):
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise UserError(f"model.widths={widths} must be three positive numbers")
        if not 0 < whiten_share <= 1:
            raise UserError(f"model.whiten_share={whiten_share} must be in (0, 1]")
        self.in_channels, self.num_classes, self.whiten_eps = in_channels, num_classes, whiten_eps
        self.factors, self.decays = (bias_lr_factor, head_lr_factor), (bias_decay, head_decay)
        self.whiten_share = whiten_share
        first = nn.Conv2d(in_channels, 8 * in_channels, 2)
        self.whiten: Tensor
        self.register_buffer("whiten", first.weight.detach().clone())
        self.whiten_bias = first.bias
        sizes = [8 * in_channels, *widths]
        self.groups = nn.Sequential(*(Group(a, b) for a, b in zip(sizes, widths, strict=False)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    @torch.no_grad()
    def look_at(self, images: Tensor) -> None:
        """Set the first layer to the eigenvectors of 2x2 patches, each over its standard deviation, and the negatives.

        `images` are normalised, (N, C, H, W). Then the first half of its outputs, without bias, is uncorrelated with
        variance 1 (less where a variance is not large against `whiten_eps`).
        """
        patches = F.unfold(images.float(), 2).transpose(1, 2).flatten(0, 1)  # (N * places, 4 C)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        rows = vectors.T / (values.clamp(min=0) + self.whiten_eps).sqrt()[:, None]
        self.whiten.copy_(torch.cat([rows, -rows]).view(self.whiten.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, K)."""
        x = F.gelu(F.conv2d(x, self.whiten, self.whiten_bias))
        x = self.groups(x).amax(dim=(2, 3))
        return self.head(x) / x.size(1)

    def param_groups(self) -> list[dict[str, Any]]:
        """Biases and the head with their own learning rates and decays, all by the rule for what is no matrix."""
        norms = [m.bias for m in self.modules() if isinstance(m, Norm)]
        asked: list[dict[str, Any]] = [
            {"params": [self.whiten_bias], "lr_factor": self.factors[0], "lr_share": self.whiten_share},
            {"params": norms, "lr_factor": self.factors[0]},
            {"params": [self.head.weight], "lr_factor": self.factors[1]},
        ]
        for group, decay in zip(asked, (self.decays[0], *self.decays), strict=True):
            group |= {"rule": "others"} | ({} if decay is None else {"weight_decay": decay})
        return asked


class Norm(nn.BatchNorm2d):
    """Batch norm with a bias and no gain, running statistics that follow fast (0.4 of each batch), and a tiny eps."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        del self.weight  # kernels want one; a buffer is what nothing trains
        self.register_buffer("weight", torch.ones(channels), persistent=False)


class Conv(nn.Conv2d):
    """3x3, same size, no bias; starts as the identity on as many channels as come in, random on the others."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight.detach()[:inputs])


class Group(nn.Module):
    """Convolution, 2x2 pool, norm, GELU, convolution, norm, GELU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.norm1 = Conv(inputs, outputs), Norm(outputs)
        self.conv2, self.norm2 = Conv(outputs, outputs), Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H // 2, W // 2); a side of one pixel stays."""
        x = self.conv1(x)
        x = F.max_pool2d(x, (min(2, x.size(2)), min(2, x.size(3))))
        x = F.gelu(self.norm1(x))
        return F.gelu(self.norm2(self.conv2(x)))
