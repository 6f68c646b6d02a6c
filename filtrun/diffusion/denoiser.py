"""One denoiser over networks that predict eps, x0, v, a flow velocity or EDM's residual.

Every parametrisation is affine: with the state x = x0 + sigma * eps (images in [-1, 1]),

    x0 estimate = c_skip(sigma) * x + c_out(sigma) * net(c_in(sigma) * x, noise input, class)

so training and sampling need only the three coefficients. The loss is the squared error of the network's own output
by default, which is the published loss of each parametrisation (for "edm" it equals EDM's weighting of x0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from filtrun.diffusion.noise import DiscreteLevels, NoiseLevels
from filtrun.errors import UserError, unknown

PREDICTIONS = ("edm", "eps", "x0", "v", "flow")


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says of a noisy state x (N, C, H, W).

    x0: estimate of the clean image, where a solver step goes. eps: estimate of the noise, the direction in which it
    renoises. They satisfy x = x0 + sigma * eps for a plain denoiser; a guidance such as CFG++ lets them disagree.
    """

    x0: Tensor
    eps: Tensor

    def x0_of_eps(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The clean image that `eps` stands for, x - sigma * eps: `x0` itself for a plain denoiser.

        What multistep samplers store: under CFG++ it is the unconditional estimate.
        """
        scale = sigma if not isinstance(sigma, Tensor) else _like(sigma, x)
        return x - scale * self.eps


class Denoise(Protocol):
    """A denoiser as samplers and guidances see it.

    x (N, C, H, W); sigma a scalar tensor or (N,); cond (N,) int64 class ids, the null id among them, or None for
    the null class everywhere.
    """

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Prediction: ...


@dataclass(frozen=True)
class Scaling:
    """Coefficients of one parametrisation, each of sigma's shape; `c_rest` = 1 - c_skip without cancellation."""

    c_skip: Tensor
    c_rest: Tensor
    c_out: Tensor
    c_in: Tensor

    def x0(self, x: Tensor, output: Tensor) -> Tensor:
        """Clean image from the state and the network's output."""
        return _like(self.c_skip, x) * x + _like(self.c_out, x) * output

    def eps(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        """Noise from the state and the network's output: (x - x0) / sigma, accurate at small sigma too."""
        return (_like(self.c_rest, x) * x - _like(self.c_out, x) * output) / _like(sigma, x)

    def target(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """The output a perfect network would give for the state x0 + sigma * eps."""
        return (_like(self.c_rest, x0) * x0 - _like(self.c_skip * sigma, x0) * eps) / _like(self.c_out, x0)


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
        return Scaling(one, torch.zeros_like(sigma), -sigma, c_in)
    if prediction == "x0":
        return Scaling(torch.zeros_like(sigma), one, one, c_in)
    if prediction == "v":
        return Scaling(1 / total, squared / total, -sigma * c_in, c_in)
    raise unknown("prediction", prediction, PREDICTIONS)


class Denoiser:
    """A network, its noise levels and its parametrisation, as a loss and as a denoise callable.

    Args:
        net: forward(x (N, C, H, W), noise (N,), y (N,) int64) -> (N, C, H, W). Its `noise` is ln(sigma) / 4, unless
            the network has an attribute ``time_input`` that says "timestep" (time of the discrete schedule) or "flow"
            (t in [0, 1]).
        levels: noise levels of training and sampling.
        prediction: what the network outputs: edm, eps, x0, v or flow; any goes with any noise levels.
        num_classes: number of classes K; K itself is the null id. 0 for an unconditional network.
        sigma_data: standard deviation of the data, used by "edm".
        label_dropout: probability that a training label becomes null, for classifier-free guidance.
        weighting: "target": squared error of the network's output. "levels": squared error of x0 under the weight
            that belongs to the noise levels. Both are the same for edm with edm levels and eps with discrete ones.
        clip: clamp x0 estimates to [-clip, clip] when sampling, as DDPM does; None leaves them. Networks that predict
            eps need it (1 for images) where grids start high: their error in x0 is sigma times that of eps.
        dtype: what the network computes in; the sampling state keeps its own.

    Attributes:
        nfe: network calls per sample since the last ``reset()``, each condition counted once; a mean over the batch
            where a guidance saves calls for some samples.
        null_id: the class id that stands for "no class".

    Raises:
        UserError: unknown prediction or weighting, label_dropout outside [0, 1], or a network that reads discrete
            time steps together with continuous noise levels.
    """

    def __init__(
        self,
        net: Callable[[Tensor, Tensor, Tensor], Tensor],
        levels: NoiseLevels,
        prediction: str = "edm",
        *,
        num_classes: int = 0,
        sigma_data: float = 0.5,
        label_dropout: float = 0.1,
        weighting: str = "target",
        clip: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        if weighting not in ("target", "levels"):
            raise unknown("loss weighting", weighting, ("target", "levels"))
        if not 0 <= label_dropout <= 1:
            raise UserError(f"label_dropout={label_dropout} is out of range; allowed is [0, 1]")
        self.time_input = getattr(net, "time_input", "c_noise")
        if self.time_input not in ("c_noise", "timestep", "flow"):
            raise unknown("time_input of the network", self.time_input, ("c_noise", "timestep", "flow"))
        if self.time_input == "timestep" and not isinstance(levels, DiscreteLevels):
            raise UserError("this network reads time steps; choose noise levels linear, scaled_linear or cosine")
        self.net, self.levels, self.prediction = net, levels, prediction
        self.num_classes, self.null_id, self.sigma_data = num_classes, num_classes, sigma_data
        self.label_dropout, self.weighting, self.clip, self.dtype = label_dropout, weighting, clip, dtype
        self.nfe: float = 0

    def reset(self) -> None:
        """Set the count of network calls to zero."""
        self.nfe = 0

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Tensor | None = None) -> Prediction:
        """Denoise x (N, C, H, W) at `sigma` (scalar or (N,), above 0) for classes `cond` ((N,) or None = null)."""
        self.nfe += 1
        return self._predict(x, sigma, self._classes(cond, x))

    def both(
        self, x: Tensor, sigma: Tensor | float, cond: Tensor, rows: Tensor | None = None
    ) -> tuple[Prediction, Prediction]:
        """Predictions for `cond` and for the null class from one network call on a doubled batch (2 evaluations).

        With `rows` (M,) int64 the batch grows by these samples only (1 + M / N evaluations a sample), and the second
        prediction has M samples.
        """
        n = len(x)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(n)
        again, sigma_again = (x, sigma) if rows is None else (x[rows], sigma[rows])
        self.nfe += 1 + len(again) / n
        classes = torch.cat([self._classes(cond, x), self._classes(None, again)])
        joint = self._predict(torch.cat([x, again]), torch.cat([sigma, sigma_again]), classes)
        return Prediction(joint.x0[:n], joint.eps[:n]), Prediction(joint.x0[n:], joint.eps[n:])

    def loss(self, x0: Tensor, y: Tensor | None = None, *, sigma: Tensor | None = None) -> Tensor:
        """Training loss, a scalar: the mean of `losses`."""
        return self.losses(x0, y, sigma=sigma).mean()

    def losses(
        self,
        x0: Tensor,
        y: Tensor | None = None,
        *,
        sigma: Tensor | None = None,
        noise: Tensor | None = None,
        drop_labels: bool = True,
    ) -> Tensor:
        """Training loss of each image, (N,) float32.

        Draws from torch's global generator, in this order: noise levels, noise, dropped labels.

        Args:
            x0: images (N, C, H, W) in [-1, 1].
            y: class ids (N,) int64, or None for an unconditional loss.
            sigma, noise: levels (N,) and standard normal noise like x0 to use in place of drawn ones.
            drop_labels: False keeps every label, as a validation loss wants it.
        """
        n = len(x0)
        if sigma is None:
            sigma, weight = self.levels.sample_sigma(n, x0.device)
        else:
            weight = self.levels.weight(sigma)
        eps = torch.randn_like(x0) if noise is None else noise
        classes = self._classes(y, x0)
        if drop_labels and y is not None and self.label_dropout > 0:
            classes = classes.masked_fill(torch.rand(n, device=x0.device) < self.label_dropout, self.null_id)
        c = scaling(self.prediction, sigma, self.sigma_data)
        x = x0 + _like(sigma, x0) * eps
        output = self._net(c, x, sigma, classes)
        error = (output - c.target(x0, eps, sigma)).square().flatten(1).mean(1)
        return error if self.weighting == "target" else weight * c.c_out**2 * error

    def _predict(self, x: Tensor, sigma: Tensor | float, classes: Tensor) -> Prediction:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        c = scaling(self.prediction, sigma, self.sigma_data)
        output = self._net(c, x, sigma, classes)
        x0 = c.x0(x, output)
        if self.clip is None:
            return Prediction(x0, c.eps(x, output, sigma))
        x0 = x0.clamp(-self.clip, self.clip)
        return Prediction(x0, (x - x0) / _like(sigma, x))

    def _net(self, c: Scaling, x: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        if self.time_input == "timestep":
            time = self.levels.sigma_to_t(sigma)
        elif self.time_input == "flow":
            time = sigma / (1 + sigma)
        else:
            time = sigma.log() / 4
        output = self.net((_like(c.c_in, x) * x).to(self.dtype), time.to(self.dtype), classes)
        return output.to(x.dtype)  # autocast nets answer in half precision; the state must not

    def _classes(self, cond: Tensor | None, x: Tensor) -> Tensor:
        if cond is None or self.num_classes == 0:
            return torch.full((len(x),), self.null_id, dtype=torch.int64, device=x.device)
        return cond.to(x.device)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """Give per-sample values (N,) the trailing axes of x; a scalar stays."""
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value
