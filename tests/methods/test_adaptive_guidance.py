"""AG and LinearAG: what is saved and counted, that stopping means the conditional sampler, and the exact linear fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from filtrun.bench_run import BenchRun
from filtrun.diffusion.denoiser import Denoiser
from filtrun.diffusion.guidance import cfg
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import SAMPLERS, ddim, heun
from filtrun.errors import UserError
from filtrun.methods.guidance.adaptive_guidance import AdaptiveGuidance, adaptive_guidance, agreement
from filtrun.methods.guidance.linear_guidance import LinearGuidance, Trajectories, fit_linear, guided_steps

Y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
STEPS = 12
SIGMAS = EDMLevels().sigmas(STEPS)


@pytest.fixture()
def toy():
    return Mixture.four_in_six(), 80 * torch.randn(
        8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def test_agreement_is_a_cosine():
    a, b = torch.tensor([[[[3.0, 0.0]]], [[[1.0, 1.0]]]]), torch.tensor([[[[0.0, 2.0]]], [[[-2.0, -2.0]]]])
    assert agreement(a, b).tolist() == pytest.approx([0.0, -1.0])


@pytest.mark.parametrize("name, calls", [("ddim", STEPS), ("heun", 2 * STEPS - 1), ("dpmpp_2m", STEPS)])
def test_a_threshold_above_one_is_plain_guidance(toy, name, calls):
    mixture, x = toy
    guided = adaptive_guidance(mixture, 4.0, threshold=1.1)
    end = SAMPLERS[name](guided, x, SIGMAS, Y)
    assert mixture.nfe == 2 * calls and guided.evaluations == 2 * calls
    assert torch.equal(end, SAMPLERS[name](cfg(mixture, 4.0), x, SIGMAS, Y))


@pytest.mark.parametrize("minimum, guided_for", [(1, 1), (5, 5), (0.5, 6), (0.0, 1)])
def test_the_lowest_threshold_leaves_the_minimum(toy, minimum, guided_for):
    mixture, x = toy
    guided = adaptive_guidance(mixture, 4.0, threshold=-1.0, min_steps=minimum)
    ddim(guided, x, SIGMAS, Y)
    assert mixture.nfe == STEPS + guided_for == guided.evaluations
    assert len(guided.cosines) == guided_for
    mixture.nfe = 0
    heun(guided, x, SIGMAS, Y)  # decided once a step: the second call of a guided step is guided too
    assert mixture.nfe == 2 * STEPS - 1 + 2 * guided_for


def test_what_follows_is_the_conditional_sampler(toy):
    mixture, x = toy
    states: list[Tensor] = []
    end = ddim(
        adaptive_guidance(mixture, 4.0, threshold=-1.0, min_steps=4), x, SIGMAS, Y,
        callback=lambda i, sigma, state, now: states.append(state),
    )  # fmt: skip
    torch.testing.assert_close(end, ddim(mixture, states[4], SIGMAS[4:], Y), rtol=0, atol=1e-12)
    guided = ddim(cfg(mixture, 4.0), x, SIGMAS[:5], Y)
    torch.testing.assert_close(states[4], guided, rtol=0, atol=1e-12)


def test_samples_stop_for_themselves_and_calls_are_a_mean(toy):
    """In a batch each sample does what it does alone; the joint call shrinks with the samples still guided."""
    mixture, x = toy
    options = {"threshold": 0.999, "min_steps": 6}
    together = adaptive_guidance(mixture, 4.0, **options)
    end = ddim(together, x, SIGMAS, Y)
    batch = mixture.nfe
    alone, calls = [], []
    for i in range(8):
        mixture.nfe = 0
        alone.append(ddim(adaptive_guidance(mixture, 4.0, **options), x[i : i + 1], SIGMAS, Y[i : i + 1]))
        calls.append(mixture.nfe)
    torch.testing.assert_close(end, torch.cat(alone), rtol=0, atol=1e-10)
    assert len(set(calls)) > 1
    assert batch == pytest.approx(sum(calls) / 8) and STEPS < batch < 2 * STEPS


def test_a_second_run_starts_afresh_and_scale_one_is_conditional(toy):
    mixture, x = toy
    guided = adaptive_guidance(mixture, 4.0, threshold=-1.0, min_steps=3)
    assert torch.equal(ddim(guided, x, SIGMAS, Y), ddim(guided, x, SIGMAS, Y))
    mixture.nfe = 0
    assert torch.equal(ddim(adaptive_guidance(mixture, 1.0), x, SIGMAS, Y), ddim(mixture, x, SIGMAS, Y))
    assert mixture.nfe == 2 * STEPS


def test_network_rows_are_really_saved():
    rows = []

    class Net(torch.nn.Module):
        def forward(self, x, noise, y):
            rows.append(len(x))
            return 0.1 * x + y.reshape(-1, 1, 1, 1).to(x.dtype) * 0.01

    denoiser = Denoiser(Net(), EDMLevels(), num_classes=4)
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 80
    ddim(adaptive_guidance(denoiser, 3.0, threshold=-1.0, min_steps=2), x, SIGMAS, Y)
    assert rows == [16, 16] + [8] * (STEPS - 2)
    assert denoiser.nfe == sum(rows) / 8


# -- LinearAG --------------------------------------------------------------------------------------------------------
def shifted(mean_u: float = 0.0, mean_c: float = 1.0, v: float = 0.4):
    """Conditional = the unconditional Gaussian moved: eps_u is exactly linear in the noises before."""
    null, conditional = (Mixture(torch.ones(1), torch.full((1, 3), m), torch.full((1, 3), v)) for m in (mean_u, mean_c))
    return lambda x, sigma, cond=None: null(x, sigma) if cond is None else conditional(x, sigma)


def trajectories(denoise, scale, n=40, seed=1):
    recorder = Trajectories(denoise, scale, guided_steps(STEPS, 0.5))
    x = 80 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ddim(recorder, x, SIGMAS, torch.zeros(n, dtype=torch.int64))
    return recorder, x


def test_linear_is_exact_where_the_noise_is_linear():
    denoise = shifted()
    recorder, x = trajectories(denoise, 3.0)
    fit = fit_linear(recorder.cond, recorder.uncond)
    for t in range(1, 6):
        predicted = fit.predict(t, recorder.cond, recorder.uncond)
        torch.testing.assert_close(predicted, recorder.uncond[t], rtol=0, atol=1e-8)
    assert fit.r2[1:].min() > 1 - 1e-12
    assert not fit.cond.triu(1).any() and not fit.uncond.triu(0).any()


def test_linear_guidance_is_half_guided_half_conditional():
    denoise = shifted()
    recorder, x = trajectories(denoise, 3.0)
    y = torch.zeros(40, dtype=torch.int64)
    guided = LinearGuidance(denoise, 3.0, fit_linear(recorder.cond, recorder.uncond))
    end = ddim(guided, x, SIGMAS, y)
    assert guided.evaluations == STEPS + 3  # 6 guided steps, every second one with a call of its own
    full = adaptive_guidance(denoise, 3.0, threshold=-1.0, min_steps=6)  # the same without the saving
    torch.testing.assert_close(end, ddim(full, x, SIGMAS, y), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="one evaluation per step"):
        heun(guided, x, SIGMAS, y)
    with pytest.raises(UserError, match="6 guided steps"):
        ddim(guided, x, EDMLevels().sigmas(30), y)


def test_fit_by_hand():
    """Two steps: the second is a least-squares problem in three noises."""
    c, u = (torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    fit = fit_linear(list(c), list(u))
    design = torch.stack([c[0].flatten(), c[1].flatten(), u[0].flatten()], 1)
    want = torch.linalg.solve(design.T @ design, design.T @ u[1].flatten())
    torch.testing.assert_close(torch.cat([fit.cond[1], fit.uncond[1, :1]]), want)
    assert 0 < fit.r2[1] < 0.2


def test_guided_share():
    assert [guided_steps(*pair) for pair in ((20, 0.5), (20, 1.0), (20, 0.0), (3, 0.5))] == [10, 20, 1, 2]


# -- in a run --------------------------------------------------------------------------------------------------------
def test_calls_of_a_run_are_counted_and_the_fit_is_a_stage(tmp_path: Path):
    words = ["model=unet", "model.size=nano", "task.sample_steps=6", "task.sample_batch=5", "task.guidance=2"]
    for variant, lowest in (("threshold", 6 + 2), ("linear", 6 + 2)):
        more = [f"method.adaptive_guidance.variant={variant}", "method.adaptive_guidance.trajectories=6"]
        more += ["method.adaptive_guidance.threshold=-1", "method.adaptive_guidance.min_steps=2"]
        run = BenchRun("adaptive_guidance", [*words, *more], tmp_path).fresh()
        with run.evaluating():
            images, nfe = run.task.generate(run, torch.arange(8), seed=3)
            again, _ = run.task.generate(run, torch.arange(8), seed=3)
        assert images.shape == (8, 1, 8, 8) and torch.equal(images, again)
        assert nfe == lowest and isinstance(nfe, int)
        report = run.methods[0].report(run)
        assert report["calls_saved"] == pytest.approx(1 - lowest / 12)
        if variant == "linear":
            assert [s["cached"] for s in run.stages.used if s["name"] == "linear-guidance"] == [False, True]
            assert report["r2"] > 0.9


def test_bad_options():
    for wrong in (
        {"variant": "search"},
        {"scale": -1.0},
        {"trajectories": 1},
        {"linear_share": 1.5},
        {"min_steps": -1.0},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AdaptiveGuidance(**wrong)
    assert AdaptiveGuidance().report(SimpleNamespace()) == {"scale": 7.5, "variant": "threshold"}
