"""Classifier-free guidance: algebra, cost, and the one case where guided samples have a known law."""

from __future__ import annotations

import pytest
import torch

from filtrun.diffusion.guidance import both, cfg
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import heun

SIGMA = torch.tensor(0.8, dtype=torch.float64)


@pytest.fixture()
def toy():
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Mixture.four_in_six(), x, torch.tensor([0, 1, 2, 3, 0, 4])


def test_formula_and_cost(toy):
    mixture, x, y = toy
    conditional, null = mixture.both(x, SIGMA, y)
    for scale, cost in ((0.0, 1), (1.0, 1), (3.5, 2)):
        mixture.nfe = 0
        got = cfg(mixture, scale)(x, SIGMA, y)
        assert mixture.nfe == cost
        torch.testing.assert_close(got.x0, null.x0 + scale * (conditional.x0 - null.x0))
        torch.testing.assert_close(got.x0 + SIGMA * got.eps, x)
    mixture.nfe = 0
    assert torch.equal(cfg(mixture, 3.5)(x, SIGMA).x0, null.x0)
    assert mixture.nfe == 1


def test_a_plain_function_is_called_twice_and_rules_nest(toy):
    mixture, x, y = toy
    seen = []

    def plain(state, sigma, cond=None):
        seen.append(cond is None)
        return mixture(state, sigma, cond)

    torch.testing.assert_close(
        cfg(plain, 2.0)(x, torch.tensor(1.0), y).x0, cfg(mixture, 2.0)(x, torch.tensor(1.0), y).x0
    )
    assert seen == [False, True]
    nested = cfg(cfg(mixture, 2.0), 1.5)(x, torch.tensor(1.0), y)
    torch.testing.assert_close(nested.x0, cfg(mixture, 3.0)(x, torch.tensor(1.0), y).x0)
    pair = both(plain, x, torch.tensor(1.0), y)
    torch.testing.assert_close(pair[1].x0, mixture(x, 1.0).x0)


@pytest.mark.parametrize("scale", (2.0, 4.0))
def test_guided_gaussians_of_equal_variance_have_the_extrapolated_mean(scale):
    """D_u + w (D_c - D_u) is then the denoiser of N(m_u + w (m_c - m_u), v): mean moves, variance stays."""
    v, m_u, m_c = 0.3, torch.tensor([[0.1, -0.2]]), torch.tensor([[0.6, 0.4]])
    null = Mixture(torch.ones(1), m_u, torch.full((1, 2), v))
    conditional = Mixture(torch.ones(1), m_c, torch.full((1, 2), v))

    def denoise(x, sigma, cond=None):
        return null(x, sigma) if cond is None else conditional(x, sigma)

    sigmas = EDMLevels().sigmas(100, "log", zero=False)
    x = EDMLevels().start(torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 80.0)
    mean = (m_u + scale * (m_c - m_u)).double()
    end = heun(cfg(denoise, scale), x, sigmas, torch.zeros(20_000, dtype=torch.int64))
    exact = mean + ((v + 0.002**2) / (v + 80.0**2)) ** 0.5 * (x - mean)  # the ODE of that Gaussian
    torch.testing.assert_close(end, exact, rtol=0, atol=0.01)
    torch.testing.assert_close(end.mean(0), mean[0], rtol=0, atol=0.03)
    assert end.var(0).tolist() == pytest.approx([v, v], rel=0.04)
