"""DPM-Solver++ and UniPC against exact ODE end points, the published error table and diffusers' schedulers."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from filtrun.diffusion.denoiser import Prediction
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.multistep import dpmpp, dpmpp_weights, unipc, unipc_weights
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import SAMPLER_NAMES, SAMPLERS, ddim, sampler
from filtrun.errors import UserError

LEVELS = EDMLevels()


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


def log_grid(steps):
    return LEVELS.sigmas(steps, "log", zero=False)


@pytest.fixture(scope="module")
def toy():
    """Mixture, start state and end points, which 800 steps of UniPC give to 2e-8."""
    mixture = Mixture.four_in_six()
    x = 80 * torch.from_numpy(np.random.default_rng(0).standard_normal((256, 6)))
    return mixture, x, unipc(mixture, x, log_grid(800))


def test_end_points_are_the_exact_ones(toy):
    end = toy[2]
    assert end.mean(0).tolist() == pytest.approx([0.3057, 0.1637, -0.2467, -0.4537, -0.2206, 0.1016], abs=1e-4)
    assert end.std(0).tolist() == pytest.approx([0.9807, 0.9615, 0.8545, 0.9717, 1.0108, 0.8981], abs=1e-4)


@pytest.mark.parametrize(
    "name, errors",
    [
        ("dpmpp_1m", (0.321, 0.175, 0.0915, 0.0504)),
        ("dpmpp_2m", (0.169, 0.067, 0.0181, 0.0049)),
        ("dpmpp_3m", (0.404, 0.053, 0.0082, 0.0019)),
        ("unipc", (0.465, 0.051, 0.0085, 0.0011)),
    ],
)
def test_reference_errors_at_5_10_20_and_40_evaluations(toy, name, errors):
    """RMSE of the official solvers' code on this mixture, two or three digits."""
    mixture, x, end = toy
    for nfe, error in zip((5, 10, 20, 40), errors, strict=True):
        before = mixture.nfe
        got = sampler(name)(mixture, x, log_grid(nfe))
        assert mixture.nfe - before == nfe
        half_digit = 0.51 * 10 ** -len(str(error).split(".")[1])
        assert rmse(got, end) == pytest.approx(error, abs=half_digit)


@pytest.mark.parametrize(
    "solve, order",
    [
        (partial(dpmpp, order=1), 1),
        (partial(dpmpp, order=2), 2),
        (partial(dpmpp, order=3), 2),  # the published update has half of its curvature term
        (partial(dpmpp, order=3, full_third_order=True), 3),
        (partial(dpmpp, order=2, lower_order_final=False), 2),
        (SAMPLERS["dpmpp_2s"], 2),
        (partial(unipc, order=1), 2),
        (partial(unipc, order=2), 3),
        (partial(unipc, order=1, variant="bh1"), 2),
        (partial(unipc, order=2, variant="bh1"), 3),
        (partial(unipc, order=3, variant="bh1"), 4),
        (partial(unipc, order=3), 4),
        (partial(unipc, order=3, lower_order_final=False), 4),
    ],
)
def test_convergence_order(toy, solve, order):
    mixture, x, end = toy
    steps = (512, 1024) if order == 1 else (128, 256)  # a first-order solver settles late
    errors = [rmse(solve(mixture, x, log_grid(n)), end) for n in steps]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def scheduler_end(scheduler, mixture, x, sigmas, **options):
    """Drive a scheduler of diffusers over given noise levels, in its variance-preserving variables."""
    steps = len(sigmas) - 1
    made = scheduler(prediction_type="sample", **options)
    made.set_timesteps(steps)
    made.timesteps = torch.arange(steps).flip(0)
    made.sigmas = sigmas
    made.num_inference_steps = steps
    z = x / (1 + sigmas[0] ** 2) ** 0.5
    for i, t in enumerate(made.timesteps):
        clean = mixture(z * (1 + sigmas[i] ** 2) ** 0.5, sigmas[i]).x0
        z = made.step(clean, t, z).prev_sample.double()
    return z * (1 + sigmas[-1] ** 2) ** 0.5


@pytest.mark.parametrize("steps", (5, 8, 12))
@pytest.mark.parametrize("order", (1, 2, 3))
def test_same_as_the_schedulers_of_diffusers(toy, steps, order):
    diffusers = pytest.importorskip("diffusers")
    mixture, x, _ = toy
    sigmas = LEVELS.sigmas(steps, "karras", sigma_max=20, sigma_min=0.05, zero=False)
    start = x[:16] / 4
    options = {"solver_order": order, "lower_order_final": True, "final_sigmas_type": "sigma_min"}
    theirs = scheduler_end(diffusers.DPMSolverMultistepScheduler, mixture, start, sigmas, **options)
    torch.testing.assert_close(dpmpp(mixture, start, sigmas, order=order), theirs, rtol=0, atol=2e-5)
    for kind in ("bh1", "bh2"):
        theirs = scheduler_end(diffusers.UniPCMultistepScheduler, mixture, start, sigmas, solver_type=kind, **options)
        torch.testing.assert_close(unipc(mixture, start, sigmas, order=order, variant=kind), theirs, rtol=0, atol=2e-5)


