"""EluCD: the tempered gradient, the schedules and both variants against slow references on a closed-form classifier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from filtrun.bench_run import BenchRun
from filtrun.diffusion.guidance import cfg
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import DiscreteLevels, EDMLevels
from filtrun.diffusion.samplers import SAMPLERS, ancestral, ddim, heun
from filtrun.errors import UserError
from filtrun.methods.guidance.apg import apg
from filtrun.methods.guidance.elucd import (
    EluCD,
    classifier_gradient,
    edm_strength,
    elucd,
    posterior_variance,
    sine_bonus,
    soften,
    tempered_log_prob,
)
from filtrun.methods.guidance.guide_classifier import Guide, softened
from filtrun.metrics.small_cnn import SmallCNN

Y = torch.tensor([0, 1, 2, 3, 0])
SIGMAS = EDMLevels().sigmas(6, sigma_max=5.0)


@pytest.fixture()
def toy():
    mixture = Mixture.four_in_six()
    x = 5 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return mixture, x, lambda state: mixture.class_log_probs(state)  # ln p(c | clean x): logits up to a constant


def exact_gradient(mixture, x, y):
    """grad ln p(y | x) of the clean mixture: own pull minus the mean pull of all components."""
    pull = (mixture.means - x[:, None]) / mixture.variances
    density = torch.exp(-(((x[:, None] - mixture.means) ** 2 / mixture.variances + mixture.variances.log()).sum(2)) / 2)
    share = mixture.weights * density
    share = share / share.sum(1, keepdim=True)
    return pull[torch.arange(len(x)), y] - (share[:, :, None] * pull).sum(1)


def test_gradient_is_that_of_the_closed_form(toy):
    mixture, x, classifier = toy
    x = 0.2 * x
    got = classifier_gradient(classifier, x, Y)
    assert got.dtype == torch.float64 and not got.requires_grad
    torch.testing.assert_close(got, exact_gradient(mixture, x, Y), rtol=1e-4, atol=1e-4)  # the classifier is float32
    null = torch.tensor([0, 4, 2, 4, 0])
    partly = classifier_gradient(classifier, x, null)
    torch.testing.assert_close(partly[::2], got[::2])
    assert not partly[1::2].any()


def test_temperatures():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(tempered_log_prob(logits, y), logits.log_softmax(1)[torch.arange(4), y])
    slow = torch.stack(
        [torch.log(torch.exp(1.3 * z[c]) / torch.exp(0.65 * z).sum()) for z, c in zip(logits, y, strict=True)]
    )
    torch.testing.assert_close(tempered_log_prob(logits, y, 1.3, 0.65), slow)
    assert tempered_log_prob(1e4 * logits, y, 1.0, 0.5).isfinite().all()
    net = nn.Linear(3, 5).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    only_logit = classifier_gradient(lambda v: net(v.double()), x, y, 1.0, 0.0)
    torch.testing.assert_close(only_logit, net.weight[y].detach(), rtol=1e-6, atol=1e-6)


def test_softplus_replaces_every_relu_and_goes_to_it():
    torch.manual_seed(0)
    net = SmallCNN(10, 1, 8).eval()
    x = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        sharp, smooth = softened(net, 1e4), softened(net, 3.0)
        assert (sharp(x) - net(x)).abs().max() < 1e-3 < (smooth(x) - net(x)).abs().max()
    assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == 3  # the original is as it was
    assert not any(isinstance(m, nn.ReLU) for m in smooth.modules())
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(2, 2), shared, nn.Sequential(shared))
    assert soften(twice, 2.0) == 2
    assert twice(torch.ones(1, 2)).shape == (1, 2) and twice[1].beta == 2.0
    with pytest.raises(UserError, match="no nn.ReLU"):
        softened(nn.Linear(2, 2), 3.0)
    assert softened(nn.Linear(2, 2), None).weight.shape == (2, 2)


def test_what_the_classifier_reads():
    seen: list[torch.Tensor] = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)

    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    for inputs in ("unit", "imagenet", "signed"):
        Guide(Net(), inputs)(x)
    assert seen[0].flatten().tolist() == [0, 0.5, 1] and torch.equal(seen[2], x)
    assert seen[1].flatten().tolist() == pytest.approx([-0.485 / 0.229, 0.044 / 0.224, 0.594 / 0.225], rel=1e-5)


def test_schedules():
    assert sine_bonus(0, 20, 0.7, 0.3) == 0
    assert sine_bonus(4, 20, 0.7, 0.3) == pytest.approx(sine_bonus(16, 20, 0.7, 0.3))
    assert sine_bonus(10, 20, 0.7, 0.3) == pytest.approx(0.21)
    levels = DiscreteLevels(steps=50)
    a = levels.alpha_bar
    sigma = ((1 - a) / a).sqrt()
    for t in (1, 20, 49):  # DDPM's beta tilde
        beta = 1 - a[t] / a[t - 1]
        want = beta * (1 - a[t - 1]) / (1 - a[t])
        assert posterior_variance(sigma[t].item(), sigma[t - 1].item()) == pytest.approx(want.item())
    assert posterior_variance(1.0, 0.0) == 0
    assert edm_strength(0, 10, 0.004, 0.3) == pytest.approx(0.004)
    assert edm_strength(5, 10, 0.004, 0.3) == pytest.approx(0.004 * 6 / 11 + 0.0012)
    assert edm_strength(9, 10, 1e-6, 0.0) == 1e-5 and edm_strength(9, 10, 0.0, 0.3) == 0


def test_ddpm_variant_by_hand(toy):
    """In the paper's own variables z = sqrt(a) x: mean + (variance + bonus) gradient, then the noise."""
    mixture, x, classifier = toy
    gamma, discount, scale, steps = 0.3, 0.5, 0.8, len(SIGMAS) - 1
    guided = elucd(mixture, classifier, scale=scale, margin_discount=discount, gamma=gamma)
    got = ancestral(guided, x, SIGMAS, Y, generator=torch.Generator().manual_seed(9))
    generator, z, largest = torch.Generator().manual_seed(9), x / (1 + SIGMAS[0] ** 2).sqrt(), 0.0
    a = 1 / (1 + SIGMAS**2)
    for i in range(steps):
        t, low = steps - 1 - i, a[i + 1]
        x0 = mixture(z / a[i].sqrt(), SIGMAS[i], Y).x0
        beta = 1 - a[i] / low
        mean = low.sqrt() * beta / (1 - a[i]) * x0 + (a[i] / low).sqrt() * (1 - low) / (1 - a[i]) * z
        variance = (beta * (1 - low) / (1 - a[i])).item()
        largest = max(largest, variance)
        bonus = max(0.0, gamma * largest * math.sin(math.pi * t / steps))
        mean = mean + (variance + bonus) * scale * classifier_gradient(classifier, x0, Y, 1.0, discount)
        z = mean
        if t:
            z = z + variance**0.5 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(got, z, rtol=0, atol=1e-6)
    assert guided.calls == steps - 1  # nothing is left to move at the last step
    plain = ancestral(mixture, x, SIGMAS, Y, generator=torch.Generator().manual_seed(9))
    assert (got - plain).abs().max() > 0.05


