"""Penalties against loops and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch

from filtrun.lut.interpolation import identity_lut
from filtrun.lut.regularise import monotonicity, total_variation


@pytest.mark.parametrize("size", [2, 3, 5])
def test_equal_loops(size: int) -> None:
    torch.manual_seed(size)
    lut = torch.rand(3, size, size, size, dtype=torch.float64)
    variation = falls = 0.0
    for axis in range(3):
        squares, drops = [], []
        for c, *node in itertools.product(range(3), *[range(size)] * 3):
            if node[axis] == size - 1:
                continue
            after = list(node)
            after[axis] += 1
            step = float(lut[c, after[0], after[1], after[2]] - lut[c, node[0], node[1], node[2]])
            squares.append((2.0 if node[axis] in (0, size - 2) else 1.0) * step * step)
            drops.append(max(-step, 0.0))
        variation += sum(squares) / len(squares)
        falls += sum(drops) / len(drops)
    assert float(total_variation(lut)) == pytest.approx(variation, rel=1e-12)
    assert float(monotonicity(lut)) == pytest.approx(falls, rel=1e-12)


@pytest.mark.parametrize("size", [3, 9, 33])
def test_closed_forms(size: int) -> None:
    lut = identity_lut(size, dtype=torch.float64)
    assert float(total_variation(lut)) == pytest.approx((size + 1) / (size - 1) ** 3, rel=1e-12)
    assert float(monotonicity(lut)) == 0.0
    # turned round, the identity falls by 1 / (D - 1) at each step of one axis a channel: a third of it, three times
    assert float(monotonicity(1 - lut)) == pytest.approx(1 / (size - 1), rel=1e-12)
    assert float(total_variation(torch.full_like(lut, 0.3))) == 0.0
    # without the double ends the mean is that of equal steps, in one channel of three on each axis
    assert float(total_variation(lut, edge_weight=1.0)) == pytest.approx(1 / (size - 1) ** 2, rel=1e-12)


def test_gradients() -> None:
    torch.manual_seed(0)
    lut = torch.rand(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, (lut,))
    assert torch.autograd.gradcheck(monotonicity, (lut,))
