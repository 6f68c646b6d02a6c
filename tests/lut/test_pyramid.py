"""Pyramids against dense convolution, exact reconstruction, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from filtrun.errors import UserError
from filtrun.lut.pyramid import down, gaussian_pyramid, laplacian_pyramid, reconstruct, smallest_side, up

BELL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64)
KERNEL = (torch.outer(BELL, BELL) / 256).expand(3, 1, 5, 5)
SIZES = [(37, 53), (36, 50), (53, 36), (9, 9), (9, 128)]


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (3, 4)])
def test_down_and_up_equal_dense_filters(height: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    assert torch.allclose(down(x), blur(x, KERNEL)[:, :, ::2, ::2], atol=1e-14)
    spread = torch.zeros(2, 3, 2 * height, 2 * width, dtype=torch.float64)
    spread[:, :, ::2, ::2] = x
    wide = blur(spread, 4 * KERNEL)
    assert torch.allclose(up(x, (2 * height, 2 * width)), wide, atol=1e-14)
    odd = (2 * height - 1, 2 * width)
    assert torch.allclose(up(x, odd), F.interpolate(wide, size=odd), atol=1e-14)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_reconstruction_is_exact(height: int, width: int) -> None:
    torch.manual_seed(1)
    x = torch.rand(2, 3, height, width)
    pyramid = laplacian_pyramid(x, 3)
    assert [tuple(level.shape[2:]) for level in pyramid] == [(-(-height // 2**i), -(-width // 2**i)) for i in range(4)]
    assert (reconstruct(pyramid) - x).abs().max() <= 5e-7
    assert torch.equal(pyramid[-1], gaussian_pyramid(x, 3)[-1])


def test_constant_has_no_detail() -> None:
    *details, low = laplacian_pyramid(torch.full((1, 3, 40, 24), 0.25, dtype=torch.float64), 3)
    assert all(float(d.abs().max()) < 1e-15 for d in details)
    assert torch.allclose(low, torch.full_like(low, 0.25))


def test_smallest_side_is_the_limit() -> None:
    for levels in (1, 3, 5):
        side = smallest_side(levels)
        x = torch.rand(1, 1, side, side)
        assert (reconstruct(laplacian_pyramid(x, levels)) - x).abs().max() < 5e-7
        with pytest.raises(UserError, match=f"{levels} pyramid levels need {side}x{side}"):
            gaussian_pyramid(torch.rand(1, 1, side - 1, side), levels)


def test_gradients() -> None:
    x = torch.rand(1, 2, 9, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: tuple(laplacian_pyramid(t, 2)), (x,))
