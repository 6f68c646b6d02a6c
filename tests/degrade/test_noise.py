"""Noise: moments, seeds, no clipping."""

from __future__ import annotations

import torch

from filtrun.degrade.noise import gaussian, poisson_gaussian, rand, row_noise, uniform


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gaussian_has_the_asked_deviation_and_is_not_clipped() -> None:
    x = torch.zeros(2, 3, 128, 128)
    noisy = gaussian(x, torch.tensor([25 / 255, 0.2]), seeded())
    spread = noisy.flatten(1).std(1)
    assert abs(spread[0] - 25 / 255) < 1e-3 and abs(spread[1] - 0.2) < 2e-3
    assert noisy.min() < -0.3
    assert torch.equal(noisy, gaussian(x, torch.tensor([25 / 255, 0.2]), seeded()))
    assert torch.equal(gaussian(x, torch.zeros(2), seeded()), x)


def test_poisson_gaussian_variance() -> None:
    x = torch.full((1, 1, 400, 400), 0.5)
    noisy = poisson_gaussian(x, 50.0, torch.tensor([0.05]), seeded())
    assert abs(noisy.mean() - 0.5) < 1e-3
    assert abs(noisy.var() - (0.5 / 50 + 0.05**2)) < 2e-4
    counts = poisson_gaussian(x, 50.0, torch.zeros(1), seeded()) * 50
    torch.testing.assert_close(counts, counts.round())


def test_row_noise_is_shared_along_a_row() -> None:
    x = torch.rand(2, 3, 400, 16, generator=seeded())
    added = row_noise(x, 0.1, seeded(1)) - x
    torch.testing.assert_close(added, added[..., :1].expand_as(added), atol=1e-6, rtol=0)
    assert abs(added[..., 0].std() - 0.1) < 6e-3
    assert (added[0, 0, :, 0] - added[0, 1, :, 0]).abs().mean() > 0.05  # each channel has its own


def test_global_generator_is_used_without_one_given() -> None:
    torch.manual_seed(3)
    a = gaussian(torch.zeros(1, 1, 4, 4), torch.ones(1))
    torch.manual_seed(3)
    assert torch.equal(a, torch.randn(1, 1, 4, 4))
    torch.manual_seed(4)
    assert torch.equal(rand((5,), torch.device("cpu"), None), torch.rand(5, generator=seeded(4)))


def test_uniform_range() -> None:
    draws = uniform(10_000, 2.0, 3.0, torch.device("cpu"), seeded())
    assert draws.min() >= 2 and draws.max() < 3 and abs(draws.mean() - 2.5) < 0.01
    assert uniform(4, 0.1, 0.1, torch.device("cpu"), seeded()).tolist() == torch.full((4,), 0.1).tolist()
