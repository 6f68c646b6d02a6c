from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from filtrun.report.statistics import flip_p, mean, paired, std, t_cdf, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12])
def test_student_t_is_scipys(freedom):
    for t in (-30.0, -1.3, 0.0, 0.2, 2.5, 12.0):
        assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
    for share in (0.5, 0.9, 0.975, 0.999):
        assert t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9, abs=1e-9)


def test_the_sign_flip_test_is_scipys():
    rng = np.random.default_rng(0)
    for n in (3, 5, 8):
        d = rng.normal(0.3, 1, n)
        theirs = stats.permutation_test(
            (d,), lambda x, axis: x.mean(axis), permutation_type="samples", alternative="greater", n_resamples=np.inf
        )
        assert flip_p(d) == pytest.approx(theirs.pvalue)
    assert flip_p([1.0, 2.0, 3.0]) == 1 / 8 and flip_p([0.0, 0.0]) == 1 and flip_p([0.1, 0.1, 0.1]) == 1 / 8


def test_paired_differences():
    d = [0.3, -0.1, 0.5, 0.2]
    found = paired(d)
    interval = stats.t.interval(0.95, 3, loc=np.mean(d), scale=np.std(d, ddof=1) / 2)
    assert (found.mean, found.low, found.high) == pytest.approx((0.225, *interval))
    assert found.effect == pytest.approx(0.225 / np.std(d, ddof=1)) and found.wins == 3
    assert found.t_p == pytest.approx(stats.ttest_1samp(d, 0, alternative="greater").pvalue)
    assert found.p == 2 / 16 and found.least_p == 1 / 16


def test_too_few_or_equal_pairs_claim_nothing():
    one = paired([0.4])
    assert one.mean == 0.4 and (one.low, one.effect, one.p, one.t_p) == (None, None, None, None)
    same = paired([0.5, 0.5])
    assert (same.low, same.high, same.effect, same.t_p, same.p) == (0.5, 0.5, None, None, 0.25)
    many = paired([0.1 * i for i in range(20)])
    assert many.p is None and many.t_p < 1e-4


def test_mean_and_deviation():
    assert mean([1.0, 2.0, 6.0]) == 3.0 and std([1.0, 2.0, 6.0]) == pytest.approx(7**0.5) and std([1.0]) is None
