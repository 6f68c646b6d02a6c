"""DPM-Solver++ 2S: values against a slow reference, its order, and the law its noise keeps."""

from __future__ import annotations

import math

import pytest
import torch

from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import SAMPLERS, heun
from filtrun.diffusion.second_order_ancestral import dpmpp_2s_ancestral


def test_one_step_by_hand():
    mixture, y = Mixture.four_in_six(), torch.tensor([0, 3])
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, e = 2.0, 0.5
    h = math.log(s / e)
    inside = math.exp(-h / 2) * x - math.expm1(-h / 2) * mixture(x, s, y).x0
    want = math.exp(-h) * x - math.expm1(-h) * mixture(inside, (s * e) ** 0.5, y).x0
    grid = torch.tensor([s, e], dtype=torch.float64)
    torch.testing.assert_close(dpmpp_2s_ancestral(mixture, x, grid, y, eta=0), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(SAMPLERS["dpmpp_2s"](mixture, x, grid, y), want, rtol=0, atol=1e-12)


def test_second_order_without_noise():
    mixture = Mixture.four_in_six()
    x = 5 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def end(solve, steps):
        sigmas = EDMLevels().sigmas(steps, "log", zero=False, sigma_max=5.0, sigma_min=0.05)
        return solve(mixture, x, sigmas)

    exact = end(heun, 2000)
    error = [(end(SAMPLERS["dpmpp_2s"], n) - exact).square().mean().sqrt().item() for n in (32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in zip(error, error[1:], strict=False)]
    assert slopes == pytest.approx([2, 2], abs=0.2)


def test_calls_and_the_noise_of_one_gaussian():
    v = 0.3
    mixture = Mixture(torch.ones(1), torch.full((1, 2), 0.5), torch.full((1, 2), v))
    sigmas = EDMLevels().sigmas(40)
    x = 80 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end = dpmpp_2s_ancestral(mixture, x, sigmas, generator=torch.Generator().manual_seed(2))
    assert mixture.nfe == 2 * 40 - 1  # the step to 0 is one of Euler's
    assert end.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert end.var(0).tolist() == pytest.approx([v, v], rel=0.08)
