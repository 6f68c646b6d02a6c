"""Vision transformer for small images.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929): patches, class token, learned
positions, pre-norm blocks. Widths below ViT-Ti follow Touvron et al., DeiT, ICML 2021 (arXiv 2012.12877) scaled down.
Query, key and value are separate linear layers, so that adapters can take any one of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from filtrun.errors import UserError, unknown

SIZES = {"nano": (64, 4, 2), "tiny": (128, 6, 4), "small": (256, 8, 4)}  # width, depth, heads


def patch_for(image_size: int) -> int:
    """The smallest patch side from 2 on that cuts an image into at most 64 tokens: 2 at 8x8, 4 at 28x28 and 32x32.

    Divisors of the image side that still leave 16 tokens go first, so that no pixel is padding.
    """
    for patch in range(2, image_size + 1):
        if image_size % patch == 0 and 16 <= (image_size // patch) ** 2 <= 64:
            return patch
    return next(patch for patch in range(1, image_size + 1) if (-(-image_size // patch)) ** 2 <= 64)


class Attention(nn.Module):
    """Multi-head self-attention with linear layers `q`, `k`, `v` and `proj`, all (C -> C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (N, T, C) to the same shape."""
        n, t, c = x.shape
        q, k, v = (f(x).view(n, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with dropout on the result."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Classifier over patches: `patch` embedding, class `token`, learned `positions`, `blocks`, `norm`, `head`.

    Args:
        in_channels: image channels.
        num_classes: outputs K of the head.
        image_size: side of the images in pixels; those given to `forward` must have it. Where the patch does not
            divide it, the image is zero-padded on the right and below.
        size: nano | tiny | small: width 64, 128, 256; depth 4, 6, 8; heads 2, 4, 4 (0.2, 1.2 and 6.4 M parameters).
        patch: patch side in pixels; None chooses one that gives 16 to 64 tokens.
        width, depth, heads: override the size's.
        mlp_ratio: hidden width of the MLP over the token width.
        dropout: probability in [0, 1) on the MLP's output.

    Raises:
        UserError: for an unknown size, a patch larger than the image, a width that the heads do not divide, a count
            below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 32,
        size: str = "tiny",
        patch: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if size not in SIZES:
            raise unknown("model.size", size, SIZES)
        wide, deep, many = SIZES[size]
        width, depth, heads = width or wide, depth or deep, heads or many
        patch = patch_for(image_size) if patch is None else patch
        _check(image_size, patch, width, depth, heads, mlp_ratio, dropout)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.image_size, self.patch_size = image_size, patch
        side = -(-image_size // patch)
        self.patch = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.blocks = nn.Sequential(*(Block(width, heads, int(width * mlp_ratio), dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=width**-0.5 / 2)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, C, S, S) with S = image_size to logits (N, K); ValueError for another side."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"this ViT was built for {self.image_size}x{self.image_size} images, got {tuple(x.shape)}")
        if pad := -self.image_size % self.patch_size:
            x = F.pad(x, (0, pad, 0, pad))
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def _check(image: int, patch: int, width: int, depth: int, heads: int, mlp_ratio: float, dropout: float) -> None:
    if not 1 <= patch <= image:
        raise UserError(f"model.patch={patch} is out of range; allowed is [1, {image}] for {image}-pixel images")
    if width < 1 or heads < 1 or width % heads:
        raise UserError(f"model.width={width} must be a multiple of model.heads={heads}")
    if depth < 1:
        raise UserError(f"model.depth={depth} is out of range; allowed is [1, inf]")
    if mlp_ratio <= 0:
        raise UserError(f"model.mlp_ratio={mlp_ratio} must be above 0")
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout={dropout} is out of range; allowed is [0, 1)")
