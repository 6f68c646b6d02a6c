"""DPM-Solver-v3 against the published solver's output, closed forms of a Gaussian and the mixture's error table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from filtrun.diffusion.denoiser import Denoiser, Prediction
from filtrun.diffusion.dpm_solver_v3 import DPMSolverV3, Integrals, derivative_weights
from filtrun.diffusion.guidance import cfg
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.model_statistics import ModelStatistics, coefficients, estimate
from filtrun.diffusion.multistep import unipc
from filtrun.diffusion.noise import EDMLevels, noise_levels
from filtrun.errors import UserError

LEVELS = EDMLevels()


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


def log_grid(steps, **ends):
    return LEVELS.sigmas(steps, "log", zero=False, **ends)


def made_up(levels=40, calm=False):
    """Smooth statistics given by formulas; any bounded ones must work."""
    sigmas = log_grid(levels)
    lam, d = -sigmas.log()[:, None], torch.arange(6.0, dtype=torch.float64)
    i = (lam - lam[0]) / (lam[-1] - lam[0]) * 40
    l = sigmas[:, None] ** 2 / (sigmas[:, None] ** 2 + 0.3 + 0.1 * d)  # noqa: E741
    if calm:
        return ModelStatistics(sigmas, l, -0.2 + 0.1 * (0.1 * i + d).cos(), 0.3 * (0.1 * i - d).sin())
    return ModelStatistics(sigmas, l, -0.2 + 0.1 * (0.3 * i + d).cos(), 0.3 * (0.2 * i - d).sin())


@pytest.fixture(scope="module")
def toy():
    mixture = Mixture.four_in_six()
    x = 80 * torch.from_numpy(np.random.default_rng(0).standard_normal((256, 6)))
    return mixture, x, unipc(mixture, x, log_grid(300))


@pytest.fixture(scope="module")
def measured(toy):
    """Statistics of the mixture from 512 samples at 121 levels, within a few seconds."""
    data, _ = toy[0].sample(512, torch.Generator().manual_seed(1))
    return estimate(toy[0], data, log_grid(120), draws=512, batch=512)


@pytest.mark.parametrize(
    "steps, order, pseudo, corrector, raised, lower_final, expected",
    [
        (5, 3, True, "full", False, True, [0.48465, -0.14366, 0.10485, -0.13908, -0.23218, 0.19698]),
        (8, 3, False, "none", False, True, [0.68399, 0.34897, 0.43523, 0.41195, 0.68102, 0.81022]),
        (6, 2, False, "full", True, True, [0.55315, -0.21137, 0.28481, 0.21536, 0.05201, 0.57457]),
        (7, 3, False, "full", True, False, [0.40054, -0.43502, -0.47027, 0.1215, -0.13823, -0.07694]),
        (10, 1, False, "full", True, True, [0.99727, 0.03832, -0.03109, 0.70035, 0.27227, 0.27748]),
    ],
)
def test_same_numbers_as_the_published_solver(steps, order, pseudo, corrector, raised, lower_final, expected):
    """thu-ml/DPM-Solver-v3, edm/samplers/dpm_solver_v3.py, on the same statistics, denoiser and start."""
    x = torch.tensor([[60.0, -45, 20, -5, 30, -70], [-10.0, 15, 90, -80, 55, 25]], dtype=torch.float64)
    solver = DPMSolverV3(
        made_up(), order, pseudo_predictor=pseudo, corrector=corrector, pseudo_corrector=raised,
        lower_order_final=lower_final,
    )  # fmt: skip
    mixture = Mixture.four_in_six()
    got = solver(mixture, x, solver.grid(LEVELS, steps))
    assert got[:, :3].flatten().tolist() == pytest.approx(expected, abs=2e-5)
    assert mixture.nfe == steps  # the corrector needs no evaluation


@pytest.mark.parametrize(
    "order, errors", [(1, (0.174, 0.103, 0.052)), (2, (0.126, 0.048, 0.014)), (3, (0.149, 0.051, 0.010))]
)
def test_reference_errors_with_monte_carlo_statistics(toy, measured, order, errors):
    """The table was made with 4096 draws; these are 512."""
    mixture, x, end = toy
    solver = DPMSolverV3(measured, order, corrector="none", pseudo_predictor=False)
    for steps, error in zip((5, 10, 20), errors, strict=True):
        assert rmse(solver(mixture, x, solver.grid(LEVELS, steps)), end) == pytest.approx(error, rel=0.05, abs=1e-3)


def test_it_beats_solvers_of_the_same_order_and_cost(toy, measured):
    mixture, x, end = toy
    for order, others in ((1, (0.321, 0.175, 0.0915)), (2, (0.169, 0.067, 0.0181))):
        solver = DPMSolverV3(measured, order, corrector="none", pseudo_predictor=False)
        for steps, other in zip((5, 10, 20), others, strict=True):
            assert rmse(solver(mixture, x, solver.grid(LEVELS, steps)), end) < 0.85 * other


def test_without_statistics_it_expands_the_denoised_image(toy):
    mixture, x, end = toy
    plain = ModelStatistics.degenerate(log_grid(120), (6,))
    solver = DPMSolverV3(plain, 3, corrector="none", pseudo_predictor=False)
    errors = [rmse(solver(mixture, x, solver.grid(LEVELS, n)), end) for n in (5, 10, 20)]
    assert errors == pytest.approx([0.545, 0.052, 0.008], abs=6e-4)


@pytest.mark.parametrize("order, corrector, expected", [(1, "none", 1), (2, "none", 2), (3, "none", 3), (2, "full", 2)])
def test_convergence_order_with_any_bounded_statistics(toy, order, corrector, expected):
    """The statistics' grid is 24 times finer than the finest steps, so that its trapezoid rule plays no part."""
    mixture, x, _ = toy
    fine = made_up(128 * 24, calm=True)
    solver = DPMSolverV3(fine, order, corrector=corrector, pseudo_predictor=False, lower_order_final=False)
    x = x[:32]
    end = unipc(mixture, x, log_grid(600))
    errors = [rmse(solver(mixture, x, solver.grid(LEVELS, n)), end) for n in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.2)


