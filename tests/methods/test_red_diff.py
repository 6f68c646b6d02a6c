"""RED-diff: its gradient and stationary point in closed form, its weights and grid, and what options do."""

from __future__ import annotations

import pytest
import torch

from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.errors import UserError
from filtrun.inverse.measurement import Measurement
from filtrun.inverse.operators import Mask, downsample, identity
from filtrun.methods.guidance import red_diff as module
from filtrun.methods.guidance.red_diff import (
    REDDiff,
    RedDiffSolver,
    linear_grid,
    red_diff,
    red_diff_gradient,
    regulariser_weight,
)  # fmt: skip

SHAPE = (1, 4, 4)


def draws(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(variance=0.3):
    mean = 0.5 * draws(1, 16, seed=9)
    return Mixture(torch.ones(1), mean, torch.full((1, 16), variance)), mean.view(1, *SHAPE)


def levels(*values):
    return torch.tensor([*values, 0.0], dtype=torch.float64)


@pytest.fixture
def still(monkeypatch):
    """No noise: for a linear denoiser the gradient is then its own expectation."""
    monkeypatch.setattr(module, "fresh_noise", lambda x, generator: torch.zeros_like(x))


def test_gradient_is_that_of_the_two_means():
    operator = downsample(SHAPE, 2)
    x, eps, noise = (draws(3, *SHAPE, seed=i) for i in range(3))
    problem = Measurement(draws(3, 1, 2, 2, seed=5), operator)
    leaf = x.clone().requires_grad_()
    misfit = (problem.y - operator.forward(leaf)).square().mean() / 2
    loss = 0.7 * ((eps - noise) * leaf).mean() + 1.3 * misfit
    (want,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(red_diff_gradient(x, eps, noise, problem, 0.7, 1.3), want)
    alone = red_diff_gradient(x, eps, noise, problem, 0.7, 0.0)
    assert torch.equal(alone, 0.7 * (eps - noise) / x.numel())
    # a hole is no measurement: the mean is over what is kept
    kept = Mask((draws(1, *SHAPE) > 0).double())
    leaf = x.clone().requires_grad_()
    y = kept.forward(draws(3, *SHAPE, seed=4))
    seen = kept.singular.expand_as(x) > 0
    (want,) = torch.autograd.grad((y - leaf)[seen].square().mean() / 2, leaf)
    torch.testing.assert_close(red_diff_gradient(x, eps, eps, Measurement(y, kept), 1.0), want)


def test_regulariser_follows_the_score_of_the_smoothed_prior():
    # E[eps - z] = -sigma * score of the prior smoothed by sigma; for a Gaussian, antithetic noise gives it exactly
    prior, mean = gaussian()
    mu, z, sigma = draws(2, *SHAPE), draws(2, *SHAPE, seed=1), torch.tensor(0.8, dtype=torch.float64)
    difference = sum(prior(mu + sigma * s, sigma).eps - s for s in (z, -z)) / 2
    score = -(mu - mean) / (0.3 + sigma**2)
    torch.testing.assert_close(difference, -sigma * score)
    # and by Monte Carlo for a mixture: Tweedie at mu + sigma z, averaged
    toy, at = Mixture.four_in_six(), draws(1, 6)
    many = draws(20_000, 6, seed=2)
    found = (toy(at + sigma * many, sigma).eps - many).mean(0)
    moved = (at + sigma * many).requires_grad_()
    (gradient,) = torch.autograd.grad(toy.log_density(moved, sigma).sum(), moved)
    torch.testing.assert_close(found, -sigma * gradient.mean(0), atol=0.03, rtol=0)


def test_reaches_the_posterior_mean_of_a_gaussian(still):
    # stationary: lam f(sigma) sigma / (v + sigma^2) (mu - m) / n + H^T (H mu - y) / M = 0: the posterior mean
    v, sigma, noise, operator = 0.3, 2.0, 0.4, downsample(SHAPE, 2)
    prior, mean = gaussian(v)
    y = operator.forward(draws(1, *SHAPE, seed=3))
    lam = 16 / 4 * noise**2 * (v + sigma**2) / (v * sigma**2)
    grid = torch.linspace(sigma, sigma - 1e-9, 301, dtype=torch.float64)
    x = red_diff(prior, y.new_zeros(1, *SHAPE), grid, measurement=Measurement(y, operator, noise), lam=lam, lr=0.02)
    dense = operator.forward(torch.eye(16, dtype=torch.float64).view(16, *SHAPE)).flatten(1).mT
    precision = dense.mT @ dense / noise**2 + torch.eye(16) / v
    exact = torch.linalg.solve(precision, dense.mT @ y.flatten() / noise**2 + mean.flatten() / v)
    torch.testing.assert_close(x.flatten(), exact, atol=1e-5, rtol=0)


def test_without_the_regulariser_it_is_least_squares():
    prior, _ = gaussian()
    y = draws(2, *SHAPE)
    grid = linear_grid(500)
    problem = Measurement(y, identity(SHAPE))
    x = red_diff(prior, y, grid, measurement=problem, lam=0.0, start=torch.zeros_like(y), lr=0.05)
    torch.testing.assert_close(x, y, atol=1e-3, rtol=0)
    assert prior.nfe == 500
    hidden = Mask((draws(1, *SHAPE) > 0).double())
    problem = Measurement(hidden.forward(y), hidden)
    x = red_diff(prior, y, linear_grid(5), measurement=problem, lam=0.0)
    assert torch.equal(x, hidden.pinv(problem.y))  # it starts there and stays
    fewer = Measurement(draws(2, 1, 2, 2), downsample(SHAPE, 2))
    x = red_diff(prior, y, linear_grid(250), measurement=fewer, lam=0.0, start=torch.zeros_like(y), lr=0.02)
    assert fewer.residual(x).abs().max() < 1e-3


def test_without_the_misfit_it_goes_to_the_prior_mean(still):
    prior, mean = gaussian()
    y = draws(1, *SHAPE)
    problem = Measurement(y, identity(SHAPE))
    x = red_diff(prior, y, linear_grid(250), measurement=problem, obs_weight=0.0, lr=0.03)
    torch.testing.assert_close(x, mean, atol=2e-3, rtol=0)


def test_fills_holes_better_than_the_pseudo_inverse():
    # components with correlated pixels: what is seen says what is not
    means = torch.stack([torch.full((16,), a) for a in (-0.8, 0.8)]) * torch.sign(draws(16, seed=6))
    toy = Mixture(torch.ones(2), means, torch.full((2, 16), 0.01))
    truth = toy.sample(32, torch.Generator().manual_seed(1))[0].view(-1, *SHAPE)
    operator = Mask((torch.arange(16).view(1, *SHAPE) % 2).double())
    problem = Measurement(operator.forward(truth), operator)
    made = red_diff(toy, truth, linear_grid(100), measurement=problem, generator=torch.Generator().manual_seed(0))
    error = (made - truth).square().mean().sqrt()
    assert error < 0.25 < 0.5 < (operator.pinv(problem.y) - truth).square().mean().sqrt()


def test_weights():
    u = torch.tensor([0.25, 4.0])
    want = {
        "linear": [0.25, 4.0], "sqrt": [0.5, 2.0], "square": [0.0625, 16.0], "log": [0.223144, 1.609438],
        "trunc_linear": [0.25, 1.0], "power2over3": [0.396850, 2.519842], "const": [1.0, 1.0],
    }  # fmt: skip
    assert tuple(want) == module.WEIGHTING_NAMES == tuple(module.WEIGHTINGS)
    for name, values in want.items():
        torch.testing.assert_close(regulariser_weight(u, name), torch.tensor(values), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="unknown weighting 'cubic'"):
        regulariser_weight(u, "cubic")


def test_grid_is_evenly_spaced_in_the_time_of_the_linear_schedule():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = (1 - beta).cumprod(0)
    sigma = ((1 - a) / a).sqrt()
    torch.testing.assert_close(linear_grid(100)[:-1], sigma[::10].flip(0))
    assert linear_grid(100)[-1] == 0 and len(linear_grid(7)) == 8
    inside = linear_grid(50, 0.02, 80.0)
    assert inside[0] <= 80 and inside[-2] >= 0.02 and bool((inside.diff() < 0).all())
    solver = RedDiffSolver(REDDiff())
    assert solver.grid(EDMLevels(), 100)[0] <= 80
    torch.testing.assert_close(RedDiffSolver(REDDiff(spacing="log")).grid(EDMLevels(), 9), EDMLevels().sigmas(9, "log"))
    with pytest.raises(UserError, match="steps=1001 is out of range"):
        linear_grid(1001)


def test_orders_and_callback():
    prior, _ = gaussian()
    y, seen = draws(1, *SHAPE), {}
    problem = Measurement(y, identity(SHAPE))
    for order in ("descending", "ascending", "random"):
        visited: list[float] = []
        red_diff(prior, y, levels(3.0, 2.0, 1.0), measurement=problem, order=order, generator=torch.Generator(),
                 callback=lambda i, s, x, p, v=visited: v.append(float(s)))  # fmt: skip
        seen[order] = visited
    assert seen["descending"] == [3, 2, 1] and seen["ascending"] == [1, 2, 3]
    assert len(seen["random"]) == 3 and set(seen["random"]) <= {1, 2, 3}
    with pytest.raises(UserError, match="unknown order"):
        red_diff(prior, y, levels(1.0), measurement=problem, order="sideways")


def test_a_generator_fixes_the_result_and_noise_of_mu_is_drawn_first():
    prior, _ = gaussian()
    y = draws(2, *SHAPE)

    def made(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        problem = Measurement(y, identity(SHAPE))
        return red_diff(prior, y, levels(2.0, 1.0), measurement=problem, generator=generator, **options)

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))
    assert not torch.equal(made(1), made(1, sigma_x0=0.1))


def test_bad_options():
    for key, value in {"lam": -1.0, "lr": -0.1, "order": "up", "weighting": "x", "beta2": 1.0, "spacing": "x"}.items():
        with pytest.raises(UserError, match=f"method.red_diff.{key}={value}"):
            REDDiff(**{key: value})
