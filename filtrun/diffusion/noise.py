"""Noise levels: how sigma is drawn in training, which grid a sampler walks, how sigma and discrete time relate.

Everything is in the variance-exploding form x = x0 + sigma * eps. A variance-preserving schedule with cumulative
product alpha_bar is the same thing with sigma = sqrt((1 - alpha_bar) / alpha_bar) and z = x / sqrt(1 + sigma^2).
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from filtrun.errors import UserError, unknown
from filtrun.options import check_options, opt

#: Where grids start at the latest: EDM's sigma_max for the continuous ones; for "uniform_t" just above the end of the
#: linear schedule, which spares samplers the last 5 of 1000 cosine steps (sigma 160 to 20291, made by capping beta).
GRID_MAX = {"karras": 80.0, "log": 80.0, "uniform_t": 160.0}


class NoiseLevels(abc.ABC):
    """The noise levels a denoiser is trained on and sampled over: ``sigma_min`` to ``sigma_max``."""

    sigma_min: float
    sigma_max: float

    @abc.abstractmethod
    def sample_sigma(self, n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Draw training levels with torch's global generator.

        Returns:
            sigma (n,) float32, and (n,) float32, the weight of the squared error of x0 at that sigma.
        """

    @abc.abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared x0 error, same shape as `sigma`."""

    @abc.abstractmethod
    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Time of a noise level, same shape, floating point."""

    @abc.abstractmethod
    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Noise level of a time (may lie between two discrete ones), same shape, floating point."""

    @abc.abstractmethod
    def start(self, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """Turn standard normal `noise` (N, C, H, W) into the state a sampler starts from at `sigma`."""

    def sigmas(
        self,
        steps: int,
        grid: str = "karras",
        *,
        rho: float = 7.0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        zero: bool = True,
    ) -> Tensor:
        """A falling grid of steps + 1 noise levels for a sampler of `steps` steps, float64, on the CPU.

        Args:
            steps: solver steps, at least 1.
            grid: "karras" (uniform in sigma^(1/rho), Karras et al. 2022, eq. 5), "log" (uniform in ln sigma) or
                "uniform_t" (uniform in the schedule's own time; the same as "log" for the edm levels).
            rho: exponent of the karras grid.
            sigma_min, sigma_max: ends in place of the schedule's, whose sigma_max counts only up to 80 ("karras",
                "log") or 160 ("uniform_t"): above it nothing of an image is left.
            zero: True: the last step goes from sigma_min to 0. False: the grid ends at sigma_min.

        Raises:
            UserError: steps < 1, an unknown grid, or ends that are not 0 < sigma_min < sigma_max.
        """
        if steps < 1:
            raise UserError(f"steps={steps} is not allowed; a sampler needs at least 1")
        if grid not in GRID_MAX:
            raise unknown("sigma grid", grid, GRID_MAX)
        top = min(self.sigma_max, GRID_MAX[grid])
        low = self.sigma_min if sigma_min is None else sigma_min
        high = top if sigma_max is None else sigma_max
        if not 0 < low < high:
            raise UserError(f"sigma_min={low} and sigma_max={high} are not allowed; need 0 < sigma_min < sigma_max")
        points = steps if zero else steps + 1
        ends = torch.tensor([high, low], dtype=torch.float64)
        if grid == "karras":
            levels = _line(ends ** (1 / rho), points) ** rho
        elif grid == "log":
            levels = _line(ends.log(), points).exp()
        else:
            levels = self.t_to_sigma(_line(self._exact_t(ends), points))
        return torch.cat([levels, levels.new_zeros(1)]) if zero else levels

    def _exact_t(self, sigma: Tensor) -> Tensor:
        return self.sigma_to_t(sigma)


def _line(ends: Tensor, points: int) -> Tensor:
    return torch.lerp(ends[0], ends[1], torch.linspace(0, 1, points, dtype=ends.dtype))


@dataclass(frozen=True)
class EDMLevels(NoiseLevels):
    """Continuous levels of Karras et al. 2022 (arXiv 2206.00364, Table 1): ln sigma ~ N(p_mean, p_std^2)."""

    kind: ClassVar[str] = "edm"
    p_mean: float = opt(-1.2, "mean of ln sigma in training", source="EDM, Table 1")
    p_std: float = opt(1.2, "standard deviation of ln sigma in training", low=0, source="EDM, Table 1")
    sigma_min: float = opt(0.002, "lowest noise level when sampling", low=0, source="EDM, Table 1")
    sigma_max: float = opt(80.0, "highest noise level when sampling", low=0, source="EDM, Table 1")
    sigma_data: float = opt(0.5, "standard deviation of the data in [-1, 1]", low=1e-6, source="EDM, Table 1")

    def __post_init__(self) -> None:
        check_options(self, "noise")

    def sample_sigma(self, n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        sigma = (torch.randn(n, device=device) * self.p_std + self.p_mean).exp()
        return sigma, self.weight(sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """(sigma^2 + sd^2) / (sigma sd)^2: the network's own output then has unit error weight at every level."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def t_to_sigma(self, t: Tensor) -> Tensor:
        return (4 * t).exp()

    def start(self, noise: Tensor, sigma: Tensor | float) -> Tensor:
        return noise * sigma


