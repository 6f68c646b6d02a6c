"""CIFAR ResNets with parameter-free shortcuts.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), section 4.2: depth
6n + 2, three stages of n basic blocks with 16, 32 and 64 channels, option-A shortcuts. Published CIFAR-10 test errors
(their Table 6): 8.75 % at depth 20, 7.51 % at 32, 6.97 % at 56, 6.61 +- 0.16 % at 110.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from filtrun.errors import UserError


class OptionA(nn.Module):
    """Identity shortcut between stages: keep every `stride`-th pixel and add zero channels, half before, half after.

    No parameters. Where the difference of the channel counts is odd, the extra zero channel goes last.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.before = stride, (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`` with 3x3 convolutions; the first one has the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else OptionA(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for small images: 3x3 stem, three stages, global average pool, `linear` head.

    Takes any image side from 1 pixel on; stages 2 and 3 halve it. Keys are those of the widely shared checkpoints
    (``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``linear``).

    Args:
        in_channels: image channels.
        num_classes: outputs K of the head.
        depth: 6n + 2 for n >= 1: 8, 14, 20, 32, 44, 56, 110, ...
        width: channels of the first stage (paper: 16); the others have twice and four times as many.

    Raises:
        UserError: if the depth is not of that form or the width is below 1.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, depth: int = 20, width: int = 16):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            near = max(8, 6 * round((depth - 2) / 6) + 2)
            raise UserError(f"model.depth={depth} must be 6n + 2 (20, 32, 56, 110, ...); the nearest is {near}")
        if width < 1:
            raise UserError(f"model.width={width} is out of range; allowed is [1, inf]")
        self.in_channels, self.num_classes, self.depth = in_channels, num_classes, depth
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1, count)
        self.layer2 = _stage(width, 2 * width, 2, count)
        self.layer3 = _stage(2 * width, 4 * width, 2, count)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # He et al. 2015 (arXiv 1502.01852), as the paper asks
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, C, H, W) to logits (N, K)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, stride: int, count: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(count - 1)))


def cifar_resnet(in_channels: int = 3, num_classes: int = 10, depth: int = 20, width: int = 16) -> CifarResNet:
    """Build a `CifarResNet`; the arguments are those of the class."""
    return CifarResNet(in_channels, num_classes, depth, width)
