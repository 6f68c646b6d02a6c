"""Tests of filtrun.models.unet and the layers it is made of."""

from __future__ import annotations

import math

import pytest
import torch

from filtrun.errors import UserError
from filtrun.models.layers import FourierEmbedding, PixelAttention, groups_for, heads_for
from filtrun.models.unet import SIZES, UNet, resolutions_of

RANGES = {"nano": (0.09, 0.13), "tiny": (0.2, 0.25), "small": (1.0, 2.0), "base": (9.0, 10.0), "large": (34.0, 37.0)}


def millions(net: torch.nn.Module) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


def perturbed(**options: object) -> UNet:
    """A network whose zero-initialised output layer has been moved away from zero."""
    torch.manual_seed(0)
    net = UNet(**options)  # type: ignore[arg-type]
    torch.nn.init.normal_(net.out.weight, std=0.1)
    return net.eval()


def inputs(n: int, channels: int, height: int, width: int | None = None) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, height, width or height, generator=generator)
    return x, torch.linspace(-1.5, 1.0, n), torch.arange(n) % 11


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("channels", "image_size"), [(1, 8), (1, 28), (3, 32), (3, 64)])
def test_ladder_has_the_stated_sizes(size: str, channels: int, image_size: int) -> None:
    with torch.device("meta"):
        low, high = RANGES[size]
        assert low <= millions(UNet(channels, 10, image_size, size)) <= high


@pytest.mark.parametrize(
    ("channels", "image_size", "height", "width"),
    [(1, 8, 8, 8), (1, 28, 28, 28), (3, 32, 32, 32), (3, 33, 33, 31), (1, 9, 9, 9), (1, 8, 3, 5)],
)
def test_shape_is_kept_and_output_is_zero_at_first(channels: int, image_size: int, height: int, width: int) -> None:
    x, c, y = inputs(2, channels, height, width)
    net = UNet(channels, 10, image_size, "nano")
    assert torch.equal(net(x, c, y), torch.zeros_like(x))
    torch.nn.init.normal_(net.out.weight)
    assert net(x, c, y).shape == x.shape


def test_padding_only_touches_the_borders_it_adds() -> None:
    """An image padded by hand, run and cropped by hand gives what the network gives for the bare image."""
    net = perturbed(in_channels=1, image_size=30, size="nano")
    x, c, y = inputs(2, 1, 30)
    by_hand = torch.cat([x, x[..., -1:], x[..., -1:]], dim=-1)
    by_hand = torch.cat([by_hand, by_hand[..., -1:, :], by_hand[..., -1:, :]], dim=-2)
    torch.testing.assert_close(net(x, c, y), net(by_hand, c, y)[..., :30, :30])


