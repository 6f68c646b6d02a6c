"""Preconditioning identities, the loss, and networks that are perfect by construction."""

from __future__ import annotations

import math

import pytest
import torch

from filtrun.diffusion.denoiser import Denoiser
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import DiscreteLevels, EDMLevels, noise_levels
from filtrun.diffusion.scaling import PREDICTIONS, scaling
from filtrun.errors import UserError

SIGMA = torch.tensor([0.002, 0.03, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)


def perfect(mixture: Mixture, prediction: str, sigma_data: float = 0.5):
    """The network whose output makes the mixture's exact denoiser, from the native state and ln(sigma) / 4."""

    def net(z, c_noise, y):
        sigma = (4 * c_noise).exp()[:, None]
        a, s = 1 / (1 + sigma**2), sigma / (1 + sigma**2).sqrt()
        if prediction == "edm":
            x = z * (sigma**2 + sigma_data**2).sqrt()
            d = mixture(x, sigma.flatten(), y).x0
            root = (sigma**2 + sigma_data**2).sqrt()
            return (d - sigma_data**2 / root**2 * x) * root / (sigma * sigma_data)
        x = z * (1 + sigma) if prediction == "flow" else z / a.sqrt()
        d = mixture(x, sigma.flatten(), y).x0
        eps = (x - d) / sigma
        return {"eps": eps, "x0": d, "v": a.sqrt() * eps - s * d, "flow": eps - d}[prediction]

    return net


@pytest.fixture(scope="module")
def toy():
    mixture = Mixture.four_in_six()
    x0, y = mixture.sample(len(SIGMA), torch.Generator().manual_seed(0))
    x = x0 + SIGMA[:, None] * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return mixture, x0, x, y


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ("edm", "cosine"))
def test_perfect_net_gives_the_exact_denoiser(toy, prediction, kind):
    mixture, _, x, y = toy
    denoise = Denoiser(perfect(mixture, prediction), noise_levels(kind), prediction, num_classes=4, dtype=torch.float64)
    for cond in (y, None):
        got, exact = denoise(x, SIGMA, cond), mixture(x, SIGMA, cond)
        torch.testing.assert_close(got.x0, exact.x0, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(got.eps, exact.eps, rtol=1e-7, atol=1e-7)
    with_class, without = denoise.both(x, SIGMA, y)
    torch.testing.assert_close(with_class.x0, mixture(x, SIGMA, y).x0, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(without.eps, mixture(x, SIGMA).eps, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("time_input", ("c_noise", "timestep", "flow"))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_levels_of_an_announced_run_are_looked_up_and_give_the_same(prediction, time_input):
    seen = []

    def net(z, time, y):
        seen.append(time.clone())
        return (z * time.view(-1, 1)).sin() + y.view(-1, 1)

    net.time_input = time_input
    denoise = Denoiser(net, noise_levels("linear"), prediction, num_classes=4, clip=None)
    x, y = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 4])
    sigmas = torch.tensor([9.0, 2.5, 0.7, 0.0])
    alone = [(denoise(x, s.item(), y), *denoise.both(x, s.clone(), y)) for s in sigmas[:-1]]
    times, seen[:] = list(seen), []
    denoise.begin(sigmas)
    denoise._time = None  # looked up only: computing it again would fail
    found = [(denoise(x, sigmas[i], y), *denoise.both(x, sigmas[i], y)) for i in range(3)]
    for before, after in zip(alone, found, strict=True):
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one.x0, other.x0, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(one.eps, other.eps, rtol=1e-6, atol=1e-6)
    for one, other in zip(times, seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_level_that_was_not_announced_is_computed():
    denoise = Denoiser(lambda z, time, y: time.view(-1, 1) * torch.ones_like(z), noise_levels("edm"), "x0")
    denoise.begin(torch.tensor([80.0, 5.0, 0.0]))
    x = torch.zeros(2, 6)
    for sigma in (torch.tensor(3.0), torch.tensor([3.0, 3.0]), 3.0, torch.tensor([1.0, 3.0])[1]):
        torch.testing.assert_close(denoise(x, sigma).x0, torch.full((2, 6), math.log(3.0) / 4))
    wide = denoise(x.double(), torch.tensor(5.0, dtype=torch.float64))
    assert wide.x0.dtype == torch.float64


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_is_what_x0_and_eps_are_recovered_from(prediction):
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    c = scaling(prediction, SIGMA)
    x = x0 + SIGMA.reshape(-1, 1, 1, 1) * eps
    output = c.target(x0, eps, SIGMA)
    torch.testing.assert_close(c.x0(x, output), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c.eps(x, output, SIGMA), eps, rtol=1e-9, atol=1e-9)


def test_targets_are_the_published_ones():
    x0, eps = torch.tensor([[0.3]]), torch.tensor([[-1.1]])
    sigma = torch.tensor([0.75])
    a, s = 0.8, 0.6  # sqrt(alpha_bar), sqrt(1 - alpha_bar) at sigma = 3/4
    expected = {"eps": -1.1, "x0": 0.3, "v": a * -1.1 - s * 0.3, "flow": -1.1 - 0.3}
    for prediction, value in expected.items():
        assert scaling(prediction, sigma).target(x0, eps, sigma).item() == pytest.approx(value, rel=1e-5)


def test_edm_coefficients_have_unit_variance_in_and_out():
    c = scaling("edm", SIGMA, 0.5)
    torch.testing.assert_close(c.c_in**2 * (SIGMA**2 + 0.25), torch.ones_like(SIGMA))
    # Var[target] = (c_rest^2 sd^2 + c_skip^2 sigma^2) / c_out^2 = 1 (EDM, eq. 115)
    variance = (c.c_rest**2 * 0.25 + (c.c_skip * SIGMA) ** 2) / c.c_out**2
    torch.testing.assert_close(variance, torch.ones_like(SIGMA))
    torch.testing.assert_close(EDMLevels().weight(SIGMA) * c.c_out**2, torch.ones_like(SIGMA))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ("target", "levels"))
@pytest.mark.parametrize("kind", ("edm", "linear"))
def test_loss_is_the_weighted_error_of_a_zero_net(prediction, weighting, kind):
    levels = noise_levels(kind)
    denoise = Denoiser(lambda z, t, y: torch.zeros_like(z), levels, prediction, num_classes=4, weighting=weighting)
    torch.manual_seed(0)
    x0 = torch.randn(5, 1, 4, 4)
    torch.manual_seed(7)
    got = denoise.losses(x0, torch.zeros(5, dtype=torch.int64))
    torch.manual_seed(7)
    sigma, _ = levels.sample_sigma(5)
    eps = torch.randn(5, 1, 4, 4)
    for i in range(5):
        s = sigma[i : i + 1].double()
        c = scaling(prediction, s)
        x = x0[i].double() + s * eps[i].double()
        error = (x0[i] - c.c_skip * x).square().mean()  # of the x0 estimate c_skip x
        weight = levels.weight(s) if weighting == "levels" else c.c_out**-2
        assert got[i].item() == pytest.approx((weight * error).item(), rel=2e-3)
    torch.manual_seed(7)
    assert denoise.loss(x0, torch.zeros(5, dtype=torch.int64)).item() == pytest.approx(got.mean().item())


def test_perfect_net_has_the_loss_of_the_posterior_variance():
    # one Gaussian N(0, v): E|x0 - D|^2 = v s^2 / (v + s^2), so the eps loss is v / (v + s^2)
    mixture = Mixture(torch.ones(1), torch.zeros(1, 6), torch.full((1, 6), 0.4))
    denoise = Denoiser(perfect(mixture, "eps"), EDMLevels(), "eps", dtype=torch.float64)
    torch.manual_seed(0)
    x0, _ = mixture.sample(20_000, torch.Generator().manual_seed(0))
    for s in (0.1, 1.0):
        loss = denoise.loss(x0, sigma=torch.full((20_000,), s, dtype=torch.float64))
        assert loss.item() == pytest.approx(0.4 / (0.4 + s * s), rel=0.01)


class Spy(torch.nn.Module):
    def __init__(self, time_input=None):
        super().__init__()
        self.seen = []
        if time_input:
            self.time_input = time_input

    def forward(self, x, t, y):
        self.seen.append((x, t, y))
        return torch.zeros_like(x)


def test_what_the_net_is_given():
    x, sigma = torch.ones(2, 1, 2, 2), torch.tensor([0.5, 3.0])
    net = Spy()
    Denoiser(net, EDMLevels(), "edm", num_classes=10)(x, sigma)
    z, t, y = net.seen[0]
    assert t.tolist() == pytest.approx([math.log(0.5) / 4, math.log(3) / 4])
    assert y.tolist() == [10, 10] and y.dtype == torch.int64
    assert z[:, 0, 0, 0].tolist() == pytest.approx([1 / math.sqrt(0.5), 1 / math.sqrt(9.25)])
    net = Spy("timestep")
    levels = DiscreteLevels("linear")
    Denoiser(net, levels, "v", num_classes=10)(x, levels.t_to_sigma(torch.tensor([3.0, 700.0])), torch.tensor([1, 10]))
    assert net.seen[0][1].tolist() == [3, 700] and net.seen[0][2].tolist() == [1, 10]
    net = Spy("flow")
    Denoiser(net, EDMLevels(), "flow")(x, sigma, torch.tensor([4, 5]))
    z, t, y = net.seen[0]
    assert t.tolist() == pytest.approx([1 / 3, 3 / 4]) and z[:, 0, 0, 0].tolist() == pytest.approx([2 / 3, 1 / 4])
    assert y.tolist() == [0, 0]  # an unconditional network knows one class: none


def test_labels_are_dropped_at_the_stated_rate():
    net = Spy()
    denoise = Denoiser(net, EDMLevels(), num_classes=3, label_dropout=0.1)
    torch.manual_seed(0)
    y = torch.arange(3).repeat(4000)
    denoise.loss(torch.zeros(12_000, 1, 1, 1), y)
    got = net.seen[0][2]
    assert (got == 3).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(got[got != 3], y[got != 3])
    denoise.losses(torch.zeros(12_000, 1, 1, 1), y, drop_labels=False)
    assert torch.equal(net.seen[1][2], y)


def test_calls_are_counted_per_sample():
    denoise = Denoiser(Spy(), EDMLevels(), num_classes=3)
    x, y = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    denoise(x, 1.0, y)
    denoise.both(x, torch.tensor(1.0), y)
    denoise.loss(x, y)
    assert denoise.nfe == 3
    denoise.reset()
    assert denoise.nfe == 0


def test_state_keeps_its_precision_and_clip_keeps_the_pair_consistent():
    denoise = Denoiser(lambda z, t, y: z.bfloat16() * 100, EDMLevels(), "x0", clip=1.0)
    x = torch.full((2, 1, 2, 2), 3.0)
    out = denoise(x, 2.0)
    assert out.x0.dtype == out.eps.dtype == torch.float32
    assert out.x0.max() == 1
    torch.testing.assert_close(out.x0 + 2 * out.eps, x)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="unknown prediction 'epsilon'"):
        Denoiser(Spy(), EDMLevels(), "epsilon")
    with pytest.raises(UserError, match="reads time steps"):
        Denoiser(Spy("timestep"), EDMLevels(), "eps")
    with pytest.raises(UserError, match="time_input"):
        Denoiser(Spy("timesteps"), DiscreteLevels())
    with pytest.raises(UserError, match="label_dropout=2"):
        Denoiser(Spy(), EDMLevels(), label_dropout=2)
    with pytest.raises(UserError, match="weighting"):
        Denoiser(Spy(), EDMLevels(), weighting="snr")