def test_a_gaussian_is_solved_in_one_step_by_its_own_statistics():
    mean = torch.tensor([0.3, -0.2])
    variance = torch.tensor([0.4, 0.1])
    mixture = Mixture(torch.ones(1), mean[None], variance[None])
    sigmas = log_grid(120)
    l = sigmas[:, None] ** 2 / (sigmas[:, None] ** 2 + variance)  # noqa: E741
    # f = sigma eps - l x = -l m has no spread: s = 0 and b = df/dlam = -m dl/dlam
    b = 2 * mean * l * (1 - l)
    solver = DPMSolverV3(ModelStatistics(sigmas, l, torch.zeros_like(l), b), 1)
    x = 80 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = mean + ((variance + 0.002**2) / (variance + 80**2)).sqrt() * (x - mean)
    assert rmse(solver(mixture, x, solver.grid(LEVELS, 1)), exact) < 1e-3


@pytest.mark.parametrize("derivative, tolerance", [("forward", 1e-9), ("difference", 2e-5)])
def test_estimated_statistics_of_a_gaussian(derivative, tolerance):
    """l = sigma^2 / (sigma^2 + v) in every draw, as the denoiser is linear with a diagonal Jacobian; b as above."""
    mean, variance = torch.tensor([0.3, -0.2, 0.1, 0.0]), torch.tensor([0.4, 0.1, 0.05, 1.0])
    mixture = Mixture(torch.ones(1), mean[None], variance[None])
    data, _ = mixture.sample(16, torch.Generator().manual_seed(0))
    sigmas = log_grid(60)
    got = estimate(mixture, data.reshape(-1, 1, 2, 2), sigmas, draws=32, batch=10, derivative=derivative)
    l = (sigmas[:, None] ** 2 / (sigmas[:, None] ** 2 + variance)).reshape(-1, 1, 2, 2)  # noqa: E741
    torch.testing.assert_close(got.l, l, rtol=0, atol=tolerance)
    inner = slice(1, -1)  # central differences of l inside, one-sided ones at the ends
    exact = (2 * mean.reshape(1, 2, 2) * l * (1 - l))[inner]
    torch.testing.assert_close(got.b[inner], exact, rtol=0, atol=5e-3)