def test_edm_variant_by_hand(toy):
    mixture, x, classifier = toy
    guided = elucd(mixture, classifier, "edm", max_guidance=0.1, add_factor=0.3, uncond_temperature=0.0)
    got, state, s = heun(guided, x, SIGMAS, Y), x, SIGMAS.tolist()
    for i in range(len(s) - 1):
        moved = []
        for row, c in zip(state, Y, strict=True):
            length = row.square().mean().sqrt()
            g = classifier_gradient(classifier, (row / max(length, 1.0))[None], c[None], 1.0, 0.0)[0]
            moved.append(row + g / g.square().mean().sqrt() * length * edm_strength(i, len(s) - 1, 0.1, 0.3))
        hat = torch.stack(moved)
        slope = (hat - mixture(hat, s[i], Y).x0) / s[i]
        state = hat + (s[i + 1] - s[i]) * slope
        if s[i + 1]:
            state = hat + (s[i + 1] - s[i]) * (slope + (state - mixture(state, s[i + 1], Y).x0) / s[i + 1]) / 2
    torch.testing.assert_close(got, state, rtol=0, atol=1e-5)
    assert guided.calls == len(s) - 1  # once a step, although Heun calls the network twice


@pytest.mark.parametrize("name", ["ddim", "heun", "ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("off", [{"variant": "ddpm", "scale": 0.0}, {"variant": "edm", "max_guidance": 0.0}])
def test_switched_off_it_is_the_plain_sampler_bit_for_bit(toy, name, off):
    mixture, x, classifier = toy
    guided = elucd(mixture, classifier, **off)
    ends = [SAMPLERS[name](d, x, SIGMAS, Y, generator=torch.Generator().manual_seed(1)) for d in (guided, mixture)]
    assert torch.equal(*ends) and guided.calls == 0
    nothing = [SAMPLERS[name](d, x, SIGMAS, generator=torch.Generator().manual_seed(1)) for d in (guided, mixture)]
    assert torch.equal(*nothing)  # no class, nothing to guide to


def test_samples_are_likelier_for_their_class(toy):
    mixture, _, classifier = toy
    x = 80 * torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, sigmas = torch.arange(200) % 4, EDMLevels().sigmas(20)

    def blurred(state, sigma, cond=None):  # a conditional model that mixes classes up
        return cfg(mixture, 0.5)(state, sigma, cond)

    def likelihood(denoise):
        end = ancestral(denoise, x, sigmas, y, generator=torch.Generator().manual_seed(1))
        return mixture.class_log_probs(end).gather(1, y[:, None]).mean()

    assert likelihood(elucd(blurred, classifier, scale=0.05)) > likelihood(blurred) + 0.02


def test_it_nests_with_a_rule_of_classifier_free_guidance(toy):
    """Outside, the gradient is taken at the guided image; a step is announced to both."""
    mixture, x, classifier = toy
    inner = apg(mixture, 3.0, norm=1.0)
    outer = elucd(inner, classifier, scale=0.5)
    grid = SIGMAS[:3]
    got = ddim(outer, x, grid, Y)
    first = apg(mixture, 3.0, norm=1.0)(x, grid[0], Y)
    moved = first.x0 + grid[1] * first.eps
    variance = posterior_variance(grid[0].item(), grid[1].item())
    bonus = sine_bonus(1, 2, variance, 0.3)
    moved = moved + (variance + bonus) * 0.5 * (1 + grid[1] ** 2).sqrt() * classifier_gradient(
        classifier, first.x0, Y, 1.0, 0.5
    )
    assert inner.step == 1 and inner.average is not None
    average = mixture(x, grid[0], Y).x0 - mixture(x, grid[0]).x0
    again = apg(mixture, 3.0, norm=1.0)
    again.begin(grid)
    again.average = average
    second = again(moved, grid[1], Y)
    torch.testing.assert_close(got, second.x0 + grid[2] * second.eps, rtol=0, atol=1e-6)


def test_a_sampler_that_says_nothing_is_refused(toy):
    mixture, x, classifier = toy
    for variant in ("ddpm", "edm"):
        guided = elucd(mixture, classifier, variant)
        guided.begin(SIGMAS)
        torch.testing.assert_close(guided(x, SIGMAS[0], Y).x0, mixture(x, SIGMAS[0], Y).x0)
        with pytest.raises(UserError, match="begin_step"):
            guided(x, SIGMAS[1], Y)
    with pytest.raises(UserError, match="variant"):
        elucd(mixture, classifier, "dit")


def test_no_gradient_reaches_the_denoiser(toy):
    _, x, classifier = toy
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    mixture = Mixture.four_in_six()

    def denoise(state, sigma, cond=None):
        return type(mixture(state, sigma, cond))(
            weight * mixture(state, sigma, cond).x0, mixture(state, sigma, cond).eps
        )

    guided = elucd(denoise, classifier)
    guided.begin(SIGMAS)
    guided.begin_step(0, x, Y)
    guided(x, SIGMAS[0], Y)
    assert guided.shift is not None and not guided.shift.requires_grad and weight.grad is None


# -- in a run --------------------------------------------------------------------------------------------------------
def test_the_classifier_is_a_stage_and_not_the_judge(tmp_path: Path):
    words = ["model=unet", "model.size=nano", "task.sample_steps=4", "task.judge_steps=12"]
    bench = BenchRun("elucd", words, tmp_path)
    run = bench.fresh()
    method: Any = run.methods[0]
    with run.evaluating():
        images, nfe = run.task.generate(run, torch.arange(6), seed=0)
    assert nfe == 4 and images.shape == (6, 1, 8, 8)  # task.guidance is 1: the classifier costs no network call
    assert method.report(run) == {"classifier": "small_cnn", "classifier_calls": 3}
    run.task.prepare(run)
    assert {s["name"] for s in run.stages.used} == {"guide-classifier", "judge", "features"}
    judge = dict(run.shared["judge"].net.named_parameters())
    assert not torch.equal(method.net.net.head.weight, judge["head.weight"])
    assert not any(p.requires_grad for p in method.net.net.parameters())
    off = BenchRun("elucd", [*words, "method.elucd.scale=0"], tmp_path).fresh()
    with off.evaluating():
        plain, _ = off.task.generate(off, torch.arange(6), seed=0)
    assert (images - plain).abs().max() > 1e-4
    assert [s["cached"] for s in off.stages.used] == [True]


def test_bad_options(tmp_path: Path):
    for wrong in ({"variant": "dit"}, {"softplus_beta": 0.0}, {"scale": -1.0}, {"classifier_input": "rgb"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            EluCD(**wrong)
    with pytest.raises(UserError, match="classifier_weights"):
        BenchRun("elucd", ["model=unet", "method.elucd.classifier_input=imagenet"], tmp_path).fresh()
