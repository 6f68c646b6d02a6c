"""ESPCN, SRCNN and bicubic: sizes, shuffle orders, equivariance, closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from filtrun.degrade.bicubic import imresize
from filtrun.errors import UserError
from filtrun.models.bicubic import Bicubic
from filtrun.models.espcn import ESPCN, shuffle
from filtrun.models.srcnn import SRCNN


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("scale", "parameters"), [(2, 21_284), (3, 22_729), (4, 24_752)])
def test_espcn_size(scale: int, parameters: int) -> None:
    net = ESPCN(scale)
    assert size(net) == parameters
    assert net(torch.rand(2, 1, 7, 9)).shape == (2, 1, 7 * scale, 9 * scale)
    assert ESPCN(scale, in_channels=3)(torch.rand(1, 3, 5, 5)).shape == (1, 3, 5 * scale, 5 * scale)


def test_srcnn_size() -> None:
    assert size(SRCNN(3)) == 8_129 and size(SRCNN(3, kernels=[9, 5, 5])) == 57_281
    assert SRCNN(3)(torch.rand(1, 1, 12, 10)).shape == (1, 1, 36, 30)
    with pytest.raises(UserError, match="three odd numbers"):
        SRCNN(3, kernels=[9, 2, 5])


@pytest.mark.parametrize("scale", [2, 3])
def test_one_pixel_at_low_resolution_is_scale_pixels_at_high(scale: int) -> None:
    torch.manual_seed(0)
    net = ESPCN(scale).eval()
    x = torch.rand(1, 1, 20, 20)
    with torch.no_grad():
        a, b = net(x), net(x.roll((1, 2), (2, 3)))
    inside = slice(7 * scale, 13 * scale)
    torch.testing.assert_close(a.roll((scale, 2 * scale), (2, 3))[..., inside, inside], b[..., inside, inside])


def test_replicated_channels_are_nearest_neighbour() -> None:
    x = torch.rand(2, 3, 4, 5)
    repeated = x.repeat_interleave(9, dim=1)
    torch.testing.assert_close(shuffle(repeated, 3), nn.functional.interpolate(x, scale_factor=3, mode="nearest"))


@pytest.mark.parametrize("channels", [1, 3])
def test_shuffle_orders_by_their_formulas(channels: int) -> None:
    r, h, w = 3, 2, 4
    x = torch.arange(channels * r * r * h * w, dtype=torch.float32).view(1, channels * r * r, h, w)
    torch_order, paper = shuffle(x, r), shuffle(x, r, "paper")
    for c in range(channels):
        for row in range(r * h):
            for column in range(r * w):
                place = x[0, :, row // r, column // r]
                a, b = row % r, column % r
                assert torch_order[0, c, row, column] == place[c * r * r + r * a + b]
                assert paper[0, c, row, column] == place[channels * r * b + channels * a + c]
    torch.testing.assert_close(torch.pixel_unshuffle(torch_order, r), x)


def test_espcn_is_its_formula() -> None:
    torch.manual_seed(1)
    net, x = ESPCN(2), torch.rand(1, 1, 6, 6)
    first, second = net.body[0], net.body[2]
    h = torch.tanh(nn.functional.conv2d(x, first.weight, first.bias, padding=2))
    h = torch.tanh(nn.functional.conv2d(h, second.weight, second.bias, padding=1))
    h = nn.functional.conv2d(h, net.last.weight, net.last.bias, padding=1)
    torch.testing.assert_close(net(x), torch.pixel_shuffle(h, 2))


def test_options() -> None:
    torch.manual_seed(0)
    scaled = ESPCN(3, init="scaled")
    assert scaled.last.weight.std().item() == pytest.approx(0.001, rel=0.1) and scaled.last.bias.abs().max() == 0
    assert scaled.body[0].weight.std().item() == pytest.approx((2 / (64 * 25)) ** 0.5, rel=0.1)
    assert isinstance(ESPCN(3, activation="relu").body[1], nn.ReLU)
    with pytest.raises(UserError, match="'tan'; did you mean 'tanh'"):
        ESPCN(3, activation="tan")
    with pytest.raises(UserError, match="model.order"):
        ESPCN(3, order="matlab")
    with pytest.raises(UserError, match="model.scale=0"):
        ESPCN(0)


def test_bicubic_is_imresize_without_parameters() -> None:
    net, x = Bicubic(3), torch.rand(1, 3, 8, 9)
    assert size(net) == 0
    torch.testing.assert_close(net(x), imresize(x, 3, 1))


def test_srcnn_refines_the_enlarged_image() -> None:
    net, x = SRCNN(2), torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(net(x), net.body(imresize(x, 2, 1)))


def test_cost_is_that_of_low_resolution() -> None:
    from filtrun.cost import forward_flops

    espcn, srcnn = ESPCN(3), SRCNN(3)
    x = torch.rand(1, 1, 24, 24)
    with torch.no_grad():
        low, high = (forward_flops(lambda net=net: net(x)) for net in (espcn.body, srcnn.body))
        full = forward_flops(lambda: espcn.body(torch.rand(1, 1, 72, 72)))
    assert low is not None and high is not None and full == pytest.approx(9 * low)
