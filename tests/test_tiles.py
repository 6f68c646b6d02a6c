"""Tiles: coverage, weights that sum to one, and results that do not depend on the tiling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from filtrun.tiles import pad_to, tile_starts, tile_weights, tiled


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "multiple"),
    [(100, 32, 16, 1), (97, 40, 16, 1), (128, 64, 32, 8), (33, 32, 16, 1), (20, 32, 16, 1)],
)
def test_starts_cover_and_overlap(length: int, tile: int, overlap: int, multiple: int) -> None:
    starts = tile_starts(length, tile, overlap, multiple)
    assert starts[0] == 0 and starts[-1] == max(0, length - tile)
    assert all(s % multiple == 0 for s in starts)
    assert all(a + tile - b >= overlap and b > a for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("length", range(33, 140, 7))
def test_weights_sum_to_one_and_vanish_at_inner_edges(length: int) -> None:
    starts = tile_starts(length, 32, 16)
    weights = tile_weights(starts, 32, length)
    total = torch.zeros(length, dtype=torch.float64)
    for start, w in zip(starts, weights, strict=True):
        total[start : start + 32] += w
    torch.testing.assert_close(total, torch.ones(length, dtype=torch.float64))
    for i, w in enumerate(weights):
        assert i == 0 or w[:4].abs().max() == 0
        assert i + 1 == len(weights) or w[-4:].abs().max() == 0


class Convs(nn.Module):
    """Sees 4 pixels around each; strides by `stride` inside and enlarges by `ratio`."""

    def __init__(self, ratio: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(),
            nn.Conv2d(8, ratio**2, 3, padding=1), nn.PixelShuffle(ratio),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 16), (48, 16), (64, 24)])
def test_result_does_not_depend_on_the_tiling(ratio: int, tile: int, overlap: int) -> None:
    net = Convs(ratio).eval()
    x = torch.rand(1, 2, 101, 87, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, parts = net(x), tiled(net, x, tile=tile, overlap=overlap, ratio=ratio)
    assert parts.shape == whole.shape == (1, 1, 101 * ratio, 87 * ratio)
    assert (parts - whole).abs().max() < 1e-5


def test_too_little_overlap_shows_seams() -> None:
    net = Convs().eval()
    x = torch.rand(1, 2, 101, 87)
    with torch.no_grad():
        assert (tiled(net, x, tile=32, overlap=4) - net(x)).abs().max() > 1e-3


def test_strided_network_and_two_inputs() -> None:
    torch.manual_seed(0)
    down, up = nn.Conv2d(3, 4, 4, stride=4), nn.ConvTranspose2d(4, 1, 4, stride=4)

    def net(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] % 4 == 0
        return up(down(torch.cat([x, mask], 1)).tanh())

    x, mask = torch.rand(1, 2, 53, 70), torch.rand(1, 1, 53, 70)
    with torch.no_grad():
        whole = net(pad_to(x, 4), pad_to(mask, 4))[..., :53, :70]
        parts = tiled(net, x, mask, tile=30, overlap=14, multiple=4)
    assert parts.shape == (1, 1, 53, 70) and (parts - whole).abs().max() < 1e-5


def test_padding() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    assert torch.equal(pad_to(x, 4)[0, 0, 3], x[0, 0, 1])
    assert pad_to(x, 1) is x
    assert pad_to(x, 8, 16).shape == (1, 1, 16, 16)  # too far to mirror: the last pixel goes on
    assert pad_to(x, 8, 16)[0, 0, -1, -1] == 11
    with pytest.raises(ValueError, match="cannot share 20"):
        tiled(lambda t: t, x, tile=32, overlap=20)
