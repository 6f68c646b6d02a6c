"""Samplers against exact ODE end points, published error tables and Gaussian closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from filtrun.diffusion.denoiser import Prediction
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import ancestral, ancestral_step, ddim, euler, heun, sampler
from filtrun.errors import UserError


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


def calls(mixture, run):
    before = mixture.nfe
    result = run()
    return result, mixture.nfe - before


@pytest.fixture(scope="module")
def toy():
    """Mixture, start state and exact end points: 1500 steps of Heun in ln sigma agree with 4000 to 4e-6."""
    mixture = Mixture.four_in_six()
    x = 80 * torch.from_numpy(np.random.default_rng(0).standard_normal((256, 6)))
    return mixture, x, heun(mixture, x, EDMLevels().sigmas(1500, "log", zero=False))


def gaussian(mean=0.3, variance=0.4):
    return Mixture(torch.ones(1), torch.full((1, 4), mean), torch.full((1, 4), variance))


def test_exact_end_points(toy):
    _, _, end = toy
    assert end.mean(0).tolist() == pytest.approx([0.3057, 0.1637, -0.2467, -0.4537, -0.2206, 0.1016], abs=1e-4)
    assert end.std(0).tolist() == pytest.approx([0.9807, 0.9615, 0.8545, 0.9717, 1.0108, 0.8981], abs=1e-4)


@pytest.mark.parametrize("nfe, error", [(5, 0.321), (10, 0.175), (20, 0.0915), (40, 0.0504)])
def test_ddim_has_the_reference_error(toy, nfe, error):
    mixture, x, end = toy
    got, used = calls(mixture, lambda: ddim(mixture, x, EDMLevels().sigmas(nfe, "log", zero=False)))
    assert used == nfe
    assert rmse(got, end) == pytest.approx(error, rel=3e-3)


@pytest.mark.parametrize("nfe, error", [(5, 3.62), (10, 0.598), (20, 0.106), (40, 0.0224)])
def test_heun_has_the_reference_error(toy, nfe, error):
    mixture, x, end = toy
    # an even budget stops at sigma_min, an odd one adds the Euler step to 0
    sigmas = EDMLevels().sigmas(nfe // 2, zero=False) if nfe % 2 == 0 else EDMLevels().sigmas((nfe + 1) // 2)
    got, used = calls(mixture, lambda: heun(mixture, x, sigmas))
    assert used == nfe
    assert rmse(got, end) == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("solve, order, steps", [(ddim, 1, (256, 512, 1024)), (heun, 2, (64, 128, 256))])
def test_convergence_order(toy, solve, order, steps):
    mixture, x, end = toy
    errors = [rmse(solve(mixture, x, EDMLevels().sigmas(n, "log", zero=False)), end) for n in steps]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([order, order], abs=0.2)


def test_gaussian_ode_end_point():
    mixture, sigmas = gaussian(), EDMLevels().sigmas(400, "log", zero=False)
    x = EDMLevels().start(torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), sigmas[0])
    exact = 0.3 + math.sqrt((0.4 + 0.002**2) / (0.4 + 80**2)) * (x - 0.3)
    torch.testing.assert_close(heun(mixture, x, sigmas), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("zero", (True, False))
def test_ancestral_keeps_mean_and_variance(zero):
    mixture, sigmas = gaussian(), EDMLevels().sigmas(500, "log", zero=zero)
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + (0.4 + 80.0**2) ** 0.5 * torch.randn(10_000, 4, generator=generator, dtype=torch.float64)
    end = ancestral(mixture, x, sigmas, generator=generator)
    assert end.mean().item() == pytest.approx(0.3, abs=0.01)
    assert end.var().item() == pytest.approx(0.4, rel=0.04)  # 500 steps bias it by -2%
    # it forgot where it started, unlike the deterministic samplers
    assert abs(torch.corrcoef(torch.stack([x[:, 0], end[:, 0]]))[0, 1].item()) < 0.03


def test_ancestral_variance_follows_the_linear_recursion():
    """One Gaussian: var' = (r + (1 - r) k)^2 var + up^2 with r = down / sigma and k = v / (v + sigma^2)."""
    mixture, sigmas = gaussian(0.0), EDMLevels().sigmas(6, "log", zero=False)
    variance = 0.4 + 80.0**2
    for s, t in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        down, up = ancestral_step(s, t)
        assert down**2 + up**2 == pytest.approx(t * t)
        k = 0.4 / (0.4 + s * s)
        variance = (down / s + (1 - down / s) * k) ** 2 * variance + up**2
    generator = torch.Generator().manual_seed(0)
    x = (0.4 + 80.0**2) ** 0.5 * torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    assert ancestral(mixture, x, sigmas, generator=generator).var().item() == pytest.approx(variance, rel=0.02)


