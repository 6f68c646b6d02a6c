"""DPS and DDRM, the baselines for inverse problems, on Gaussian priors whose posterior is known."""

from __future__ import annotations

import pytest
import torch

from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import ancestral, ddim
from filtrun.errors import UserError
from filtrun.inverse.measurement import Measurement, pseudo_inverse
from filtrun.inverse.operators import Blur, Mask, downsample, gaussian_kernel, identity
from filtrun.methods.guidance.ddrm import DDRM, ddrm
from filtrun.methods.guidance.dps import DPS, dps

SHAPE = (1, 2, 2)


def draws(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(variance=0.3):
    mean = 0.5 * draws(1, 4, seed=9)
    return Mixture(torch.ones(1), mean, torch.full((1, 4), variance)), mean.view(1, *SHAPE)


def levels(*values):
    return torch.tensor([*values, 0.0], dtype=torch.float64)


# -- DPS ---------------------------------------------------------------------------------------------------------------
def test_dps_step_by_hand():
    prior, mean = gaussian()
    operator, x, y = downsample(SHAPE, 2), draws(2, *SHAPE), draws(2, 1, 1, 1, seed=1)
    for normalise in (True, False):
        found = dps(prior, x, torch.tensor([2.0, 0.5]), measurement=Measurement(y, operator), scale=0.3, eta=0.0,
                    normalise=normalise)  # fmt: skip
        k = 0.3 / (0.3 + 4)
        clean = mean + k * (x - mean)
        residual = clean.mean((2, 3), keepdim=True) - y
        gradient = 2 * k * residual / 4
        step = 0.3 / residual.abs() * (5 * 1.25) ** 0.5 if normalise else 0.3
        torch.testing.assert_close(found, clean + 0.5 * (x - clean) / 2 - step * gradient)


def test_dps_without_a_step_is_plain_sampling():
    prior, _ = gaussian()
    grid, x = levels(5.0, 1.0, 0.2), 5 * draws(3, *SHAPE)
    problem = Measurement(draws(3, *SHAPE, seed=1), identity(SHAPE))
    torch.testing.assert_close(dps(prior, x, grid, measurement=problem, scale=0.0, eta=0.0), ddim(prior, x, grid))
    drawn = [f(prior, x, grid, generator=torch.Generator().manual_seed(1), **more)
             for f, more in ((ancestral, {}), (dps, {"scale": 0.0, "measurement": problem}))]  # fmt: skip
    torch.testing.assert_close(*drawn)
    exact = Measurement(identity(SHAPE).forward(prior(x, 5.0).x0), identity(SHAPE))  # no misfit: no step, and no NaN
    assert dps(prior, x, levels(5.0), measurement=exact).isfinite().all()


def test_dps_comes_near_the_posterior_mean():
    # pixels of one sign together: the seen half tells the rest. Posterior mean by Bayes' rule over both components.
    means = torch.tensor([[-0.7], [0.7]], dtype=torch.float64).expand(2, 4)
    toy = Mixture(torch.ones(2), means, torch.full((2, 4), 0.02))
    truth = toy.sample(64, torch.Generator().manual_seed(1))[0].view(-1, *SHAPE)
    operator = Mask(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]))
    y = operator.forward(truth)
    log = -((y[..., 0].flatten(1)[:, None] - means[:, :2]) ** 2).sum(2) / (2 * 0.02)
    exact = torch.where(operator.singular > 0, y, (log.softmax(1) @ means).view(-1, *SHAPE))
    grid = EDMLevels().sigmas(60)
    start = grid[0] * draws(64, *SHAPE)
    made = dps(toy, start, grid, measurement=Measurement(y, operator), scale=0.3,
               generator=torch.Generator().manual_seed(0))  # fmt: skip
    plain = ancestral(toy, start, grid, generator=torch.Generator().manual_seed(0))

    def error(x):
        return (x - exact).square().mean().sqrt()

    assert error(made) < 0.35 < 0.7 < error(plain)


