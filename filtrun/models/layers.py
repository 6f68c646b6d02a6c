"""Small parts that several denoisers share: noise embedding, group sizes, self-attention over pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def groups_for(channels: int) -> int:
    """Largest number of groups up to 32 that divides `channels` and leaves at least four channels in each."""
    return next((g for g in range(min(32, channels // 4), 1, -1) if channels % g == 0), 1)


def heads_for(channels: int, width: int = 64) -> int:
    """Largest number of attention heads that divides `channels` into heads of about `width` channels or more."""
    return next((h for h in range(max(1, channels // width), 1, -1) if channels % h == 0), 1)


class FourierEmbedding(nn.Module):
    """Cosines and sines of a noise level at fixed frequencies.

    The frequencies are geometric between `slowest` and `fastest` cycles per unit. The defaults suit
    ``c_noise = ln(sigma) / 4``, which runs over about [-1.6, 1.1]: the slowest wave tells the two ends apart without
    wrapping round, the fastest separates neighbouring steps of an 18-step sampler. Nothing is random, so two builds
    of a network agree before any seed is set.

    Source: positional encoding of Vaswani et al. 2017, section 3.5, over a continuous variable.
    """

    frequencies: torch.Tensor

    def __init__(self, features: int, slowest: float = 0.125, fastest: float = 8.0):
        super().__init__()
        half = features // 2
        steps = torch.arange(half, dtype=torch.float64) / max(half - 1, 1)
        frequencies = 2 * math.pi * slowest * (fastest / slowest) ** steps
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        """Map (N,) to (N, 2 * (features // 2)), values in [-sqrt(2), sqrt(2)] with unit mean square."""
        angles = c_noise.to(torch.promote_types(c_noise.dtype, torch.float32))[:, None] * self.frequencies
        return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)


class PixelAttention(nn.Module):
    """Self-attention over the pixels of a feature map, added to its input.

    `qkv` is one linear layer (queries, keys and values are its three output blocks) and `proj` another, so that
    adapters written for transformers can wrap them by name.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.heads = heads_for(channels)
        self.norm = nn.GroupNorm(groups_for(channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (N, HW, C)
        q, k, v = self.qkv(tokens).view(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.proj(mixed).transpose(1, 2).reshape(n, c, h, w)
