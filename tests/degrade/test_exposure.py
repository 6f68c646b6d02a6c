"""Adjustments with a known inverse."""

from __future__ import annotations

import torch

from filtrun.degrade.exposure import adjust, restore, to_linear, to_srgb

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
