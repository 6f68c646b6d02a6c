"""APG: the rule against a slow reference, its invariants, and its memory over a run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from filtrun.diffusion.guidance import begin, cfg
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.diffusion.samplers import SAMPLERS, ddim, heun
from filtrun.errors import UserError
from filtrun.methods.guidance.apg import APG, apg, clipped, normalized_guidance, project

SIGMA = torch.tensor(0.7, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 0])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference(d_c, d_u, w, eta, r, beta, average):
    """One sample after the other in numpy, in the order of the paper's steps."""
    out, averages = [], []
    for i in range(len(d_c)):
        c, u = d_c[i].ravel(), d_u[i].ravel()
        m = (c - u) + beta * average[i].ravel()
        averages.append(m)
        d = m * min(1.0, r / np.sqrt((m**2).sum())) if r else m
        parallel = (d @ c) / (c @ c) * c
        out.append(c + (w - 1) * ((d - parallel) + eta * parallel))
    return np.reshape(out, d_c.shape), np.reshape(averages, d_c.shape)


@pytest.mark.parametrize(
    "eta, norm, momentum", [(0.0, 2.5, -0.5), (0.3, 0.7, -0.75), (1.0, None, 0.0), (0.0, 0.0, 0.4)]
)
def test_three_steps_as_written_in_the_paper(eta, norm, momentum):
    average, slow = None, np.zeros((4, 3, 5, 5))
    for step in range(3):
        d_c, d_u = randn(4, 3, 5, 5, seed=2 * step), randn(4, 3, 5, 5, seed=2 * step + 1)
        got, average = normalized_guidance(d_c, d_u, 4.0, eta=eta, norm=norm, momentum=momentum, average=average)
        want, slow = reference(d_c.numpy(), d_u.numpy(), 4.0, eta, norm, momentum, slow)
        assert np.abs(got.numpy() - want).max() < 1e-12 and np.abs(average.numpy() - slow).max() < 1e-12


def test_invariants():
    d_c, d_u = randn(6, 1, 8, 8), randn(6, 1, 8, 8, seed=1)
    plain, _ = normalized_guidance(d_c, d_u, 7.5, eta=1.0)
    torch.testing.assert_close(plain, d_u + 7.5 * (d_c - d_u), rtol=0, atol=1e-12)
    past = randn(6, 1, 8, 8, seed=2)
    same, _ = normalized_guidance(d_c, d_u, 1.0, eta=0.4, norm=0.3, momentum=-0.9, average=past)
    assert torch.equal(same, d_c)
    flat, _ = normalized_guidance(d_c, d_u, 5.0, norm=2.0)
    move = (flat - d_c).flatten(1)
    assert ((move * d_c.flatten(1)).sum(1) / (move.norm(dim=1) * d_c.flatten(1).norm(dim=1))).abs().max() < 1e-10
    assert (move.norm(dim=1) / 4).max() <= 2.0 + 1e-12
    alone, _ = normalized_guidance(d_c[:1], d_u[:1], 5.0, norm=2.0)
    assert torch.equal(alone, flat[:1])
    parallel, orthogonal = project(d_u, d_c)
    torch.testing.assert_close(parallel + orthogonal, d_u)
    nothing, whole = project(d_u, torch.zeros_like(d_c))
    assert not nothing.any() and torch.equal(whole, d_u)
    assert torch.equal(clipped(d_u, None), d_u) and torch.equal(clipped(d_u, 1e9), d_u)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "ancestral"])
def test_without_its_parts_it_is_classifier_free_guidance(name):
    mixture, x, sigmas = Mixture.four_in_six(), 80 * randn(5, 6), EDMLevels().sigmas(8)
    rules = apg(mixture, 3.0, eta=1.0, norm=None, momentum=0.0), cfg(mixture, 3.0)
    ours, plain = (SAMPLERS[name](r, x, sigmas, Y, generator=torch.Generator().manual_seed(1)) for r in rules)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def test_prediction_is_consistent_and_counts_two_calls():
    mixture, x = Mixture.four_in_six(), randn(5, 6)
    got = apg(mixture, 4.0)(x, SIGMA, Y)
    assert mixture.nfe == 2
    torch.testing.assert_close(got.x0 + SIGMA * got.eps, x)
    mixture.nfe = 0
    torch.testing.assert_close(apg(mixture, 1.0)(x, SIGMA, Y).x0, mixture(x, SIGMA, Y).x0)
    assert mixture.nfe == 2  # the reference and one call at scale 1
    inside = apg(mixture, 4.0, eta=1.0, norm=None, momentum=0.0, space="eps")(x, SIGMA, Y)
    torch.testing.assert_close(inside.x0, cfg(mixture, 4.0)(x, SIGMA, Y).x0)
    assert (apg(mixture, 4.0, space="eps", norm=None)(x, SIGMA, Y).x0 - got.x0).abs().max() > 0.01


def test_memory_lasts_a_run_and_not_longer():
    mixture, x, sigmas = Mixture.four_in_six(), 80 * randn(5, 6), EDMLevels().sigmas(6)
    guided = apg(mixture, 4.0, norm=None)
    first, second = heun(guided, x, sigmas, Y), heun(guided, x, sigmas, Y)
    assert torch.equal(first, second)
    assert (first - heun(apg(mixture, 4.0, norm=None, momentum=0.0), x, sigmas, Y)).abs().max() > 1e-3
    begin(guided, sigmas)
    start = guided(x, sigmas[0], Y).x0
    assert not torch.equal(guided(x, sigmas[0], Y).x0, start)  # the average has changed
    begin(guided, sigmas)
    assert torch.equal(guided(x, sigmas[0], Y).x0, start)


def test_samples_grow_less_with_the_scale_than_under_cfg():
    """Two Gaussians of equal variance: CFG carries the mean out to m_u + w (m_c - m_u), APG turns it."""
    v, means = 0.1, (torch.tensor([[0.2, 0.0]]), torch.tensor([[1.0, 0.4]]))
    null, conditional = (Mixture(torch.ones(1), m, torch.full((1, 2), v)) for m in means)

    def denoise(state, sigma, cond=None):
        return null(state, sigma) if cond is None else conditional(state, sigma)

    x, y, sigmas = 80 * randn(500, 2), torch.zeros(500, dtype=torch.int64), EDMLevels().sigmas(30)
    by_cfg, by_apg = (
        ddim(rule, x, sigmas, y).norm(dim=1).mean() for rule in (cfg(denoise, 6.0), apg(denoise, 6.0, norm=None))
    )
    assert by_apg < 0.6 * by_cfg


def test_method_guides_and_refuses_bad_options():
    mixture, x = Mixture.four_in_six(), randn(5, 6)
    method = APG(scale=3.0, norm=0.5)
    wrapped = method.guide(SimpleNamespace(), mixture)
    torch.testing.assert_close(wrapped(x, SIGMA, Y).x0, apg(mixture, 3.0, norm=0.5)(x, SIGMA, Y).x0)
    assert method.combines and method.trains == "nothing"
    for wrong in ({"scale": -1.0}, {"norm": -1.0}, {"momentum": 2.0}, {"space": "v"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            APG(**wrong)
