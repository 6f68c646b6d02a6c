"""The closed-form mixture against autograd, scipy and Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from filtrun.diffusion.mixture import Mixture
from filtrun.errors import UserError


@pytest.fixture()
def toy():
    mixture = Mixture.four_in_six()
    mixture.labels, mixture.num_classes, mixture.null_id = torch.tensor([0, 1, 0, 1]), 2, 2
    return mixture, torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sigma", (0.05, 0.6, 5.0))
@pytest.mark.parametrize("label", (None, 0, 1, 2))
def test_score_is_the_gradient_of_the_log_density(toy, sigma, label):
    mixture, x = toy
    cond = None if label is None else torch.full((7,), label)
    x.requires_grad_(True)
    (score,) = torch.autograd.grad(mixture.log_density(x, sigma, cond).sum(), x)
    with torch.no_grad():
        got = mixture(x, sigma, cond)
    torch.testing.assert_close(-got.eps / sigma, score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.x0 + sigma * got.eps, x.detach())


def test_log_density_equals_scipy(toy):
    from scipy.stats import multivariate_normal

    mixture, x = toy
    sigma = torch.linspace(0.1, 2, 7, dtype=torch.float64)
    for i in range(7):
        parts = [
            w * multivariate_normal(m.numpy(), np.diag((v + sigma[i] ** 2).numpy())).pdf(x[i].numpy())
            for w, m, v in zip(mixture.weights.tolist(), mixture.means, mixture.variances, strict=True)
        ]
        assert mixture.log_density(x, sigma)[i].item() == pytest.approx(np.log(sum(parts)), rel=1e-10)
        classes = [(parts[0] + parts[2]) / sum(parts), (parts[1] + parts[3]) / sum(parts)]
        assert mixture.class_log_probs(x, sigma)[i].exp().tolist() == pytest.approx(classes, rel=1e-9)


def test_classifier_gradient_is_the_guidance_direction(toy):
    mixture, x = toy
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(mixture.class_log_probs(x, 0.7)[:, 1].sum(), x)
    with_class, without = mixture.both(x.detach(), 0.7, torch.ones(7, dtype=torch.int64))
    torch.testing.assert_close((with_class.x0 - without.x0) / 0.49, grad, rtol=1e-9, atol=1e-9)


def test_denoiser_is_the_posterior_mean_by_importance_sampling(toy):
    mixture, _ = toy
    samples, labels = mixture.sample(400_000, torch.Generator().manual_seed(1))
    x, sigma = torch.full((6,), 0.2, dtype=torch.float64), 1.5
    for cond in (None, 1):
        keep = samples if cond is None else samples[labels == cond]
        weight = (-(x - keep).square().sum(1) / (2 * sigma**2)).softmax(0)
        got = mixture(x[None], sigma, None if cond is None else torch.tensor([cond])).x0[0]
        torch.testing.assert_close(got, weight @ keep, rtol=0, atol=0.02)


def test_samples_have_the_stated_moments_and_classes(toy):
    mixture, _ = toy
    samples, labels = mixture.sample(50_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(0), mixture.weights @ mixture.means, rtol=0, atol=0.02)
    assert (labels == 0).double().mean().item() == pytest.approx(0.6, abs=0.01)
    assert mixture.sample(100, torch.Generator().manual_seed(0), label=1)[1].unique().tolist() == [1]


def test_zero_variance_is_the_empirical_denoiser_and_images_keep_their_shape():
    points = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    mixture = Mixture(torch.ones(2), points, torch.zeros(2, 4))
    x = torch.tensor([0.2, 0.9, 0.1, 0.6], dtype=torch.float64)
    weight = torch.softmax(-(x - points).square().sum(1) / (2 * 0.25), 0)
    got = mixture(x.reshape(1, 1, 2, 2), 0.5)
    assert got.x0.shape == (1, 1, 2, 2)
    torch.testing.assert_close(got.x0.flatten(), weight @ points.double())


def test_counts_and_mistakes(toy):
    mixture, x = toy
    mixture(x, 1.0)
    mixture.both(x, 1.0, torch.zeros(7, dtype=torch.int64))
    assert mixture.nfe == 3
    with pytest.raises(UserError, match="a mixture needs"):
        Mixture(torch.ones(2), torch.zeros(3, 4), torch.ones(3, 4))
