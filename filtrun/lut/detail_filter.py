"""The part of LLF-LUT that predicts remapping parameters for each pyramid level and remaps the details with them.

Source: code of Zhang et al. (fengzhang427/LLF-LUT, models/PPB.py); the residual block is that of Chen et al., "Simple
Baselines for Image Restoration", ECCV 2022 (NAFNet). Tensor names follow the released checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.lut.edges import canny, luma
from filtrun.lut.local_laplacian import REFERENCES, remap, remap_classical
from filtrun.lut.workers import for_pieces

STRIP = 1 << 17
"""Pixels of a level that are handled at a time where no gradient is needed."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (N, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class GatedBlock(nn.Module):
    """Residual block: norm, 1x1, 3x3, product of the two halves, channel attention, 1x1, scale `beta` starting at 0."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.norm1 = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(half, half, 1))
        self.conv3 = nn.Conv2d(half, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.conv2(self.conv1(self.norm1(x))).chunk(2, dim=1)
        gated = one * two
        return x + self.conv3(gated * self.sca(gated)) * self.beta


class _Parameters(nn.Module):
    """The layers under the names of the released checkpoints."""

    def __init__(self, levels: int, blocks: int):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(10, 64, 1),
            nn.LeakyReLU(0.2, inplace=True),
            *(GatedBlock(64) for _ in range(blocks)),
            nn.Conv2d(64, 2, 1),
        )
        self.high_freq_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(9, 16, 1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(16, 16, 3, padding=1, groups=16),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(16, 2, 1),
            )
            for _ in range(levels - 1)
        )


class DetailFilter(nn.Module):
    """Details of the tone-mapped image, remapped with learned per-pixel `fact` and `sigma`.

    Args:
        levels: Laplacian levels, 1 or more.
        blocks: residual blocks at the coarsest detail level.
        rule: "released" (`filtrun.lut.local_laplacian.remap`) or "classical" (`remap_classical`).
        references: discretisation of the tone axis.
    """

    def __init__(self, levels: int = 3, blocks: int = 1, rule: str = "released", references: int = REFERENCES):
        super().__init__()
        self.levels, self.rule, self.references = levels, rule, references
        self.block = _Parameters(levels, blocks)

    def forward(self, gaussian: list[Tensor], laplacian: list[Tensor], low: Tensor) -> list[Tensor]:
        """Remap all levels.

        Args:
            gaussian, laplacian: pyramids of the image after the global table, finest first, `levels` + 1 each.
            low: (N, 3, h, w), the low-pass level after the pixel-wise tables.

        Returns:
            The Laplacian pyramid of the output, finest first, `low` last.
        """
        size = gaussian[-2].shape[2:]
        edges = canny(luma(low.detach()))
        inputs = [gaussian[-2], *(F.interpolate(x, size=size) for x in (edges, low, gaussian[-1]))]
        detail = self._remap(gaussian[-2], laplacian[-2], self.block.model(torch.cat(inputs, dim=1)))
        details, coarse = [detail], low
        for step, layers in enumerate(self.block.high_freq_blocks):
            level = self.levels - 2 - step
            size = laplacian[level].shape[2:]
            coarse = F.interpolate(F.interpolate(coarse, size=detail.shape[2:]) + detail, size=size)
            inputs = [coarse, laplacian[level], F.interpolate(detail, size=size)]
            if torch.is_grad_enabled() or self.rule == "classical":
                detail = self._remap(gaussian[level], laplacian[level], layers(torch.cat(inputs, dim=1)))
            else:
                detail = self._in_strips(layers, inputs, gaussian[level], laplacian[level])
            details.append(detail)
        return [*details[::-1], low]

    def _in_strips(self, layers: nn.Module, inputs: list[Tensor], gaussian: Tensor, detail: Tensor) -> Tensor:
        """Predict and remap a few rows at a time: at 4K the sixteen feature maps would leave the cache by far.

        The layers see one row to either side (their 3x3 convolution), so nothing changes.
        """
        out, (height, width) = torch.empty_like(detail), detail.shape[2:]

        def strip(start: int, end: int) -> None:
            above, below = max(start - 1, 0), min(end + 1, height)
            parameters = layers(torch.cat([x[:, :, above:below] for x in inputs], dim=1))
            parameters = parameters[:, :, start - above : end - above]
            out[:, :, start:end] = self._remap(gaussian[:, :, start:end], detail[:, :, start:end], parameters)

        for_pieces(strip, height, max(16, STRIP // width), parallel=not detail.is_cuda)
        return out

    def _remap(self, gaussian: Tensor, detail: Tensor, parameters: Tensor) -> Tensor:
        fact, sigma = parameters.chunk(2, dim=1)
        if self.rule == "classical":
            return remap_classical(gaussian, fact, sigma, self.references)
        return remap(gaussian, detail, fact, sigma, self.references)