def test_statistics_minimise_what_is_left_to_guess():
    """s and b are the least-squares fit of df/dlam on f; by definition, on the same draws, computed the long way."""
    generator = torch.Generator().manual_seed(3)
    x, a, slope = torch.randn(3, 7, 200, 5, generator=generator, dtype=torch.float64)  # levels, draws, pixels
    a = a + 0.7 * x
    l = torch.rand(7, 5, generator=generator, dtype=torch.float64)  # noqa: E741
    sigmas = log_grid(6, sigma_max=2, sigma_min=0.1)
    parts = torch.stack([x, a, slope])
    means = parts.mean(2)
    products = torch.einsum("pnk...,qnk...->pqn...", parts, parts) / 200 - means[:, None] * means[None]
    got = coefficients(sigmas, l, means, products)
    step = -sigmas.log().diff()[0]
    dl = torch.gradient(l, spacing=step.item(), dim=0)[0]
    for level in range(7):
        f = a[level] - l[level] * x[level]
        f1 = (l[level] - 1) * a[level] - slope[level] - dl[level] * x[level]
        for pixel in range(5):
            s, b = np.polyfit(f[:, pixel].numpy(), f1[:, pixel].numpy(), 1)
            assert got.s[level, pixel].item() == pytest.approx(s, rel=1e-8)
            assert got.b[level, pixel].item() == pytest.approx(b, rel=1e-8, abs=1e-10)


def test_a_pixel_that_never_changes_gets_no_slope():
    sigmas = log_grid(4)
    one = torch.ones(5, 2, dtype=torch.float64)
    got = coefficients(sigmas, one, torch.ones(3, 5, 2, dtype=torch.float64), torch.zeros(3, 3, 5, 2).double())
    assert got.s.abs().max() == 0 and torch.isfinite(got.b).all()


def test_derivatives_of_polynomials():
    points = [0.4, 0.1, -0.5, 0.9]
    full, pseudo = derivative_weights(points), derivative_weights(points, pseudo=True)
    cubic = torch.tensor([2 + p - 3 * p**2 + 0.5 * p**3 for p in points], dtype=torch.float64)
    assert (full @ cubic).tolist() == pytest.approx([1 - 6 * 0.4 + 1.5 * 0.16, -6 + 3 * 0.4, 3.0])
    # pseudo-order: the first derivative from two points, the second from three, the third from all
    divided = (cubic[0] - cubic[1]).item() / 0.3
    assert (pseudo @ cubic)[0].item() == pytest.approx(divided)
    assert pseudo[0, 2:].abs().sum() == 0 and pseudo[1, 3] == 0
    torch.testing.assert_close(pseudo[2], full[2])
    assert derivative_weights([0.3]).shape == (0, 1)


def test_one_step_in_constant_coefficients():
    """l, s, b constant: with x' = -sigma eps and f' = s f + b the solution is elementary; f at s alone gives it."""
    l, s, b, h = 0.6, -0.3, 0.2, 0.5  # noqa: E741
    sigmas = torch.tensor([-h * i / 2000 for i in range(2001)], dtype=torch.float64).exp()
    one = torch.ones(2001, 1, dtype=torch.float64)
    step = Integrals(ModelStatistics(sigmas, l * one, s * one, b * one)).step(0, 2000, [0])
    x, f = 1.7, -0.4
    # dx/dlam = -(l x + f), f = (f0 + b/s) e^{s lam} - b/s
    steady, decay = f + b / s, math.exp(-l * h)
    exact = decay * x - steady * (math.exp(s * h) - decay) / (s + l) + b / s * (1 - decay) / l
    assert (step.decay * x + step.offset + step.weights[0] * f).item() == pytest.approx(exact, rel=1e-7)


def test_grid_is_that_of_the_statistics():
    solver = DPMSolverV3(made_up(), spacing="karras")
    grid = solver.grid(LEVELS, 6)
    assert grid[0].item() == pytest.approx(80) and grid[-1].item() == pytest.approx(0.002)
    assert all(s in solver.statistics.sigmas.tolist() for s in grid.tolist())
    gap = math.log(80 / 0.002) / 40
    assert (grid.log() - LEVELS.sigmas(6, "karras", zero=False).log()).abs().max() <= gap / 2 + 1e-9
    with pytest.raises(UserError, match="41 noise levels: two of them"):
        solver.grid(LEVELS, 41)