def test_weights_by_hand():
    # equal steps h: 2M extrapolates by half a difference
    h = 0.3
    assert dpmpp_weights([0.0, h]) == []
    assert dpmpp_weights([0.0, h, 2 * h]) == pytest.approx([(1 - math.exp(-h)) / 2])
    assert unipc_weights([0.0, h]) == ([], pytest.approx([(1 - math.exp(-h)) / 2]))
    # a denoiser quadratic in lam is integrated exactly by the third-order weights: int e^{lam - h} lam^k
    for weights in (dpmpp_weights([-0.7, -0.4, 0.0, h], full_third_order=True), unipc_weights([-0.7, -0.4, 0.0, h])[0]):
        for power, exact in ((1, h - 1 + math.exp(-h)), (2, h * h - 2 * h + 2 - 2 * math.exp(-h))):
            got = sum(w * (0 - at**power) for w, at in zip(weights, (-0.4, -0.7), strict=True))
            assert got == pytest.approx(exact, rel=1e-9)


def test_a_denoiser_cubic_in_lam_is_corrected_exactly():
    """x' = lam^3 - x has the solution p(lam) + c e^-lam with p = lam^3 - 3 lam^2 + 6 lam - 6."""
    points, decay, x = [0.0, 0.3, 0.7, 1.0], math.exp(-0.3), 2.0
    special = [lam**3 - 3 * lam**2 + 6 * lam - 6 for lam in points]
    older, old, new = [points[1] ** 3, points[0] ** 3], points[2] ** 3, points[3] ** 3
    _, correction = unipc_weights(points)
    differences = [old - older[0], old - older[1], new - old]
    got = old + (x - old) * decay + sum(w * d for w, d in zip(correction, differences, strict=True))
    assert got == pytest.approx(special[3] + (x - special[2]) * decay, rel=1e-12)


def test_order_one_is_ddim_and_a_step_to_zero_is_the_clean_estimate(toy):
    mixture, x, _ = toy
    grid = LEVELS.sigmas(6)
    torch.testing.assert_close(dpmpp(mixture, x, grid, order=1), ddim(mixture, x, grid), rtol=0, atol=0)
    for solve in (dpmpp, unipc):
        last = {}
        keep = partial(lambda kept, i, sigma, state, now: kept.update(x0=now.x0), last)
        end = solve(mixture, x, grid, lower_order_final=False, callback=keep)
        torch.testing.assert_close(end, last["x0"], rtol=0, atol=1e-12)
        exact = mixture(x[:3] / 80, torch.tensor(0.7)).x0
        torch.testing.assert_close(solve(mixture, x[:3] / 80, torch.tensor([0.7, 0.0])), exact, rtol=0, atol=1e-12)


def test_predictions_that_disagree_store_what_eps_stands_for():
    """DPM++ 2M under CFG++: x' = D - e^-h D_u + e^-h x - expm1(-h) (D - D_u of the step before) / 2r."""
    guided, plain = [0.5, 0.7, 0.9], [-1.0, -0.6, -0.1]
    sigmas = torch.tensor([4.0, 2.0, 0.8, 0.3], dtype=torch.float64)

    def denoise(state, sigma, cond=None):
        i = int((sigmas == sigma).nonzero())
        return Prediction(torch.full_like(state, guided[i]), (state - plain[i]) / sigma)

    x = guided[0] + (3.0 - plain[0]) / 2  # the first step is Euler's
    h, r = math.log(2 / 0.8), math.log(4 / 2) / math.log(2 / 0.8)
    x = guided[1] + (x - plain[1]) * math.exp(-h) - math.expm1(-h) * (guided[1] - plain[0]) / (2 * r)
    x = guided[2] + (x - plain[2]) * 0.3 / 0.8
    got = dpmpp(denoise, torch.full((1, 1), 3.0, dtype=torch.float64), sigmas)
    assert got.item() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in SAMPLER_NAMES if n.startswith(("dpmpp", "unipc"))])
def test_announcements_callback_condition_and_precision(name):
    mixture, sigmas, seen = Mixture.four_in_six(), LEVELS.sigmas(4), []
    x, y = 80 * torch.randn(3, 6), torch.tensor([0, 2, 4])

    class Shifted:
        """Counts what it is told, and moves the state by 0.5 at the last step."""

        begun, steps = 0, []

        def begin(self, levels):
            self.begun += 1
            self.steps = []

        def begin_step(self, step, state, cond):
            self.steps.append(step)
            return state + 0.5 if step == 3 else state

        def __call__(self, state, sigma, cond=None):
            assert state.dtype == sigma.dtype == torch.float32 and torch.equal(cond, y)
            exact = mixture(state, sigma, cond)
            return Prediction(exact.x0.float(), exact.eps.float())

    denoise = Shifted()
    end = sampler(name)(denoise, x, sigmas, y, callback=lambda i, sigma, state, now: seen.append((i, sigma.item())))
    assert denoise.begun == 1 and denoise.steps == [0, 1, 2, 3]
    assert end.dtype == torch.float32 and end.shape == x.shape
    assert seen == [(i, pytest.approx(s, rel=1e-6)) for i, s in enumerate(sigmas[:4].tolist())]


def test_names_and_mistakes():
    assert set(SAMPLER_NAMES) == set(SAMPLERS)
    mixture, x = Mixture.four_in_six(), torch.zeros(1, 6)
    for solve in (dpmpp, unipc):
        with pytest.raises(UserError, match="order=4 is not allowed"):
            solve(mixture, x, log_grid(3), order=4)
    with pytest.raises(UserError, match="did you mean 'bh2'"):
        unipc(mixture, x, log_grid(3), variant="bh3")
    with pytest.raises(UserError, match="did you mean 'dpmpp_2m'"):
        sampler("dpmpp2m")
