"""Degradations, colour spaces and measures give the same numbers in a bf16 run as in any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from filtrun.degrade.exposure import blur
from filtrun.degrade.rain import streaks
from filtrun.metrics.image import from_ycbcr, ssim_maps, ycbcr
from filtrun.precision import full_precision


def rain(x: Tensor) -> Tensor:
    layer = streaks(
        len(x), *x.shape[-2:], density=(0.01, 0.02), length=(5, 9), lean=20, thickness=(1, 1), brightness=(1, 1),
        device=x.device, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return x + layer


@pytest.mark.parametrize(
    "function", [ycbcr, from_ycbcr, rain, lambda x: blur(x, 2.0), lambda x: ssim_maps(x, x.flip(-1))[0]]
)
def test_autocast_changes_nothing(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(2, 3, 24, 24)
    exact = function(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(x)
        assert (x @ x).dtype == torch.bfloat16  # autocast is on again
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_arguments_and_results_pass_through() -> None:
    @full_precision
    def scaled(x: Tensor, *, by: float) -> tuple[Tensor, bool]:
        """Doc."""
        return x * by, torch.is_autocast_enabled("cpu")

    assert scaled.__doc__ == "Doc."
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, on = scaled(x=torch.ones(2), by=3.0)
    assert found.tolist() == [3, 3] and not on