def test_noise_and_class_change_the_output() -> None:
    net = perturbed(size="tiny")
    x, c, y = inputs(4, 1, 8)
    base = net(x, c, y)
    assert (net(x, c + 0.1, y) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (net(x, c, (y + 1) % 11) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert torch.equal(net(x, c), net(x, c, torch.full((4,), 10)))  # no class is the id K


def test_noise_may_be_a_scalar() -> None:
    net = perturbed(size="nano")
    x, _, y = inputs(3, 1, 8)
    torch.testing.assert_close(net(x, torch.tensor(0.3), y), net(x, torch.full((3,), 0.3), y))


def test_samples_do_not_see_each_other() -> None:
    net = perturbed(in_channels=3, image_size=16, size="nano")
    x, c, y = inputs(4, 3, 16)
    together = net(x, c, y)
    alone = torch.cat([net(x[i : i + 1], c[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"size": "tiny"}, {"size": "nano", "blocks": 2, "attention": [8, 4], "dropout": 0.1}]
)
def test_gradient_reaches_every_parameter(options: dict) -> None:
    net = perturbed(**options).train()
    x, c, y = inputs(22, 1, 8)
    (net(x, c, y) * torch.randn(22, 1, 8, 8)).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert (net.classes.weight.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]


def test_attention_sits_where_it_is_asked_for() -> None:
    def attending(net: UNet) -> list[list[bool]]:
        return [[isinstance(b.attn, PixelAttention) for b in stack] for stack in net.down]  # type: ignore

    assert attending(UNet(1, 10, 8)) == [[False], [True]]
    assert attending(UNet(1, 10, 8, attention=[8])) == [[True], [False]]
    assert attending(UNet(1, 10, 8, attention=[])) == [[False], [False]]
    assert attending(UNet(3, 10, 32, blocks=2, attention=[16, 8])) == [[False] * 2, [True] * 2, [True] * 2]
    assert resolutions_of(30, 3) == [32, 16, 8]


def test_attention_equals_a_slow_reference() -> None:
    torch.manual_seed(0)
    layer = PixelAttention(128).double()
    assert layer.heads == 2
    x = torch.randn(2, 128, 3, 2, dtype=torch.float64)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(tokens).chunk(3, dim=-1)
    mixed = torch.zeros_like(tokens)
    for n in range(2):
        for h in range(2):
            part = slice(64 * h, 64 * (h + 1))
            for i in range(6):
                score = torch.stack([q[n, i, part] @ k[n, j, part] / 8 for j in range(6)])
                mixed[n, i, part] = sum(w * v[n, j, part] for j, w in enumerate(score.softmax(0)))
    expected = x + layer.proj(mixed).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_fourier_embedding_in_closed_form() -> None:
    embedding = FourierEmbedding(8, slowest=0.5, fastest=4.0)
    angles = [2 * math.pi * f * 0.3 for f in (0.5, 1.0, 2.0, 4.0)]
    expected = [math.sqrt(2) * f(a) for f in (math.cos, math.sin) for a in angles]
    torch.testing.assert_close(embedding(torch.tensor([0.3]))[0], torch.tensor(expected))
    wide = FourierEmbedding(64)(torch.linspace(-1.6, 1.1, 50))
    torch.testing.assert_close(wide.square().mean(1), torch.ones(50))
    assert torch.cdist(wide, wide).fill_diagonal_(9).min() > 0.5  # 50 noise levels stay apart


def test_groups_and_heads_divide_the_channels() -> None:
    for channels in range(4, 300):
        assert channels % groups_for(channels) == 0 and channels % heads_for(channels) == 0
        assert channels // groups_for(channels) >= 4 and groups_for(channels) <= 32
    assert [groups_for(c) for c in (4, 32, 128, 216)] == [1, 8, 32, 27]
    assert [heads_for(c) for c in (48, 128, 192)] == [1, 2, 3]


def test_half_precision_stays_finite() -> None:
    net = perturbed(size="nano")
    x, c, y = inputs(2, 1, 8)
    exact = net(x, c, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(x, c, y).float() - exact).abs().max() < 0.1
    assert (net.bfloat16()(x.bfloat16(), c.bfloat16(), y).float() - exact).abs().max() < 0.2


def test_zero_classes_is_an_unconditional_network() -> None:
    net = perturbed(num_classes=0, size="nano")
    x, c, _ = inputs(2, 1, 8)
    assert net.classes.weight.shape[0] == 1
    assert torch.equal(net(x, c), net(x, c, torch.zeros(2, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "smal"}, "did you mean 'small'"),
        ({"image_size": 7}, "8x8 pixels or more"),
        ({"width": 2}, r"model.width=2 is out of range"),
        ({"blocks": 0}, r"model.blocks=0 is out of range"),
        ({"multipliers": []}, "model.multipliers"),
        ({"multipliers": [1, 1, 1, 1, 1]}, "more halvings than 8 pixels"),
        ({"attention": [5]}, r"model.attention=5 .* \[8, 4\]"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
    ],
)
def test_mistakes_are_told(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UNet(**options)
