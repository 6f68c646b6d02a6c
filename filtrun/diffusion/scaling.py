"""Preconditioning: how the output of a network that predicts eps, x0, v, a flow velocity or EDM's residual is read.

Every parametrisation is affine: with the state x = x0 + sigma * eps (images in [-1, 1]),

    x0 estimate = c_skip(sigma) * x + c_out(sigma) * net(c_in(sigma) * x, noise input, class)

so training and sampling need only the three coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from filtrun.errors import unknown

PREDICTIONS = ("edm", "eps", "x0", "v", "flow")


@dataclass(frozen=True)
class Scaling:
    """Coefficients of one parametrisation, each of sigma's shape; `c_rest` = 1 - c_skip without cancellation.

    `gives` names what the network's output is as it stands, "x0" or "eps"; empty where it has to be computed.
    """

    c_skip: Tensor
    c_rest: Tensor
    c_out: Tensor
    c_in: Tensor
    gives: str = ""

    def x0(self, x: Tensor, output: Tensor) -> Tensor:
        """Clean image from the state and the network's output."""
        if self.gives == "x0":
            return output
        kept = x if self.gives == "eps" else like(self.c_skip, x) * x
        return kept + like(self.c_out, x) * output

    def eps(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """Noise from the state and the network's output: (x - x0) / sigma, accurate at small sigma too."""
        if self.gives == "eps":
            return output
        return (like(self.c_rest, x) * x - like(self.c_out, x) * output) / like(sigma, x)

    def target(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """The output a perfect network would give for the state x0 + sigma * eps."""
        return (like(self.c_rest, x0) * x0 - like(self.c_skip * sigma, x0) * eps) / like(self.c_out, x0)

    def unbind(self) -> Iterator[Scaling]:
        """One of scalars for each sigma of (S,)."""
        columns = (c.unbind() for c in (self.c_skip, self.c_rest, self.c_out, self.c_in))
        for c_skip, c_rest, c_out, c_in in zip(*columns, strict=True):
            yield Scaling(c_skip, c_rest, c_out, c_in, self.gives)


def scaling(prediction: str, sigma: Tensor, sigma_data: float = 0.5) -> Scaling:
    """Preconditioning of a parametrisation at `sigma` (any shape).

    edm: Karras et al. 2022, Table 1. eps, x0 and v (Salimans & Ho 2022): the network sees z = x / sqrt(1 + sigma^2).
    flow: the straight path z = (1 - t) x0 + t eps = x / (1 + sigma), t = sigma / (1 + sigma), with output eps - x0.

    Raises:
        UserError: unknown parametrisation.
    """
    one, squared = torch.ones_like(sigma), sigma**2
    if prediction == "edm":
        total = squared + sigma_data**2
        root = total.sqrt()
        return Scaling(sigma_data**2 / total, squared / total, sigma * sigma_data / root, 1 / root)
    if prediction == "flow":
        return Scaling(1 / (1 + sigma), sigma / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma))
    total, c_in = 1 + squared, (1 + squared).rsqrt()
    if prediction == "eps":
        return Scaling(one, torch.zeros_like(sigma), -sigma, c_in, "eps")
    if prediction == "x0":
        return Scaling(torch.zeros_like(sigma), one, one, c_in, "x0")
    if prediction == "v":
        return Scaling(1 / total, squared / total, -sigma * c_in, c_in)
    raise unknown("prediction", prediction, PREDICTIONS)


def like(value: Tensor, x: Tensor) -> Tensor:
    """Give per-sample values (N,) the trailing axes of x (N, ...); a scalar stays."""
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value
