"""DDIM inversion: one step by hand, and the way back to the image."""

from __future__ import annotations

import pytest
import torch

from filtrun.diffusion.denoiser import Prediction
from filtrun.diffusion.guidance import cfg
from filtrun.diffusion.inversion import ddim_inversion, reconstruction_error
from filtrun.diffusion.mixture import Mixture
from filtrun.diffusion.noise import EDMLevels
from filtrun.methods.guidance.cfgpp import cfgpp

Y = torch.tensor([0, 1, 2, 3] * 8)


@pytest.fixture()
def images():
    mixture = Mixture.four_in_six()
    parts = [mixture.sample(1, torch.Generator().manual_seed(i), label=int(c))[0] for i, c in enumerate(Y)]
    return mixture, torch.cat(parts)


def test_one_step_swaps_the_noises():
    """As the paper writes it for z = sqrt(a) x: off with one noise at the lower level, on with the other."""
    low, high = torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    e_u, e_l = torch.randn_like(x), torch.randn_like(x)
    seen = []

    def denoise(state, sigma, cond=None):
        seen.append(state / (1 + sigma**2).sqrt())
        return Prediction(state - sigma * e_l, e_u)

    got = ddim_inversion(denoise, x, torch.stack([high, low]))
    a_low, a_high = 1 / (1 + low**2), 1 / (1 + high**2)
    z = a_low.sqrt() * x
    torch.testing.assert_close(seen[0], z)  # the network sees the state it has, at the level it goes to
    x0 = (z - (1 - a_low).sqrt() * e_u) / a_low.sqrt()
    torch.testing.assert_close(got * a_high.sqrt(), a_high.sqrt() * x0 + (1 - a_high).sqrt() * e_l)


def test_images_come_back(images):
    mixture, x = images
    error = [reconstruction_error(mixture, x, EDMLevels().sigmas(n), Y)[1].mean().item() for n in (25, 100, 400)]
    assert error[0] > 2.5 * error[1] > 6 * error[2] and error[2] < 0.02


def test_inversion_under_guidance_needs_cfgpp(images):
    """The paper's figure on a toy: images come back closer with CFG++ at 0.6 than with CFG at 7.5."""
    mixture, x = images
    sigmas = EDMLevels().sigmas(50)
    strong = reconstruction_error(cfg(mixture, 7.5), x, sigmas, Y)[1].median()
    manifold = reconstruction_error(cfgpp(mixture, 0.6), x, sigmas, Y)[1].median()
    assert manifold < 0.75 * strong
