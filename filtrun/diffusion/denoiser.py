"""One denoiser over networks that predict eps, x0, v, a flow velocity or EDM's residual.

The loss is the squared error of the network's own output by default, which is the published loss of each
parametrisation (for "edm" it equals EDM's weighting of x0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from filtrun.diffusion.noise import DiscreteLevels, NoiseLevels
from filtrun.diffusion.scaling import PREDICTIONS, Scaling, like, scaling
from filtrun.errors import UserError, unknown


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
        scale = sigma if not isinstance(sigma, Tensor) else like(sigma, x)
        return x - scale * self.eps


class Denoise(Protocol):
    """A denoiser as samplers and guidances see it.

    x (N, C, H, W); sigma a scalar tensor or (N,); cond (N,) int64 class ids, the null id among them, or None for
    the null class everywhere.
    """

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Prediction: ...


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
        self._grid: Tensor | None = None
        self._known: dict[int, tuple[Scaling, Tensor]] = {}

    def begin(self, sigmas: Tensor) -> None:
        """A sampler is going to run over `sigmas` (S + 1,): what depends on the level alone is computed for all.

        A call with one of its elements, by place in memory (the grid is kept, so nothing else can lie there), finds it
        without waiting for the device; any other level is computed in the call.
        """
        each = zip(scaling(self.prediction, sigmas, self.sigma_data).unbind(), self._time(sigmas).unbind(), strict=True)
        self._grid = sigmas
        place, apart = sigmas.data_ptr(), sigmas.stride(0) * sigmas.element_size()
        self._known = {place + i * apart: level for i, level in enumerate(each)}

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
        again = x if rows is None else x[rows]
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = torch.cat([sigma, sigma if rows is None else sigma[rows]])
        self.nfe += 1 + len(again) / n
        classes = torch.cat([self._classes(cond, x), self._classes(None, again)])
        joint = self._predict(torch.cat([x, again]), sigma, classes)
        (x0, x0_again), (eps, eps_again) = (t.split([n, len(again)]) for t in (joint.x0, joint.eps))
        return Prediction(x0, eps), Prediction(x0_again, eps_again)

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
        x = x0 + like(sigma, x0) * eps
        output = self._net(c, x, self._time(sigma), classes)
        error = (output - c.target(x0, eps, sigma)).square().flatten(1).mean(1)
        return error if self.weighting == "target" else weight * c.c_out**2 * error

    def _predict(self, x: Tensor, sigma: Tensor | float, classes: Tensor) -> Prediction:
        c, time, sigma = self._level(x, sigma)
        output = self._net(c, x, time, classes)
        x0 = c.x0(x, output)
        if self.clip is None:
            return Prediction(x0, c.eps(x, output, sigma))
        x0 = x0.clamp(-self.clip, self.clip)
        return Prediction(x0, (x - x0) / like(sigma, x))

    def _level(self, x: Tensor, sigma: Tensor | float) -> tuple[Scaling, Tensor, Tensor]:
        """The coefficients, the network's noise input and sigma itself, each a scalar or (N,)."""
        grid = self._grid
        if isinstance(sigma, Tensor) and not sigma.ndim and grid is not None and grid.dtype == x.dtype == sigma.dtype:
            known = self._known.get(sigma.data_ptr())
            if known is not None:
                return *known, sigma
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return scaling(self.prediction, sigma, self.sigma_data), self._time(sigma), sigma

    def _time(self, sigma: Tensor) -> Tensor:
        """The network's noise input, of sigma's shape."""
        if self.time_input == "timestep":
            return self.levels.sigma_to_t(sigma)
        return sigma / (1 + sigma) if self.time_input == "flow" else sigma.log() / 4

    def _net(self, c: Scaling, x: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        output = self.net((like(c.c_in, x) * x).to(self.dtype), time.to(self.dtype).expand(len(x)), classes)
        return output.to(x.dtype)  # autocast nets answer in half precision; the state must not

    def _classes(self, cond: Tensor | None, x: Tensor) -> Tensor:
        if cond is None or self.num_classes == 0:
            return torch.full((len(x),), self.null_id, dtype=torch.int64, device=x.device)
        return cond.to(x.device)
