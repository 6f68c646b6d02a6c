"""Adjustments with a known inverse."""

from __future__ import annotations

import math

import torch

from filtrun.degrade.exposure import adjust, blur, restore, scale_detail, to_linear, to_srgb

ONE, ZERO = torch.ones(1), torch.zeros(1)


def test_srgb_curve() -> None:
    x = torch.tensor([0.0, 0.04045, 0.5, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0031308, 0.21404114, 1.0], dtype=torch.float64)
    torch.testing.assert_close(to_linear(x), expected, rtol=0, atol=1e-7)
    wide = torch.linspace(0, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(to_srgb(to_linear(wide)), wide, rtol=0, atol=1e-6)


def test_each_part_alone() -> None:
    x = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1)
    torch.testing.assert_close(adjust(x, ZERO, ONE, ONE), x)
    torch.testing.assert_close(adjust(x, ZERO, ONE * 2, ONE), x**2)
    torch.testing.assert_close(adjust(x, ZERO, ONE, ONE * 0.5), 0.5 + (x - 0.5) / 2)
    torch.testing.assert_close(to_linear(adjust(x, -ONE, ONE, ONE)), to_linear(x) / 2)


def test_restore_is_the_inverse() -> None:
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    values = [torch.tensor(v, dtype=torch.float64) for v in ([-1.5, -1, -0.5, 0], [1, 1.4, 0.8, 2], [0.6, 0.7, 0.9, 1])]
    torch.testing.assert_close(restore(adjust(x, *values), *values), x, rtol=0, atol=1e-9)


def test_blur_equals_a_slow_sum() -> None:
    x = torch.rand(1, 2, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, reach = 1.2, 4
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)]
    total = sum(weights)
    expected = torch.zeros_like(x)
    for i in range(9):
        for j in range(7):
            for a, wa in enumerate(weights):
                for b, wb in enumerate(weights):
                    row, column = min(max(i + a - reach, 0), 8), min(max(j + b - reach, 0), 6)
                    expected[..., i, j] += wa * wb / total**2 * x[..., row, column]
    torch.testing.assert_close(blur(x, sigma), expected, atol=1e-12, rtol=0)


def test_detail_is_scaled_around_the_blurred_image() -> None:
    x = 0.25 + 0.5 * torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = scale_detail(x, torch.tensor([1.0, 0.3]), 2.0)
    torch.testing.assert_close(made[0], x[0], atol=1e-12, rtol=0)
    base = blur(x, 2.0)[1]
    torch.testing.assert_close(made[1] - base, 0.3 * (x[1] - base), atol=1e-7, rtol=0)
