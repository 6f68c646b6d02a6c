"""Remapping rules against loops over all references, identity at zero, the filter against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from filtrun.errors import UserError
from filtrun.lut.local_laplacian import fast_local_laplacian, remap, remap_classical, tone
from filtrun.lut.pyramid import laplacian_pyramid


def slow_remap(g: float, detail: float, fact: float, sigma: float, references: int) -> float:
    step = 1 / (references - 1)
    for m in range(references):
        r = m * step
        if abs(g - r) < step:
            curve = fact * (detail - r) * math.exp(-((detail - r) ** 2) * 2 * sigma**2)
            detail += (1 - abs(g - r) / step) * curve
    return detail


def maps(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    gaussian = torch.rand(2, 3, *shape, dtype=torch.float64) * 1.6 - 0.3
    detail = torch.randn(2, 3, *shape, dtype=torch.float64) * 0.2
    fact, sigma = torch.randn(2, 2, 1, *shape, dtype=torch.float64)
    return gaussian, detail, fact, sigma


@pytest.mark.parametrize("references", [2, 3, 10])
def test_remap_equals_the_loop_over_all_references(references: int) -> None:
    gaussian, detail, fact, sigma = maps(5, 6)
    y = remap(gaussian, detail, fact, sigma, references)
    flat = (t.expand_as(detail).flatten().tolist() for t in (gaussian, detail, fact, sigma))
    expected = [slow_remap(*values, references) for values in zip(*flat, strict=True)]
    assert y.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    with_graph = remap(gaussian, detail, fact.requires_grad_(), sigma, references)
    assert torch.allclose(with_graph, y, atol=1e-15)  # strips without a graph change nothing


def test_remap_identity_and_closed_form() -> None:
    gaussian, detail, fact, sigma = maps(4, 7)
    assert torch.equal(remap(gaussian, detail, torch.zeros_like(fact), sigma), detail)
    # at a reference and with sigma 0 only one term is left: l + fact (l - r)
    at = torch.full_like(gaussian, 1 / 3)
    y = remap(at, detail, fact, torch.zeros_like(sigma), references=4)
    assert torch.allclose(y, detail + fact * (detail - 1 / 3), atol=1e-12)
    far = torch.full_like(gaussian, 1.2)  # beyond the last reference by more than a step
    assert torch.equal(remap(far, detail, fact, sigma, references=10), detail)


def test_remap_gradients() -> None:
    gaussian, detail, fact, sigma = (t[:1, :, :2, :2].clone().requires_grad_() for t in maps(4, 4))
    assert torch.autograd.gradcheck(lambda *t: remap(*t, 4), (gaussian, detail, fact, sigma))


def test_tone_curve() -> None:
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = [v + 0.8 * (v - 0.4) * math.exp(-((v - 0.4) ** 2) / (2 * 0.15**2)) for v in x.tolist()]
    assert tone(x, 0.4, 0.8, 0.15).tolist() == pytest.approx(expected, abs=1e-14)
    assert torch.equal(tone(x, 0.4, 0.0, 0.15), x)
    assert torch.allclose(tone(x, 0.4, 0.8, 0.0), x, atol=1e-12)


def test_filter_with_zero_strength_is_the_identity() -> None:
    torch.manual_seed(3)
    x = torch.rand(1, 3, 37, 53, dtype=torch.float64)
    assert torch.allclose(fast_local_laplacian(x, 0.0, 0.2, 3), x, atol=1e-12)
    zero, one = torch.zeros(1, 1, 37, 53, dtype=torch.float64), torch.ones(1, 1, 37, 53, dtype=torch.float64)
    assert torch.allclose(remap_classical(x, zero, one), laplacian_pyramid(x, 1)[0], atol=1e-12)


def test_filter_comes_close_to_its_definition() -> None:
    """Paris et al. remap around each coefficient's own value; many references approach that."""
    torch.manual_seed(4)
    x = torch.rand(1, 1, 11, 10, dtype=torch.float64)
    exact = []
    for value in x.flatten().tolist():  # level 0: the coefficient of the image remapped around the pixel itself
        exact.append(laplacian_pyramid(tone(x, value, 0.7, 0.3), 1)[0].flatten()[len(exact)])
    constant = torch.full_like(x, 0.7), torch.full_like(x, 0.3)
    errors = [
        float((remap_classical(x, *constant, references=m).flatten() - torch.stack(exact)).abs().max())
        for m in (5, 20, 80)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 2e-4
    whole = laplacian_pyramid(fast_local_laplacian(x, 0.7, 0.3, 1, references=20), 1)
    # one level: the output is that level plus what was below it
    below = x - laplacian_pyramid(x, 1)[0]
    level = fast_local_laplacian(x, 0.7, 0.3, 1, references=20) - below
    assert torch.allclose(level, remap_classical(x, *constant, references=20), atol=1e-12)
    assert len(whole) == 2


def test_raises_contrast_or_smooths() -> None:
    torch.manual_seed(5)
    x = 0.5 + 0.05 * torch.randn(1, 1, 64, 64, dtype=torch.float64)
    spread = float(x.std())
    assert float(fast_local_laplacian(x, 1.0, 0.3, 3).std()) > 1.5 * spread
    assert float(fast_local_laplacian(x, -0.8, 0.3, 3).std()) < 0.5 * spread


def test_bad_references() -> None:
    x = torch.rand(1, 1, 9, 9)
    with pytest.raises(UserError, match="references=1 is out of range"):
        remap(x, x, x, x, references=1)
    with pytest.raises(UserError, match="references=0 is out of range"):
        fast_local_laplacian(x, 0.1, 0.1, 1, references=0)
