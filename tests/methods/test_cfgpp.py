"""CFG++: equal to CFG with its own scale step by step, and each solver against the steps of the paper by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from filtrun.diffusion.guidance import Guided, cfg
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import SAMPLERS, ancestral, ancestral_step, ddim
from filtrun.errors import UserError
from filtrun.methods.guidance.cfgpp import CFGpp, cfgpp, equivalent_scale
from filtrun.tasks.diffuse import Diffuse

Y = torch.tensor([0, 1, 2, 3, 0, 1])
SIGMAS = EDMLevels().sigmas(7)


@pytest.fixture()
def toy():
    return Mixture.four_in_six(), 80 * torch.randn(
        6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


class Scheduled(Guided):
    """Classifier-free guidance with a scale for each step."""

    def __init__(self, inner, scales):
        self.scales = scales
        super().__init__(inner)

    def guide(self, x, sigma, cond):
        return cfg(self.inner, float(self.scales[self.step]))(x, sigma, cond)


@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0, 1.7])
def test_ddim_is_cfg_with_a_scale_of_its_own(toy, scale):
    mixture, x = toy
    scales = [equivalent_scale(scale, a, b) for a, b in zip(SIGMAS[:-1], SIGMAS[1:], strict=True)]
    assert float(scales[-1]) == scale  # at the step to 0
    ours = ddim(cfgpp(mixture, scale), x, SIGMAS, Y)
    torch.testing.assert_close(ours, ddim(Scheduled(mixture, scales), x, SIGMAS, Y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps, mean", [(10, 0.96), (50, 3.6), (200, 13.6)])
def test_more_steps_guide_more(steps, mean):
    sigmas = EDMLevels().sigmas(steps)[:-1]  # without the step to 0
    assert float(equivalent_scale(0.6, sigmas[:-1], sigmas[1:]).mean()) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_scale_zero_is_the_unconditional_sampler_bit_for_bit(toy, name):
    mixture, x = toy
    run = [
        SAMPLERS[name](rule, x, SIGMAS, cond, generator=torch.Generator().manual_seed(2))
        for rule, cond in ((cfgpp(mixture, 0.0), Y), (mixture, None))
    ]
    assert torch.equal(*run)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_equal_predictions_make_it_the_plain_solver(toy, name):
    mixture, x = toy
    null = torch.full((6,), mixture.null_id)
    run = [
        SAMPLERS[name](rule, x, SIGMAS, null, generator=torch.Generator().manual_seed(2))
        for rule in (cfgpp(mixture, 0.6), mixture)
    ]
    torch.testing.assert_close(*run, rtol=0, atol=1e-9)


def test_last_step_and_cost(toy):
    mixture, x = toy
    d_c, d_u = mixture.both(x, 0.3, Y)
    end = ddim(cfgpp(mixture, 0.6), x, torch.tensor([0.3, 0.0], dtype=torch.float64), Y)
    torch.testing.assert_close(end, d_u.x0 + 0.6 * (d_c.x0 - d_u.x0))
    mixture.nfe = 0
    now = cfgpp(mixture, 1.0)(x, torch.tensor(0.3, dtype=torch.float64), Y)
    assert mixture.nfe == 2
    assert torch.equal(now.eps, d_u.eps) and not torch.allclose(now.eps, d_c.eps)  # not conditional DDIM
    torch.testing.assert_close(now.x0_of_eps(x, 0.3), d_u.x0)


def test_euler_ancestral_by_hand(toy):
    mixture, x = toy
    got = ancestral(cfgpp(mixture, 0.6), x, SIGMAS[:3], Y, generator=torch.Generator().manual_seed(4))
    generator, state = torch.Generator().manual_seed(4), x
    for a, b in zip(SIGMAS[:2].tolist(), SIGMAS[1:3].tolist(), strict=True):
        down, up = ancestral_step(a, b)
        d_c, d_u = (p.x0 for p in mixture.both(state, a, Y))
        state = d_u + 0.6 * (d_c - d_u) + (state - d_u) / a * down
        state = state + up * torch.randn(state.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(got, state, rtol=0, atol=1e-10)


def test_dpmpp_2m_by_hand(toy):
    """First and last step are Euler's; between them the history is the unconditional estimate."""
    mixture, x = toy
    s, state, old = SIGMAS.tolist(), x, None
    for i in range(len(s) - 1):
        d_c, d_u = (p.x0 for p in mixture.both(state, s[i], Y))
        d = d_u + 0.6 * (d_c - d_u)
        if old is None or s[i + 1] == 0:
            state = d + (state - d_u) / s[i] * s[i + 1]
        else:
            h, r = math.log(s[i] / s[i + 1]), math.log(s[i - 1] / s[i]) / math.log(s[i] / s[i + 1])
            state = d - math.exp(-h) * d_u - math.expm1(-h) * (d - old) / (2 * r) + math.exp(-h) * state
        old = d_u
    got = SAMPLERS["dpmpp_2m"](cfgpp(mixture, 0.6), x, SIGMAS, Y)
    torch.testing.assert_close(got, state, rtol=0, atol=1e-10)


def test_dpmpp_2s_ancestral_by_hand(toy):
    mixture, x = toy
    generator, state = torch.Generator().manual_seed(4), x
    for a, b in zip(SIGMAS[:3].tolist(), SIGMAS[1:4].tolist(), strict=True):
        down, up = ancestral_step(a, b)
        h = math.log(a / down)
        _, u = (p.x0 for p in mixture.both(state, a, Y))
        middle = a * math.exp(-h / 2)
        inside = math.exp(-h / 2) * state - math.expm1(-h / 2) * u
        c2, u2 = (p.x0 for p in mixture.both(inside, middle, Y))
        state = u2 + 0.6 * (c2 - u2) - math.exp(-h) * u2 + down / a * state
        state = state + up * torch.randn(state.shape, generator=generator, dtype=torch.float64)
    got = SAMPLERS["dpmpp_2s_ancestral"](
        cfgpp(mixture, 0.6), x, SIGMAS[:4], Y, generator=torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(got, state, rtol=0, atol=1e-10)


def test_the_first_estimate_stays_in_range(toy):
    """Smoother early steps: norm of the first clean estimate over that of the data."""
    mixture, x = toy
    data = mixture.sample(1000, torch.Generator().manual_seed(1))[0].norm(dim=1).mean()
    calm, wild = (
        rule(x, SIGMAS[0], Y).x0.norm(dim=1).mean() / data for rule in (cfgpp(mixture, 0.6), cfg(mixture, 7.5))
    )
    assert calm < 1.2 < 2 < wild


def test_method_guides_reports_and_refuses_bad_options(toy):
    mixture, x = toy
    method = CFGpp(scale=0.4)
    wrapped = method.guide(SimpleNamespace(), mixture)
    torch.testing.assert_close(wrapped(x, SIGMAS[0], Y).x0, cfgpp(mixture, 0.4)(x, SIGMAS[0], Y).x0)
    report = CFGpp().report(SimpleNamespace(task=Diffuse(sample_steps=50)))
    assert report["mean_equivalent_scale"] == pytest.approx(3.6, rel=0.02)
    with pytest.raises(UserError, match="scale"):
        CFGpp(scale=-0.1)