def test_correctors_of_the_two_halves(toy):
    mixture, x, _ = toy
    ends = {}
    for corrector in ("none", "full", "late", "early"):
        solver = DPMSolverV3(made_up(), 3, corrector=corrector, half_sigma=0.4)
        ends[corrector] = solver(mixture, x[:4], solver.grid(LEVELS, 8))
    assert len({tuple(e.flatten().tolist()) for e in ends.values()}) == 4
    for low, same in ((0.0, "none"), (100.0, "full")):
        solver = DPMSolverV3(made_up(), 3, corrector="late", half_sigma=low)
        torch.testing.assert_close(solver(mixture, x[:4], solver.grid(LEVELS, 8)), ends[same])
    automatic = DPMSolverV3(made_up(), 3)
    torch.testing.assert_close(automatic(mixture, x[:4], automatic.grid(LEVELS, 8)), ends["none"])


def test_a_last_step_to_zero_and_single_precision(toy):
    mixture, x, _ = toy
    solver, seen = DPMSolverV3(made_up()), []

    def denoise(state, sigma, cond=None):
        exact = mixture(state, sigma, cond)
        return Prediction(exact.x0.float(), exact.eps.float())

    grid = torch.cat([solver.grid(LEVELS, 5), torch.zeros(1)])
    end = solver(denoise, x[:3].float(), grid, callback=lambda i, sigma, state, now: seen.append(now.x0))
    assert end.dtype == torch.float32 and len(seen) == 6
    torch.testing.assert_close(end, seen[-1])


class Net(torch.nn.Module):
    """A small smooth class-conditional network with attention, for derivatives."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        self.classes = torch.nn.Embedding(3, 8)

    def forward(self, x, noise, y):
        h = (self.inside(x.flatten(1)) + self.classes(y) + noise[:, None]).tanh().reshape(-1, 1, 4, 2)
        h = torch.nn.functional.scaled_dot_product_attention(h, h, h)
        return self.outside(h.flatten(1)).reshape(x.shape)


def test_forward_derivatives_of_a_guided_network_agree_with_differences():
    denoiser = Denoiser(Net().double().requires_grad_(False), LEVELS, num_classes=2, dtype=torch.float64)
    images = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.arange(12) % 2
    sigmas, both = log_grid(20, sigma_max=5, sigma_min=0.05), []
    with torch.no_grad():  # as in an evaluation
        for derivative in ("forward", "difference"):
            both.append(estimate(cfg(denoiser, 2.0), images, sigmas, y, draws=24, batch=8, derivative=derivative))
    for name in ("l", "s", "b"):
        torch.testing.assert_close(getattr(both[0], name), getattr(both[1], name), rtol=1e-3, atol=1e-3)
    assert both[0].l.shape == (21, 1, 2, 2)
    plain = estimate(denoiser, images, sigmas, y, draws=24, batch=8)
    assert (plain.l - both[0].l).abs().max() > 1e-3  # guidance is part of what is measured


def test_discrete_time_networks_can_be_measured():
    net = Net()
    net.time_input = "timestep"
    denoiser = Denoiser(net.requires_grad_(False), noise_levels("linear"), "eps", num_classes=2)
    ladder = denoiser.levels.sigmas(10, "log", zero=False)
    got = estimate(denoiser, torch.rand(4, 1, 2, 2), ladder, draws=8)
    assert all(torch.isfinite(t).all() for t in (got.l, got.s, got.b))


def test_mistakes_are_named(toy):
    mixture, x, _ = toy
    data = torch.zeros(3, 6)
    with pytest.raises(UserError, match="at least 2 draws"):
        estimate(mixture, data, log_grid(5), draws=1)
    with pytest.raises(UserError, match="did you mean 'forward'"):
        estimate(mixture, data, log_grid(5), derivative="forwards")

    def apart(state, sigma, cond=None):  # as CFG++ does
        return Prediction(torch.ones_like(state), state / sigma)

    with pytest.raises(UserError, match="renoises along another direction"):
        estimate(apart, data, log_grid(5), draws=2)
    with pytest.raises(UserError, match="uniform in ln sigma"):
        ModelStatistics(torch.tensor([3.0, 2.0, 1.0]), torch.ones(3, 1), torch.ones(3, 1), torch.ones(3, 1))
    with pytest.raises(UserError, match="at each of three noise levels"):
        ModelStatistics(log_grid(4), torch.ones(4, 1), torch.ones(5, 1), torch.ones(5, 1))
    with pytest.raises(UserError, match="order=4"):
        DPMSolverV3(made_up(), 4)
    with pytest.raises(UserError, match="unknown corrector 'half'"):
        DPMSolverV3(made_up(), corrector="half")