@dataclass(frozen=True)
class DiscreteLevels(NoiseLevels):
    """Discrete variance-preserving levels: t = 0 ... steps - 1 with sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t).

    Kinds: linear (Ho et al. 2020, beta 1e-4 to 0.02), scaled_linear (Rombach et al. 2022: linear in sqrt(beta),
    0.00085 to 0.012), cosine (Nichol & Dhariwal 2021, eq. 17, offset 0.008, beta at most 0.999).
    """

    kind: str = opt("linear", "beta schedule", choices=("linear", "scaled_linear", "cosine"))
    steps: int = opt(1000, "number of training time steps", low=2)
    interpolation: str = opt(
        "linear", "time of a sigma between two steps: nearest or linear in ln sigma", choices=("nearest", "linear")
    )

    def __post_init__(self) -> None:
        check_options(self, "noise")

    @property
    def sigma_min(self) -> float:  # type: ignore[override]
        return math.exp(_ln_sigmas(self.kind, self.steps)[0].item())

    @property
    def sigma_max(self) -> float:  # type: ignore[override]
        return math.exp(_ln_sigmas(self.kind, self.steps)[-1].item())

    @property
    def alpha_bar(self) -> Tensor:
        """Cumulative products alpha_bar_t, (steps,) float64, falling."""
        return alpha_bars(self.kind, self.steps)

    def sample_sigma(self, n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        t = torch.randint(self.steps, (n,), device=device)
        sigma = self._table(torch.float32, t.device)[t].exp()
        return sigma, self.weight(sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2: the plain squared error of eps (Ho et al. 2020, eq. 14)."""
        return sigma**-2

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        t = self._exact_t(sigma)
        if self.interpolation == "nearest":
            return t.round()
        # A training level must come back as its whole number, or a network that truncates t is one step off.
        return torch.where((t - t.round()).abs() < 2e-3, t.round(), t)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        table = self._table(t.dtype if t.is_floating_point() else torch.float32, t.device)
        low = t.long().clamp(0, self.steps - 2)
        return torch.lerp(table[low], table[low + 1], (t - low).to(table.dtype)).exp()

    def start(self, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """The forward process ends at z ~ N(0, 1), hence x = sqrt(1 + sigma^2) z."""
        return noise * (1 + sigma**2) ** 0.5

    def _exact_t(self, sigma: Tensor) -> Tensor:
        # Rounding the fractional index is the nearest level in ln sigma, since the index is linear in it there.
        table = self._table(sigma.dtype, sigma.device)
        ln_sigma = sigma.log()
        high = torch.searchsorted(table, ln_sigma.contiguous()).clamp(1, self.steps - 1)
        below, above = table[high - 1], table[high]
        return (high - 1 + (ln_sigma - below) / (above - below)).clamp(0, self.steps - 1)

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _ln_sigmas(self.kind, self.steps, dtype, device)


def alpha_bars(kind: str, steps: int) -> Tensor:
    """Cumulative products of 1 - beta, (steps,) float64, for the kinds of `DiscreteLevels`."""
    if kind == "cosine":
        time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        curve = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    elif kind == "linear":
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    else:
        raise unknown("beta schedule", kind, ("linear", "scaled_linear", "cosine"))
    return (1 - beta).cumprod(0)


@functools.cache
def _ln_sigmas(
    kind: str,
    steps: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Tensor:
    a = alpha_bars(kind, steps)
    return (((1 - a) / a).log() / 2).to(device=device, dtype=dtype)


def noise_levels(kind: str = "edm", sigma_data: float = 0.5, interpolation: str = "linear") -> NoiseLevels:
    """The noise levels called `kind`: edm, linear, scaled_linear or cosine, with their published values.

    Raises:
        UserError: unknown kind or interpolation.
    """
    if kind == "edm":
        return EDMLevels(sigma_data=sigma_data)
    if kind not in ("linear", "scaled_linear", "cosine"):
        raise unknown("noise levels", kind, ("edm", "linear", "scaled_linear", "cosine"))
    return DiscreteLevels(kind=kind, interpolation=interpolation)
