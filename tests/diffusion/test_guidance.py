"""Classifier-free guidance and what rules are told: algebra, cost, announcements, the case with a known law."""

from __future__ import annotations

import pytest
import torch

from filtrun.diffusion.denoiser import Denoiser
from filtrun.diffusion.guidance import Guided, begin, begin_step, both, cfg
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import SAMPLERS, heun
from filtrun.errors import UserError

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


def test_guidance_by_the_exact_noisy_classifier_is_classifier_free_guidance(toy):
    """sigma^2 grad ln p(c | x, sigma) = D_c - D_u, so D_u plus w times it is CFG with scale w."""
    mixture, x, _ = toy
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    state = x.clone().requires_grad_(True)
    chosen = mixture.class_log_probs(state, SIGMA).gather(1, y[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, state)
    by_classifier = mixture(x, SIGMA).x0 + 2.5 * SIGMA**2 * gradient
    torch.testing.assert_close(cfg(mixture, 2.5)(x, SIGMA, y).x0, by_classifier, rtol=0, atol=1e-12)


class Diary(Guided):
    """Writes down what it is told."""

    def reset(self):
        self.told = []

    def begin_step(self, step, x, cond=None):
        x = super().begin_step(step, x, cond)
        self.told.append(step)
        return x

    def guide(self, x, sigma, cond):
        self.told.append(round(sigma.item(), 6))
        return self.inner(x, sigma, cond)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_says_where_its_steps_begin(toy, name):
    mixture, x, y = toy
    inner = Diary(mixture)
    outer = Diary(inner)
    sigmas = EDMLevels().sigmas(4)
    for _ in range(2):  # the second run starts afresh
        SAMPLERS[name](outer, 80 * x, sigmas, y, generator=torch.Generator().manual_seed(0))
        assert [word for word in outer.told if isinstance(word, int)] == [0, 1, 2, 3]
        assert inner.told == outer.told and outer.told[0] == 0 and outer.step == 3
        for i, sigma in enumerate(sigmas[:-1].tolist()):  # each step starts with a call at its own level
            assert outer.told[outer.told.index(i) + 1] == round(sigma, 6) or "unipc" in name or "dpmpp" in name
        assert outer.steps == 4 and outer.sigmas == pytest.approx(sigmas.tolist())


def test_a_sampler_that_says_nothing_makes_one_call_a_step(toy):
    mixture, x, y = toy
    guided = Diary(mixture)
    with pytest.raises(UserError, match="begin"):
        _ = guided.steps
    begin(guided, torch.tensor([2.0, 1.0, 0.0]))
    for step, sigma in enumerate((2.0, 1.0)):
        guided(x, torch.tensor(sigma), y)
        guided(x, torch.tensor(sigma))  # an unconditional call is no step
        assert guided.step == step
    assert guided.told == [2.0, 1.0]
    assert begin_step(mixture, 0, x, y) is x  # nothing happens to a plain denoiser
    begin(mixture, torch.ones(2))


def test_unconditional_predictions_for_some_rows_only(toy):
    mixture, x, y = toy
    rows = torch.tensor([1, 4])
    full = both(mixture, x, SIGMA, y)
    levels = torch.linspace(0.5, 1, 6, dtype=torch.float64)

    class Net(torch.nn.Module):
        def forward(self, state, noise, classes):
            return state * 0.1 + classes.reshape(-1, 1).to(state.dtype) + noise.reshape(-1, 1)

    denoiser = Denoiser(Net(), EDMLevels(), num_classes=4, dtype=torch.float64)
    for denoise in (mixture, denoiser, lambda state, sigma, cond=None: mixture(state, sigma, cond)):
        counted = getattr(denoise, "nfe", None)
        for sigma in (SIGMA, levels):
            whole, part = both(denoise, x, sigma, y), both(denoise, x, sigma, y, rows)
            torch.testing.assert_close(part[0].x0, whole[0].x0)
            torch.testing.assert_close(part[1].x0, whole[1].x0[rows])
            torch.testing.assert_close(part[1].eps, whole[1].eps[rows])
        if denoise is denoiser:
            assert counted == 0 and denoiser.nfe == pytest.approx(2 * (2 + 1 + 2 / 6))
    assert full[1].x0.shape == x.shape


def test_x0_of_eps_is_x0_for_a_plain_denoiser(toy):
    mixture, x, y = toy
    now = mixture(x, SIGMA, y)
    torch.testing.assert_close(now.x0_of_eps(x, SIGMA), now.x0)
    torch.testing.assert_close(now.x0_of_eps(x, 0.8), now.x0)
    levels = torch.full((6,), 0.8, dtype=torch.float64)
    torch.testing.assert_close(now.x0_of_eps(x, levels), now.x0)
