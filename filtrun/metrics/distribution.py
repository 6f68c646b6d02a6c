"""Distances between two sets of images in a feature space: FID, KID, precision and recall.

Inputs are feature matrices (N, D), one row per image; numbers are only comparable under the same feature network,
sample count and reference set. FID is biased upwards at small N, KID is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from filtrun.errors import UserError


class FeatureStats:
    """Mean and covariance of features, gathered batch by batch in float64 (Chan et al. 1979), mergeable.

    Attributes:
        n: rows seen. mean: (D,). cov: (D, D), divisor n - 1.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> FeatureStats:
        """Statistics of one feature matrix (N, D)."""
        stats = cls(features.shape[1], features.device)
        stats.update(features)
        return stats

    @property
    def cov(self) -> Tensor:
        """Sample covariance (D, D); UserError below two rows."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images; got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: Tensor) -> None:
        """Add a batch of features (N, D)."""
        if len(features) == 0:
            return
        batch = features.detach().to(self.mean)
        mean = batch.mean(0)
        centred = batch - mean
        self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStats) -> None:
        """Add what another instance has seen."""
        if other.n:
            self._add(other.n, other.mean.to(self.mean), other.scatter.to(self.mean))

    def pack(self) -> Tensor:
        """Everything in one float64 vector (1 + D + D * D,), to gather from other processes."""
        return torch.cat([self.mean.new_tensor([self.n]), self.mean, self.scatter.flatten()])

    @classmethod
    def unpack(cls, packed: Tensor) -> FeatureStats:
        """Inverse of `pack`."""
        dim = int(round(((4 * len(packed) - 3) ** 0.5 - 1) / 2))
        stats = cls(dim, packed.device)
        stats.n = int(packed[0].item())
        stats.mean, stats.scatter = packed[1 : 1 + dim].clone(), packed[1 + dim :].reshape(dim, dim).clone()
        return stats

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total, shift = self.n + n, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total


def fid(real: Tensor | FeatureStats, fake: Tensor | FeatureStats) -> float:
    """Frechet inception distance (Heusel et al. 2017, arXiv 1706.08500, eq. 6) of two feature sets or statistics.

    Works with fewer images than feature dimensions. UserError below two images.
    """
    a, b = (x if isinstance(x, FeatureStats) else FeatureStats.of(x) for x in (real, fake))
    return frechet_distance(a.mean, a.cov, b.mean.to(a.mean), b.cov.to(a.mean))


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two Gaussians, in float64; never negative.

    With cov = F F^T from symmetric eigen-decompositions, the eigenvalues of (cov1 cov2)^(1/2) are the singular values
    of F1^T F2. No square root of an indefinite or singular product is taken, so rank-deficient covariances are fine.
    """
    root1, root2 = _factor(cov1.double()), _factor(cov2.double())
    shared = torch.linalg.svdvals(root1.T @ root2).sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    return max(0.0, (shift + cov1.double().trace() + cov2.double().trace() - 2 * shared).item())


def _factor(cov: Tensor) -> Tensor:
    """F (D, r) with F F^T = cov, r its numerical rank."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    keep = values > values[-1].clamp(min=0) * len(cov) * torch.finfo(cov.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def kid(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, degree: int = 3, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401): mean and std of the MMD^2 over subsets.

    Polynomial kernel (x.y / D + 1)^degree, unbiased estimator (may be negative). Each subset draws min(subset_size,
    N_real, N_fake) rows of each set without replacement, from an own generator seeded by `seed`; std is over the
    subsets (divisor `subsets`). UserError below two images.
    """
    size = min(subset_size, len(real), len(fake))
    if size < 2 or subsets < 1:
        raise UserError(f"KID needs at least 2 images in each set and 1 subset; got {size} and {subsets}")
    generator = torch.Generator().manual_seed(seed)
    x, y = real.double(), fake.double()
    draws = [torch.randperm(len(z), generator=generator)[:size] for _ in range(subsets) for z in (x, y)]
    rows, cols = torch.stack(draws).to(x.device).view(subsets, 2, size).unbind(1)  # one copy, not one for each subset
    scores = torch.stack([polynomial_mmd(x[r], y[c], degree) for r, c in zip(rows, cols, strict=True)])
    return scores.mean().item(), scores.std(correction=0).item()


def polynomial_mmd(x: Tensor, y: Tensor, degree: int = 3) -> Tensor:
    """Unbiased MMD^2 of x (M, D) and y (N, D) under the kernel (a.b / D + 1)^degree; a scalar."""
    m, n, dim = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / dim + 1) ** degree for a, b in ((x, x), (y, y), (x, y)))
    within_x = (xx.sum() - xx.trace()) / (m * (m - 1))
    within_y = (yy.sum() - yy.trace()) / (n * (n - 1))
    return within_x + within_y - 2 * xy.mean()


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: share of fakes inside the real manifold. recall: share of reals inside the fake one. In [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, chunk: int = 2000) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    The manifold of a set is the union of balls around its points, each reaching to the k-th nearest other point.
    Distances are computed `chunk` rows at a time. UserError when a set has k images or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall with k={k} need more than {k} images; got {min(len(real), len(fake))}")
    x, y = real.double(), fake.double()
    centre = x.mean(0)  # distances by matrix products lose digits far from the origin
    x, y = x - centre, y - centre
    return PrecisionRecall(
        precision=_inside(y, x, _radii(x, k, chunk), chunk), recall=_inside(x, y, _radii(y, k, chunk), chunk)
    )


def _radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, (N,): the row itself is the nearest of k + 1."""
    return torch.cat([_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(chunk)])


def _inside(queries: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    found = [(_distances(part, centres) <= radii).any(1) for part in queries.split(chunk)]
    return torch.cat(found).double().mean().item()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Exact differences where they are affordable: ties and duplicates then compare as they should.
    exact = x.shape[1] <= 256
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist")
