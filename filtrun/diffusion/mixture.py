"""A Gaussian mixture whose denoiser, score, density and classifier are known in closed form.

Adding noise of variance sigma^2 to a mixture of Gaussians with diagonal variances v_k gives the mixture with
variances v_k + sigma^2; its denoiser is the posterior mean. So samplers and guidances can be tested without a
trained network. All in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Prediction
from filtrun.errors import UserError


class Mixture:
    """Mixture of K Gaussians with diagonal covariance in D dimensions, usable as a denoise callable.

    Args:
        weights: (K,), positive; normalised here.
        means: (K, D).
        variances: (K, D), at least 0 (0: the empirical distribution of the means).
        labels: (K,) int64 class of each component; None gives each its own.

    Calls take x (N, D) or (N, C, H, W) with C H W = D, sigma scalar or (N,), and cond (N,) class ids or None; class
    id `num_classes` is the null class, all components. ``nfe`` counts the evaluations as `Denoiser` does.
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor, labels: Tensor | None = None) -> None:
        self.weights = weights.double() / weights.double().sum()
        self.means, self.variances = means.double(), variances.double()
        self.labels = torch.arange(len(weights)) if labels is None else labels.long()
        if self.means.shape != self.variances.shape or not len(self.weights) == len(self.means) == len(self.labels):
            raise UserError("a mixture needs weights (K,), means (K, D), variances (K, D) and labels (K,)")
        self.num_classes = self.null_id = int(self.labels.max()) + 1
        self.nfe: float = 0

    @classmethod
    def four_in_six(cls) -> Mixture:
        """Four components in six dimensions: m = 1.2 cos(1.7k + 0.9d), v = 0.05 + 0.3 |sin(0.7k + 1.3d)|."""
        k, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(6.0, dtype=torch.float64)
        means, variances = 1.2 * (1.7 * k + 0.9 * d).cos(), 0.05 + 0.3 * (0.7 * k + 1.3 * d).sin().abs()
        return cls(torch.tensor([0.4, 0.3, 0.2, 0.1]), means, variances)

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Tensor | None = None) -> Prediction:
        """Posterior mean E[x0 | x] and the matching eps = (x - x0) / sigma, in float64 and x's shape."""
        self.nfe += 1
        return self._predict(x, sigma, cond)

    def both(
        self, x: Tensor, sigma: Tensor | float, cond: Tensor, rows: Tensor | None = None
    ) -> tuple[Prediction, Prediction]:
        """Predictions for `cond` and for the null class, the latter for the samples `rows` (M,) only if given."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        again, sigma_again = (x, sigma) if rows is None else (x[rows], sigma[rows])
        self.nfe += 1 + len(again) / len(x)
        return self._predict(x, sigma, cond), self._predict(again, sigma_again, None)

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0, cond: Tensor | None = None) -> Tensor:
        """ln p(x | sigma, cond), (N,); the gradient in x is the score (D - x) / sigma^2."""
        flat = x.double().flatten(1)
        joint = self._joint(flat, self._variance(sigma), cond)
        return joint.logsumexp(1) - flat.shape[1] / 2 * math.log(2 * math.pi)

    def class_log_probs(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """ln p(class | x, sigma), (N, num_classes): the exact noisy classifier, the clean one at sigma = 0."""
        joint = self._joint(x.double().flatten(1), self._variance(sigma), None).log_softmax(1)
        absent = self.labels[:, None] != torch.arange(self.num_classes)
        return (joint[:, :, None] + torch.zeros(absent.shape).masked_fill(absent, -math.inf)).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator, label: int | None = None) -> tuple[Tensor, Tensor]:
        """n exact samples (n, D) and their classes (n,), of one class or of all."""
        weights = self.weights if label is None else self.weights * (self.labels == label)
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.variances[k].sqrt() * noise, self.labels[k]

    def _variance(self, sigma: Tensor | float) -> Tensor:
        """v + sigma^2, (N or 1, K, D)."""
        return self.variances + torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1) ** 2

    def _joint(self, x: Tensor, variance: Tensor, cond: Tensor | None) -> Tensor:
        """ln w_k + ln N(x; m_k, variance_k) without the 2 pi term, (N, K); -inf for components of other classes."""
        square = (x[:, None] - self.means) ** 2 / variance
        weights = self.weights.log()[None]
        if cond is not None:
            other = (cond[:, None] != self.labels) & (cond[:, None] != self.null_id)
            weights = weights.expand(len(cond), -1).masked_fill(other, -math.inf).log_softmax(1)
        return weights - (square + variance.log()).sum(2) / 2

    def _predict(self, x: Tensor, sigma: Tensor | float, cond: Tensor | None) -> Prediction:
        flat, variance = x.double().flatten(1), self._variance(sigma)
        posterior = self._joint(flat, variance, cond).softmax(1)
        component = self.means + self.variances / variance * (flat[:, None] - self.means)
        x0 = (posterior[:, :, None] * component).sum(1).reshape(x.shape)
        scale = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))
        return Prediction(x0, (x - x0) / scale)
