"""Attention against slow loops, window bookkeeping, sizes and the latent's two ways."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from filtrun.lut.attention import (
    DropPath,
    SpatialFrequencyAttention,
    WindowAttention,
    from_windows,
    to_windows,
)
from filtrun.lut.weight_predictor import WeightPredictor, _padding


def test_windows_there_and_back() -> None:
    x = torch.arange(2 * 8 * 12 * 3.0).view(2, 8, 12, 3)
    windows = to_windows(x)
    assert windows.shape == (12, 16, 3)
    assert torch.equal(windows[4].view(4, 4, 3), x[0, 4:8, 4:8])  # row by row: 2 x 3 windows an image
    assert torch.equal(from_windows(windows, 8, 12), x)


def slow_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, bias: torch.Tensor | None
) -> torch.Tensor:
    out = torch.zeros_like(q)
    width = q.shape[-1] // heads
    for b in range(q.shape[0]):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(width)
            for i in range(q.shape[1]):
                for j in range(q.shape[1]):
                    if bias is not None:
                        dy, dx = i // 4 - j // 4 + 3, i % 4 - j % 4 + 3
                        scores[i, j] += bias[dy * 7 + dx, h]
            out[b, :, part] = scores.softmax(-1) @ v[b, :, part]
    return out


@torch.no_grad()
def test_window_attention_by_hand() -> None:
    torch.manual_seed(0)
    layer = WindowAttention(8, 2).double()
    x, context = torch.randn(2, 2, 16, 8, dtype=torch.float64)
    table = layer.relative_position_bias_table
    k, v = layer.kv(context).split(8, dim=2)
    expected = layer.proj(slow_attention(layer.q(x), k, v, 2, table))
    assert torch.allclose(layer(x, context), expected, atol=1e-12)
    assert torch.allclose(layer(x), layer(x, x), atol=1e-14)


@torch.no_grad()
def test_spatial_frequency_attention_by_hand() -> None:
    torch.manual_seed(1)
    layer = SpatialFrequencyAttention(8, 4)
    x = torch.randn(2, 16, 8)
    q, k, v = layer.qkv(x).split(8, dim=2)
    spatial = slow_attention(q, k, v, 4, layer.relative_position_bias_table)
    angle = -2 * math.pi / 16 * torch.arange(9)[:, None] * torch.arange(16)
    spectrum = torch.cat([angle.cos(), angle.sin()]) / 4  # orthonormal: divided by sqrt(16)
    q, k, v = layer.qkv(spectrum @ x).split(8, dim=2)
    real, imaginary = slow_attention(q, k, v, 4, None).split(9, dim=1)
    double = torch.full((9, 1), 2.0)
    double[0] = double[8] = 1.0
    spectral = ((angle.cos() * double).T @ real + (angle.sin() * double).T @ imaginary) / 4
    assert torch.allclose(layer(x), layer.proj(spatial + spectral), atol=1e-5)


def test_drop_path() -> None:
    torch.manual_seed(2)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 2)
    y = layer(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, kept[:, None, None] * x / 0.75) and 0.72 < float(kept.float().mean()) < 0.78
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(
    ("size", "padded"),
    [((64, 64), (64, 64)), ((60, 80), (64, 80)), ((34, 60), (40, 64)), ((5, 7), (32, 48)), ((7, 5), (48, 32))],
)
def test_padding(size: tuple[int, int], padded: tuple[int, int]) -> None:
    below, right = _padding(*size)
    assert (size[0] + below, size[1] + right) == padded


@torch.no_grad()
def test_outputs_and_latents() -> None:
    torch.manual_seed(3)
    nets = {way: WeightPredictor(luts=2, latent=way).eval() for way in ("crop", "pool")}
    nets["pool"].load_state_dict(nets["crop"].state_dict())
    for size in ((64, 64), (3, 3), (37, 90), (5, 2)):
        x = torch.rand(2, 3, *size)
        for net in nets.values():
            weight_map, weights = net(x)
            assert weight_map.shape == (2, 6, *size) and weights.shape == (2, 2)
            assert torch.allclose(net(x[1:])[1], weights[1:], atol=1e-6)
    x = torch.rand(1, 3, 64, 64)
    assert torch.allclose(nets["crop"](x)[1], nets["pool"](x)[1], atol=1e-6)  # 8x8 already
    net = nets["crop"]
    latent = torch.rand(1, 32, 10, 5)
    expected = F.pad(latent[:, :, :8], (0, 3, 0, 0), mode="reflect")
    assert torch.equal(net._latent(latent), expected)
    short = net._latent(torch.rand(1, 32, 4, 6))
    assert float(short[:, :, 4:].abs().max()) == 0  # reflection cannot reach four rows beyond four: zeros
    assert torch.allclose(nets["pool"]._latent(torch.ones(1, 32, 3, 11)), torch.ones(1, 32, 8, 8))
