"""FID, KID, precision and recall against closed forms, scipy and slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from filtrun.errors import UserError
from filtrun.metrics.distribution import (
    FeatureStats,
    fid,
    frechet_distance,
    kid,
    polynomial_mmd,
    precision_recall,
)


def draw(n, dim, seed, scale=1.0, shift=0.0):
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / dim**0.5
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ mix + shift


def fid_by_scipy(x, y):
    from scipy.linalg import sqrtm

    c1, c2 = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    return shift + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))


def test_fid_equals_scipy():
    x, y = draw(300, 20, 0), draw(200, 20, 1, 1.4, 0.3)
    assert fid(x, y) == pytest.approx(fid_by_scipy(x, y), rel=1e-9)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-9)


def test_fid_of_gaussians_in_closed_form():
    # commuting covariances: |dm|^2 + sum (sqrt a - sqrt b)^2
    q, _ = torch.linalg.qr(draw(12, 12, 5))
    a, b = torch.linspace(0.1, 3, 12, dtype=torch.float64), torch.linspace(2, 0.5, 12, dtype=torch.float64)
    m1, m2 = torch.zeros(12, dtype=torch.float64), torch.full((12,), 0.5, dtype=torch.float64)
    got = frechet_distance(m1, q @ a.diag() @ q.T, m2, q @ b.diag() @ q.T)
    assert got == pytest.approx((3.0 + (a.sqrt() - b.sqrt()).square().sum()).item(), rel=1e-10)


def test_fid_with_fewer_images_than_dimensions():
    x, y = draw(15, 64, 0), draw(20, 64, 1, 1.2)
    assert fid(x, x) == pytest.approx(0, abs=1e-9)
    a, b = (z - z.mean(0) for z in (x, y))  # tr sqrt(C1 C2) is the nuclear norm of the cross product of the data
    nuclear = np.linalg.norm((a @ b.T).numpy(), "nuc") / (14 * 19) ** 0.5
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / 14 + b.square().sum() / 19 - 2 * nuclear
    assert fid(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_fid_of_constant_and_disjoint_features():
    assert fid(torch.zeros(5, 3), torch.full((5, 3), 2.0)) == pytest.approx(12.0)
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert fid(x, x.flip(1)) == pytest.approx(4.0)  # orthogonal covariances share nothing: tr C1 + tr C2


def test_statistics_merge_pack_and_survive_a_large_mean():
    x = (draw(200, 8, 0) + 1e4).float()
    stats, other = FeatureStats(8), FeatureStats(8)
    for i, part in enumerate(x.split(37)):
        (stats if i % 2 else other).update(part)
    stats.merge(other)
    stats.update(x[:0])
    stats.merge(FeatureStats(8))
    assert stats.n == 200
    np.testing.assert_allclose(stats.mean.numpy(), x.double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(stats.cov.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)
    back = FeatureStats.unpack(stats.pack())
    assert back.n == 200 and torch.equal(back.cov, stats.cov) and torch.equal(back.mean, stats.mean)
    assert fid(stats, x) == pytest.approx(0, abs=1e-6)


def test_kid_equals_a_double_loop():
    x, y = draw(9, 5, 0), draw(7, 5, 1, 1.3, 0.2)

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    within = [sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) for z in (x, y)]
    cross = sum(k(a, b) for a in x for b in y)
    expected = within[0] / (9 * 8) + within[1] / (7 * 6) - 2 * cross / 63
    assert polynomial_mmd(x, y).item() == pytest.approx(expected, rel=1e-10)


def test_kid_subsets_are_seeded_and_unbiased():
    x, y = draw(400, 16, 0), draw(500, 16, 1)
    first, second = kid(x, y, subset_size=100, seed=3), kid(x, y, subset_size=100, seed=3)
    assert first == second and first != kid(x, y, subset_size=100, seed=4)
    mean, std = first
    assert abs(mean) < 3 * std / 10 + 0.01  # one law: zero within the error of overlapping subsets
    assert kid(x, y + 0.5, subset_size=100)[0] > 10 * abs(mean)
    # one subset of everything is the estimator itself
    assert kid(x, y[:400], subsets=1)[0] == pytest.approx(polynomial_mmd(x, y[:400]).item())
    state = torch.get_rng_state()
    kid(x, y, subsets=2)
    assert torch.equal(state, torch.get_rng_state())


def slow_inside(queries, centres, k):
    count = 0
    for q in queries:
        for i, c in enumerate(centres):
            others = sorted((c - o).norm().item() for j, o in enumerate(centres) if j != i)
            if (q - c).norm().item() <= others[k - 1]:
                count += 1
                break
    return count / len(queries)


def test_precision_and_recall_equal_a_slow_loop():
    x, y = draw(30, 3, 0), draw(25, 3, 1, 0.9, 0.8)
    got = precision_recall(x, y, chunk=7)
    assert got.precision == pytest.approx(slow_inside(y, x, 3))
    assert got.recall == pytest.approx(slow_inside(x, y, 3))
    assert 0 < got.precision < 1 and 0 < got.recall < 1
    wide = torch.zeros(1, 300, dtype=torch.float64)  # more than 256 dimensions: the matrix-product path
    padded = [torch.cat([z, wide.expand(len(z), -1)], 1) for z in (x, y)]
    assert precision_recall(*padded) == got


def test_precision_and_recall_of_known_cases():
    x = draw(60, 4, 0)
    same, apart = precision_recall(x, x), precision_recall(x, x + 100)
    assert (same.precision, same.recall) == (1, 1)
    assert (apart.precision, apart.recall) == (0, 0)
    # fakes from one of two modes: all plausible, half covered
    one, two = draw(50, 4, 1), draw(50, 4, 2, shift=50.0)
    dropped = precision_recall(torch.cat([one, two]), one + 1e-6)
    assert (dropped.precision, dropped.recall) == (1, 0.5)
    # copies have radius 0 and still hold themselves
    copies = torch.ones(5, 2)
    assert precision_recall(copies, copies).precision == 1


def test_too_few_images_are_named():
    with pytest.raises(UserError, match="at least 2 images"):
        fid(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(UserError, match="KID needs"):
        kid(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(torch.zeros(3, 3), torch.zeros(5, 3))