def test_ancestral_step_is_the_ddpm_posterior():
    # q(x' | x, x0): variance s'^2 (s^2 - s'^2) / s^2, and the weight of eps is s'^2 / s
    assert ancestral_step(2.0, 1.0) == pytest.approx((0.5, math.sqrt(0.75)))
    assert ancestral_step(2.0, 1.0, eta=0.0) == (1.0, 0.0)
    assert ancestral_step(2.0, 0.0) == (0.0, 0.0)


def test_ancestral_is_reproducible_and_becomes_ddim_at_eta_zero():
    mixture, sigmas = Mixture.four_in_six(), EDMLevels().sigmas(10)
    x = 80 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = (ancestral(mixture, x, sigmas, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(ancestral(mixture, x, sigmas, eta=0.0), ddim(mixture, x, sigmas))


def test_last_step_to_zero_is_the_clean_estimate():
    mixture = Mixture.four_in_six()
    x, sigmas = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0.7, 0.0])
    exact = mixture(x, sigmas[0].double()).x0
    for solve in (ddim, heun, ancestral):
        torch.testing.assert_close(solve(mixture, x, sigmas), exact)
    assert heun is sampler("heun") and euler is ddim


def test_steps_go_to_x0_and_renoise_along_eps():
    """A prediction whose parts disagree: x' = D_step + (x - D_renoise) sigma' / sigma."""
    x, step, renoise = torch.tensor([[2.0]]), 0.5, -1.0

    def denoise(state, sigma, cond=None):
        return Prediction(torch.full_like(state, step), (state - renoise) / sigma)

    assert ddim(denoise, x, torch.tensor([4.0, 1.0])).item() == pytest.approx(step + (2 - renoise) / 4)
    down, _ = ancestral_step(4.0, 1.0)
    torch.manual_seed(0)
    noise = torch.randn(1, 1).item()
    torch.manual_seed(0)
    got = ancestral(denoise, x, torch.tensor([4.0, 1.0])).item()
    assert got == pytest.approx(step + (2 - renoise) * down / 4 + math.sqrt(1 - down**2) * noise, rel=1e-5)
    # Heun: both slopes, denoising from x0 and renoising from eps
    first = step + (2 - renoise) / 4
    clean = (2 - step) / 4 + (first - step) / 1
    noisy = (2 - renoise) / 4 + (first - renoise) / 1
    assert heun(denoise, x, torch.tensor([4.0, 1.0])).item() == pytest.approx(2 - 4 * clean / 2 + noisy / 2)


@pytest.mark.parametrize("solve", (ddim, heun, ancestral))
def test_callback_condition_and_precision(solve):
    mixture, sigmas, seen = Mixture.four_in_six(), EDMLevels().sigmas(4), []
    x, y = 80 * torch.randn(3, 6), torch.tensor([0, 2, 4])

    def denoise(state, sigma, cond=None):
        assert state.dtype == sigma.dtype == torch.float32 and torch.equal(cond, y)
        exact = mixture(state, sigma, cond)
        return Prediction(exact.x0.float(), exact.eps.float())

    end = solve(denoise, x, sigmas, y, callback=lambda i, sigma, state, now: seen.append((i, sigma.item(), state)))
    assert end.dtype == torch.float32 and end.shape == x.shape
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [s for _, s, _ in seen] == pytest.approx(sigmas[:4].tolist(), rel=1e-6)
    assert torch.equal(seen[0][2], x)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'heun'"):
        sampler("huen")
    for bad in ([1.0], [1.0, 1.0], [0.1, 1.0], [1.0, -0.1]):
        with pytest.raises(UserError, match="sigmas must fall"):
            ddim(Mixture.four_in_six(), torch.zeros(1, 6), torch.tensor(bad))
