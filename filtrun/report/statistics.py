"""Statistics of a few paired differences: mean, confidence interval, effect size, sign-flip test and paired t-test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_EXACT = 14
"""Up to this many pairs all sign flips are tried; above, the test is left to the t distribution."""


@dataclass(frozen=True)
class Paired:
    """Differences of pairs against zero; positive is what was claimed.

    `low` to `high` is the 95 % confidence interval of the mean (Student's t), `effect` mean / standard deviation, `p`
    the one-sided p-value of the sign-flip test and `least_p` the smallest that so many pairs can give, `t_p` that of
    the paired t-test. None: one pair, or pairs that do not differ from each other, do not tell.
    """

    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    effect: float | None
    p: float | None
    least_p: float | None
    t_p: float | None

    @property
    def wins(self) -> int:
        """The number of pairs in which what was claimed is so."""
        return sum(d > 0 for d in self.differences)


def paired(differences: Sequence[float]) -> Paired:
    """Statistics of paired differences; at least one is needed."""
    n, mean = len(differences), math.fsum(differences) / len(differences)
    spread = std(differences)
    if n < 2:
        return Paired(tuple(differences), mean, None, None, None, None, None, None)
    p = flip_p(differences) if n <= MOST_EXACT else None
    least = 0.5**n if n <= MOST_EXACT else None
    if not spread:
        return Paired(tuple(differences), mean, mean, mean, None, p, least, None)
    error = spread / math.sqrt(n)
    reach = t_quantile(0.975, n - 1) * error
    t_p = 1 - t_cdf(mean / error, n - 1)
    return Paired(tuple(differences), mean, mean - reach, mean + reach, mean / spread, p, least, t_p)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def flip_p(differences: Sequence[float]) -> float:
    """One-sided p of the sign-flip test: the share of sign patterns whose sum is at least the one observed.

    The smallest value is 1 / 2^n (n differences): 0.125 with three seeds, 0.031 with five.
    """
    observed = math.fsum(differences)
    slack = 1e-9 * math.fsum(map(abs, differences))
    sums = (
        math.fsum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1.0, -1.0), repeat=len(differences))
    )
    return sum(total >= observed - slack for total in sums) / 2 ** len(differences)


def t_cdf(t: float, freedom: int) -> float:
    """Distribution function of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7)."""
    theta = math.atan2(t, math.sqrt(freedom))
    cos, sin = math.cos(theta), math.sin(theta)
    term, total = 1.0, 0.0
    if freedom % 2:
        term = cos
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= cos * cos * 2 * k / (2 * k + 1)
        return 0.5 + (theta + sin * total) / math.pi
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= cos * cos * (2 * k - 1) / (2 * k)
    return 0.5 + sin * total / 2


def t_quantile(share: float, freedom: int) -> float:
    """Inverse of `t_cdf` for a share in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2
