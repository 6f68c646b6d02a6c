"""Noise levels against closed forms and against the schedules of diffusers."""

from __future__ import annotations

import math

import pytest
import torch

from filtrun.diffusion.noise import DiscreteLevels, EDMLevels, noise_levels
from filtrun.errors import UserError

DISCRETE = ("linear", "scaled_linear", "cosine")


@pytest.mark.parametrize("kind", DISCRETE)
def test_alpha_bar_equals_diffusers(kind):
    from filtrun.compat import torchvision

    torchvision()
    from diffusers import DDIMScheduler

    if kind == "cosine":
        peer = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    elif kind == "linear":
        peer = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    else:
        peer = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = DiscreteLevels(kind).alpha_bar
    torch.testing.assert_close(ours.float(), peer.alphas_cumprod, rtol=1e-3, atol=1e-7)  # theirs is a float32 product


def test_known_ends():
    # prod(1 - linspace(1e-4, 0.02, 1000)) = 4.0358e-5; Stable Diffusion's sigmas run from 0.0292 to 14.6146
    assert DiscreteLevels("linear").alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert DiscreteLevels("linear").sigma_min == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)), rel=1e-9)
    levels = DiscreteLevels("scaled_linear")
    assert (levels.sigma_min, levels.sigma_max) == pytest.approx((0.02917, 14.6146), rel=1e-4)


def test_cosine_follows_the_published_curve_and_caps_beta():
    a = DiscreteLevels("cosine").alpha_bar
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000

    def curve(u):
        return torch.cos((torch.as_tensor(u, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2

    torch.testing.assert_close(a[:999], curve(t) / curve(0.0), rtol=1e-9, atol=0)
    assert (1 - a[-1] / a[-2]).item() == pytest.approx(0.999)


def test_edm_draws_have_the_published_log_normal_and_weight():
    torch.manual_seed(0)
    sigma, weight = EDMLevels().sample_sigma(40_000)
    ln = sigma.log()
    assert ln.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert ln.std().item() == pytest.approx(1.2, abs=0.02)
    torch.testing.assert_close(weight, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    assert EDMLevels().weight(torch.tensor(0.5)).item() == pytest.approx(8.0)  # 2 sd^2 / sd^4


@pytest.mark.parametrize("kind", DISCRETE)
def test_discrete_draws_are_training_levels_and_weigh_eps(kind):
    torch.manual_seed(0)
    levels = DiscreteLevels(kind)
    sigma, weight = levels.sample_sigma(4000)
    a = levels.alpha_bar
    gap = (sigma.double()[:, None].log() - ((1 - a) / a).sqrt().log()).abs().min(1)
    assert gap.values.max() < 1e-5
    assert gap.indices.double().mean().item() == pytest.approx(499.5, abs=15)
    torch.testing.assert_close(weight * sigma**2, torch.ones(4000))


def test_draws_come_from_the_global_generator():
    for levels in (EDMLevels(), DiscreteLevels("cosine")):
        torch.manual_seed(3)
        first = levels.sample_sigma(5)[0]
        torch.manual_seed(3)
        assert torch.equal(first, levels.sample_sigma(5)[0])


@pytest.mark.parametrize("kind", ("edm", *DISCRETE))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_time_and_sigma_are_inverse(kind, dtype):
    levels = noise_levels(kind)
    sigma = levels.sigmas(37, "log", zero=False).to(dtype)
    torch.testing.assert_close(levels.t_to_sigma(levels.sigma_to_t(sigma)), sigma, rtol=2e-4, atol=0)


@pytest.mark.parametrize("kind", DISCRETE)
def test_discrete_time_of_training_levels_is_whole(kind):
    levels = DiscreteLevels(kind)
    t = torch.arange(1000)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(levels.sigma_to_t(levels.t_to_sigma(t.to(dtype))), t.to(dtype))


def test_interpolation_is_linear_or_nearest_in_ln_sigma():
    a = DiscreteLevels("linear").alpha_bar
    ln = ((1 - a) / a).log() / 2
    sigma = (0.7 * ln[100] + 0.3 * ln[101]).exp()[None]
    assert DiscreteLevels("linear").sigma_to_t(sigma).item() == pytest.approx(100.3, abs=1e-6)
    assert DiscreteLevels("linear", interpolation="nearest").sigma_to_t(sigma).item() == 100
    # outside the schedule the ends answer
    assert DiscreteLevels("linear").sigma_to_t(torch.tensor([1e-5, 1e5])).tolist() == [0, 999]


def test_karras_grid_is_equation_five():
    grid = EDMLevels().sigmas(18)
    slow = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0.0]
    assert grid.tolist() == pytest.approx(slow, rel=1e-9)


def test_log_and_time_grids():
    grid = EDMLevels().sigmas(4, "log", zero=False)
    assert grid.tolist() == pytest.approx([80 * (0.002 / 80) ** (i / 4) for i in range(5)], rel=1e-12)
    torch.testing.assert_close(EDMLevels().sigmas(4, "uniform_t", zero=False), grid, rtol=1e-12, atol=0)
    levels = DiscreteLevels("scaled_linear")
    ours = levels.sigmas(4, "uniform_t")
    a = levels.alpha_bar
    assert ours.tolist() == pytest.approx([*((1 - a) / a).sqrt()[[999, 666, 333, 0]].tolist(), 0.0], rel=1e-9)


def test_grids_start_where_asked():
    assert DiscreteLevels("cosine").sigmas(5)[0].item() == pytest.approx(80)
    assert DiscreteLevels("cosine").sigmas(5, "uniform_t")[0].item() == pytest.approx(160)
    assert DiscreteLevels("cosine").sigma_max == pytest.approx(20291, rel=1e-4)
    assert DiscreteLevels("linear").sigmas(5, "uniform_t")[0].item() == pytest.approx(157.407, rel=1e-5)
    assert DiscreteLevels("cosine").sigmas(5, sigma_max=10.0, sigma_min=0.1, zero=False)[
        [0, -1]
    ].tolist() == pytest.approx([10, 0.1])
    assert EDMLevels().sigmas(1).tolist() == pytest.approx([80, 0])


def test_start_has_the_variance_of_the_forward_process():
    noise = torch.ones(1)
    assert EDMLevels().start(noise, 80.0).item() == 80
    assert DiscreteLevels("scaled_linear").start(noise, torch.tensor(14.6146)).item() == pytest.approx(
        14.6488, rel=1e-4
    )


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        noise_levels("cosin")
    with pytest.raises(UserError, match="did you mean 'karras'"):
        EDMLevels().sigmas(5, "karas")
    with pytest.raises(UserError, match="steps=0"):
        EDMLevels().sigmas(0)
    with pytest.raises(UserError, match="sigma_min=0.0"):
        EDMLevels().sigmas(5, sigma_min=0.0)
    with pytest.raises(UserError, match="interpolation"):
        DiscreteLevels("linear", interpolation="cubic")
