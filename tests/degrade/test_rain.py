"""Rain streaks: geometry of a single streak, ranges, how they meet the image."""

from __future__ import annotations

import math
from typing import Any

import torch

from filtrun.degrade.rain import add_rain, line_kernels, streaks

LAYER: dict[str, Any] = {
    "density": (0.002, 0.01), "length": (9.0, 21.0), "lean": 30.0, "thickness": (0.5, 1.0), "brightness": (0.3, 0.6),
    "device": torch.device("cpu"),
}  # fmt: skip


def kernel(length: float, degrees: float, width: float) -> torch.Tensor:
    angle = torch.tensor([math.radians(degrees)])
    return line_kernels(torch.tensor([length]), angle, torch.tensor([width]), 15)[0, 0]


def test_upright_streak() -> None:
    k = kernel(9.0, 0.0, 0.5)
    assert k[7, 7] == 1
    assert k[:, 7].sum() == 9  # full brightness along its length
    torch.testing.assert_close(k[7, 8], torch.tensor(math.exp(-1 / (2 * 0.25))))
    torch.testing.assert_close(k, k.flip(0))


def test_leaning_streak_goes_up_to_the_right() -> None:
    k = kernel(11.0, 45.0, 0.4)
    assert k[4, 10] > 0.9 and k[10, 4] > 0.9 and k[4, 4] < 0.01
    torch.testing.assert_close(kernel(11.0, -45.0, 0.4), k.flip(1))


def test_layers_are_in_range_and_follow_the_seed() -> None:
    layer = streaks(3, 60, 80, **LAYER, generator=torch.Generator().manual_seed(0))
    assert layer.shape == (3, 1, 60, 80) and layer.min() >= 0 and layer.max() <= 0.6
    assert layer.flatten(1).amax(1).min() >= 0.15
    assert not torch.equal(layer[0], layer[1])
    assert torch.equal(layer, streaks(3, 60, 80, **LAYER, generator=torch.Generator().manual_seed(0)))


def test_streaks_run_along_the_vertical_more_than_across() -> None:
    layer = streaks(4, 96, 96, **{**LAYER, "lean": 5.0}, generator=torch.Generator().manual_seed(1))
    down, across = (layer.diff(dim=d).abs().mean() for d in (2, 3))
    assert across > 3 * down


def test_modes() -> None:
    clean, layer = torch.full((1, 3, 1, 1), 0.6), torch.full((1, 1, 1, 1), 0.5)
    torch.testing.assert_close(add_rain(clean, layer), torch.ones(1, 3, 1, 1))
    torch.testing.assert_close(add_rain(clean, layer, "screen"), torch.full((1, 3, 1, 1), 0.8))
    torch.testing.assert_close(add_rain(clean, layer / 5), torch.full((1, 3, 1, 1), 0.7))