# -- DDRM --------------------------------------------------------------------------------------------------------------
def test_ddrm_gives_the_posterior_mean_where_its_grid_meets_the_noise():
    # just above sigma_y the state is the measurement: there the denoiser gives the posterior mean
    prior, mean = gaussian()
    noise, y = 0.4, draws(3, *SHAPE)
    made = ddrm(prior, draws(3, *SHAPE, seed=1), levels(9.0, noise * (1 + 1e-9)),
                measurement=Measurement(y, identity(SHAPE), noise))  # fmt: skip
    torch.testing.assert_close(made, mean + 0.3 / (0.3 + noise**2) * (y - mean), atol=1e-4, rtol=0)


def test_ddrm_measured_part_is_kept_and_the_rest_sampled_from_the_prior():
    prior, mean = gaussian()
    operator = Mask(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]))
    truth = draws(4000, *SHAPE)
    y, grid = operator.forward(truth), EDMLevels().sigmas(120)
    made = ddrm(prior, grid[0] * draws(4000, *SHAPE, seed=2), grid, measurement=Measurement(y, operator), eta=0.0,
                generator=torch.Generator().manual_seed(0))  # fmt: skip
    seen = operator.singular[0, 0] > 0
    torch.testing.assert_close(made[..., seen], truth[..., seen], atol=0.02, rtol=0)
    lost = made[:, 0, ~seen]  # pixels are independent: the posterior of a lost one is the prior
    torch.testing.assert_close(lost.mean(0), mean[0, 0, ~seen], atol=0.03, rtol=0)
    torch.testing.assert_close(lost.var(0), torch.full((2,), 0.3, dtype=torch.float64), atol=0.03, rtol=0)


def test_ddrm_measured_nothing_is_plain_sampling():
    prior, _ = gaussian()
    grid, x = levels(5.0, 1.0, 0.2), 5 * draws(3, *SHAPE)
    blind = Measurement(torch.zeros(3, *SHAPE, dtype=torch.float64), Mask(torch.zeros(1, *SHAPE)))
    torch.testing.assert_close(ddrm(prior, x, grid, measurement=blind, eta=0.0), ddim(prior, x, grid))


def test_ddrm_step_by_hand_in_three_cases():
    prior, _ = gaussian()
    operator = Blur(gaussian_kernel(0.6, 3), (1, 4, 4), 0.0)
    prior = Mixture(torch.ones(1), torch.zeros(1, 16), torch.full((1, 16), 0.3))
    x, noise, sigma, below = draws(2, 1, 4, 4), 0.2, 1.0, 0.4
    y = operator.forward(draws(2, 1, 4, 4, seed=1))
    found = ddrm(prior, x, torch.tensor([sigma, below]).double(), measurement=Measurement(y, operator, noise), eta=0.0,
                 eta_b=1.0, generator=(g := torch.Generator().manual_seed(3)))  # fmt: skip
    g.manual_seed(3)
    z = operator.basis(torch.randn(x.shape, generator=g, dtype=torch.float64))
    s, u = operator.singular, operator.measured(y)
    start = operator.basis(x)
    start = torch.where(
        s * sigma > noise, u / s + (sigma**2 - noise**2 / s**2).clamp(min=0).sqrt() * start / sigma, start
    )
    assert (s * sigma > noise).any() and (s * below < noise).any() and (s * below > noise).any()
    clean = 0.3 / 1.3 * start
    want = torch.where(s * below > noise, u / s + (below**2 - noise**2 / s**2).clamp(min=0).sqrt() * z,
                       clean + below * (u - s * clean) / noise)  # fmt: skip
    torch.testing.assert_close(operator.basis(found), want)


def test_pseudo_inverse_asks_no_network():
    prior, _ = gaussian()
    y = draws(2, 1, 1, 1)
    x = pseudo_inverse(prior, draws(2, *SHAPE), levels(1.0), measurement=Measurement(y, downsample(SHAPE, 2)))
    torch.testing.assert_close(x, y.expand(2, *SHAPE).contiguous())
    assert prior.nfe == 0


def test_bad_options():
    for made, key, value in ((DPS, "scale", -1.0), (DPS, "eta", 2.0), (DDRM, "eta", 1.5), (DDRM, "eta_b", -0.1)):
        with pytest.raises(UserError, match=f"method.{made.__name__.lower()}.{key}={value}"):
            made(**{key: value})
