"""Windowed attention of the LLF-LUT weight predictor: spatial-frequency encoder blocks, cross-attending decoder blocks.

Source: code of Zhang et al. (fengzhang427/LLF-LUT, models/layers.py). Windows and relative position bias are those of
Liu et al., "Swin Transformer", ICCV 2021, without the shift. Tensor names follow the released checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 4
"""Pixels along each side of a window."""


def to_windows(x: Tensor) -> Tensor:
    """(N, H, W, C) with sides that are multiples of WINDOW to (N * windows, WINDOW^2, C)."""
    n, height, width, c = x.shape
    x = x.view(n, height // WINDOW, WINDOW, width // WINDOW, WINDOW, c)
    return x.transpose(2, 3).reshape(-1, WINDOW * WINDOW, c)


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Undo `to_windows`."""
    x = windows.view(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def _pad(x: Tensor) -> Tensor:
    """Zeros below and to the right of (N, H, W, C) up to whole windows."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % WINDOW, 0, -x.shape[1] % WINDOW))


class _Bias(nn.Module):
    """Relative position bias: one number per head and offset between two pixels of a window."""

    relative_position_index: Tensor

    def __init__(self, heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        rows, columns = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
        place = torch.stack([rows.flatten(), columns.flatten()])
        offset = place[:, :, None] - place[:, None, :] + WINDOW - 1  # (2, query, key), each in [0, 2 WINDOW - 2]
        self.register_buffer("relative_position_index", offset[0] * (2 * WINDOW - 1) + offset[1])

    def bias(self) -> Tensor:
        """(heads, WINDOW^2, WINDOW^2)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention over (B, T, C) tokens; `bias` (heads, T, T) is added to the scaled products."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class SpatialFrequencyAttention(_Bias):
    """Self-attention in a window plus the same weights on its spectrum, added before the output projection.

    The spectrum is the real FFT of the window's tokens in row order; real and imaginary parts stand side by side as
    2 (T/2 + 1) tokens, attend to each other without position bias, and are transformed back.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        tokens = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, dim=2)
        spatial = _attend(q, k, v, self.heads, self.bias())
        spectrum = torch.fft.rfft(x.float(), dim=1, norm="ortho")  # FFT wants full precision
        parts = torch.cat([spectrum.real, spectrum.imag], dim=1).to(x.dtype)
        q, k, v = self.qkv(parts).chunk(3, dim=2)
        mixed = _attend(q, k, v, self.heads)
        real, imaginary = mixed.float().chunk(2, dim=1)
        spectral = torch.fft.irfft(torch.complex(real, imaginary), n=tokens, dim=1, norm="ortho")
        return self.proj(spatial + spectral.to(spatial.dtype))


class WindowAttention(_Bias):
    """Self- or cross-attention in a window, with relative position bias."""

    def __init__(self, dim: int, heads: int):
        super().__init__(heads)
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Queries from x (B, T, C), keys and values from `context` (B, T, C), or from x itself."""
        k, v = self.kv(x if context is None else context).chunk(2, dim=2)
        return self.proj(_attend(self.q(x), k, v, self.heads, self.bias()))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Leave a residual branch out for some images of a batch while training (Huang et al., ECCV 2016)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class EncoderBlock(nn.Module):
    """Spatial-frequency attention and an MLP, each on the layer-normalised input and added to it."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 2.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SpatialFrequencyAttention(dim, heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to the same."""
        height, width = x.shape[1:3]
        padded = _pad(self.norm1(x))
        mixed = from_windows(self.attn(to_windows(padded)), *padded.shape[1:3])
        x = x + self.drop_path(mixed[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to an encoder feature of the same size, and an MLP, each added to its input."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 2.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = WindowAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(dim)
        self.attn2 = WindowAttention(dim, heads)
        self.drop_path = DropPath(drop_path)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
        """(N, H, W, C) twice to (N, H, W, C)."""
        height, width = x.shape[1:3]
        padded = _pad(self.norm1(x))
        size = padded.shape[1:3]
        mixed = from_windows(self.attn1(to_windows(padded)), *size)
        x = x + self.drop_path(mixed[:, :height, :width])
        query, context = to_windows(_pad(self.norm2(x))), to_windows(_pad(self.norm_kv(encoded)))
        mixed = from_windows(self.attn2(query, context), *size)
        x = x + self.drop_path(mixed[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm3(x)))
