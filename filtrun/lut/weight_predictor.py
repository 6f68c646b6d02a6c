"""The transformer of LLF-LUT that says, from the low-pass image, how much each basis table counts.

Source: code of Zhang et al. (fengzhang427/LLF-LUT, models/Spatial_Transformer.py). Tensor names follow the released
checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.lut.attention import WINDOW, DecoderBlock, EncoderBlock

HEADS = (2, 4, 8, 16)
"""Attention heads of the encoder stages, finest first; the decoder has them in the reverse order."""
STAGES = len(HEADS)
LATENT = 8
"""Side of the feature map that the global weights are read from."""


class _Stage(nn.Module):
    """One block over channels-first features."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, *features: Tensor) -> Tensor:
        return self.blocks[0](*(f.permute(0, 2, 3, 1) for f in features)).permute(0, 3, 1, 2)


class _Named(nn.Module):
    """A layer under the name it has in the released checkpoints."""

    def __init__(self, name: str, *layers: nn.Module):
        super().__init__()
        self.layers_name = name
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.layers_name)(x)


class WeightPredictor(nn.Module):
    """Image (N, 3, h, w) to a weight map (N, 3 luts, h, w) and global weights (N, luts).

    Channels ``3 j .. 3 j + 2`` of the map weigh the red, green and blue output of table j. The features are made for
    images of about 64x64 pixels; others work: they are padded with zeros to whole windows at the coarsest stage.

    Args:
        luts: number of basis tables.
        dim: width of the features.
        drop_path: stochastic depth rate of the deepest blocks; it grows from 0 with depth.
        latent: how a coarsest feature map that is not 8x8 is brought to it for the global weights: "crop" cuts what is
            beyond and pads what is missing by reflection, or with zeros where reflection does not reach (released
            code); "pool" averages, so that the whole of a large image counts.
        unused_layers: also make the four layers that the released code makes and never uses (164,320 parameters at
            dim 32).
    """

    def __init__(
        self, luts: int = 3, dim: int = 32, drop_path: float = 0.1, latent: str = "crop", unused_layers: bool = True
    ):
        super().__init__()
        self.latent = latent
        self.input_proj = _Named("proj", nn.Conv2d(3, dim, 3, padding=1), nn.LeakyReLU(0.01))
        rates = torch.linspace(0, drop_path, STAGES).tolist()
        self.encoder_layers = nn.ModuleList(
            _Stage(EncoderBlock(dim, heads, drop_path=rate)) for heads, rate in zip(HEADS, rates, strict=True)
        )
        steps = STAGES if unused_layers else STAGES - 1
        self.downsample = nn.ModuleList(_Named("conv", nn.Conv2d(dim, dim, 4, 2, 1)) for _ in range(steps))
        self.decoder_layers = nn.ModuleList(
            _Stage(DecoderBlock(dim, heads, drop_path=rate))
            for heads, rate in zip(HEADS[::-1], rates[::-1], strict=True)
        )
        self.upsample = nn.ModuleList(_Named("deconv", nn.ConvTranspose2d(dim, dim, 2, 2)) for _ in range(STAGES - 1))
        self.head = nn.Linear(dim * LATENT**2, luts)
        self.recon_conv = nn.Conv2d(dim, 64, 3, padding=1)
        if unused_layers:  # the super-resolution tail of the network this one was derived from
            self.upconv1 = nn.Conv2d(dim, 4 * dim, 3, padding=1)
            self.upconv2 = nn.Conv2d(dim, 4 * 64, 3, padding=1)
            self.HRconv = nn.Conv2d(64, 64, 3, padding=1)
        self.conv_last = nn.Conv2d(64, 3 * luts, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters of the layers that `forward` does not use."""
        names = ("upconv1", "upconv2", "HRconv", f"downsample.{STAGES - 1}")
        own = dict(self.named_parameters())
        return [p for name, p in own.items() if name.startswith(tuple(f"{n}." for n in names))]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2:]
        x = self.input_proj(x)
        below, right = _padding(height, width)
        x = F.pad(x, (0, right, 0, below))
        encoded: list[Tensor] = []
        for level, stage in enumerate(self.encoder_layers):
            x = stage(x)
            encoded.append(x)
            if level < STAGES - 1:
                x = self.downsample[level](x)
        weights = self.head(self._latent(x).flatten(1))
        for level, stage in enumerate(self.decoder_layers):
            x = stage(x, encoded[-1 - level])
            if level < STAGES - 1:
                x = self.upsample[level](x)
        return self.conv_last(self.recon_conv(x[:, :, :height, :width])), weights

    def _latent(self, x: Tensor) -> Tensor:
        if self.latent == "pool":
            return F.adaptive_avg_pool2d(x, LATENT)
        x = x[:, :, :LATENT, :LATENT]
        below, right = (LATENT - side for side in x.shape[2:])
        reaches = below < x.shape[2] and right < x.shape[3]
        return F.pad(x, (0, right, 0, below), mode="reflect" if reaches else "constant")


def _padding(height: int, width: int) -> tuple[int, int]:
    """Rows and columns to add: the short side must be 32 or more, both a multiple of 8.

    The long side is padded in proportion, as in the released code; there, square images below 32 pixels fail.
    """
    scale = 2 ** (STAGES - 1)
    least = WINDOW * scale
    grow = max(1.0, least / min(height, width))
    sides = (-(-round(side * grow) // scale) * scale for side in (height, width))
    below, right = (new - old for new, old in zip(sides, (height, width), strict=True))
    return below, right
