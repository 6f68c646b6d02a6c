"""The solver of DPM-Solver-v3 (Zheng et al., NeurIPS 2023, arXiv 2310.13268; official code thu-ml/DPM-Solver-v3).

With the coefficients l, s, b of `filtrun.diffusion.model_statistics` the probability-flow ODE in x = x0 + sigma * eps,
lam = -ln sigma, has a solution in which only g(lam), a rescaled f = sigma * eps - l x, is unknown (eq. 8, 9):

    x_t = e^{L_s - L_t} x_s - e^{-L_t - S_s} (I_t - I_s) g_s - e^{-L_t} (C_t - C_s - B_s (I_t - I_s))
          - e^{L_s - L_t} sum_k E_k g^(k)
    g_i = e^{S_s - S_i} f_i - e^{S_s} (B_i - B_s)

with L, S the integrals of l and s, I = int e^{L+S}, B = int e^{-S} b, C = int e^{L+S} B, all by the trapezoid rule on
the statistics' grid, and E_k = int_s^t e^{L+S-L_s-S_s} (lam - lam_s)^k / k!. Derivatives g^(k) come from the cached
points. A corrector repeats the step with the new point among them, without a further evaluation. The official solver
rounds its grid to float32, this one does not: on the same statistics the two agree to 2e-6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.diffusion.model_statistics import ModelStatistics
from filtrun.diffusion.noise import NoiseLevels
from filtrun.diffusion.stepping import Callback, checked_grid, multistep_order
from filtrun.errors import UserError, unknown

CORRECTORS = ("none", "full", "late", "early")


@dataclass(frozen=True)
class StepWeights:
    """One step as a linear function: x_t = decay * x_s + offset + sum_j weights[j] * f_j, each of a state's shape.

    `weights` are in the order of the points they were made for, s first.
    """

    decay: Tensor
    offset: Tensor
    weights: tuple[Tensor, ...]


def derivative_weights(lambdas: list[float], pseudo: bool = False) -> Tensor:
    """Weights W (n, n + 1), float64: the k-th derivative at lambdas[0] is sum_j W[k - 1, j] g(lambdas[j]), k = 1 ... n.

    All from the polynomial through the n + 1 points; with `pseudo` the k-th from the one through the first k + 1 only
    (Newton's divided differences, "pseudo-order" in appendix B.3).
    """
    nodes, n = torch.tensor(lambdas, dtype=torch.float64), len(lambdas) - 1
    rows = torch.zeros(n, n + 1, dtype=torch.float64)
    if pseudo:
        for k in range(1, n + 1):
            for j in range(k + 1):
                others = torch.cat([nodes[:j], nodes[j + 1 : k + 1]])
                rows[k - 1, j] = math.factorial(k) / (nodes[j] - others).prod()
        return rows
    if n:
        powers = torch.stack([(nodes[1:] - nodes[0]) ** k for k in range(1, n + 1)], dim=1)
        factorials = torch.tensor([float(math.factorial(k)) for k in range(1, n + 1)], dtype=torch.float64)
        rows[:, 1:] = torch.linalg.inv(powers) * factorials[:, None]
        rows[:, 0] = -rows[:, 1:].sum(1)
    return rows


class Integrals:
    """The integrals L, S, I, B, C of the statistics and the step weights made of them, float64 on the CPU."""

    def __init__(self, statistics: ModelStatistics) -> None:
        self.lambdas = -statistics.sigmas.double().log()
        self.l, s, b = (t.double().cpu() for t in (statistics.l, statistics.s, statistics.b))
        self.L, self.S = self._cumulative(self.l), self._cumulative(s)
        growth = (self.L + self.S).exp()
        self.B = self._cumulative((-self.S).exp() * b)
        self.I, self.C = self._cumulative(growth), self._cumulative(growth * self.B)

    def step(self, start: int, end: int, points: list[int], pseudo: bool = False) -> StepWeights:
        """Weights of the step between two grid indices; `points` are the indices of the f in use, `start` first."""
        L, S, B, C = (t[[start, end]] for t in (self.L, self.S, self.B, self.C))
        whole = self.I[end] - self.I[start]
        decay = (L[0] - L[1]).exp()
        rows = derivative_weights([self.lambdas[i].item() for i in points], pseudo)
        of_g = [torch.zeros_like(decay) for _ in points]
        of_g[0] = -(-L[1] - S[0]).exp() * whole
        for k, row in enumerate(rows, 1):
            term = -decay * self._moment(start, end, k)
            of_g = [g + term * w for g, w in zip(of_g, row.tolist(), strict=True)]
        # g_i = e^{S_s - S_i} f_i - e^{S_s} (B_i - B_s)
        offset = -(-L[1]).exp() * (C[1] - C[0] - B[0] * whole)
        offset = offset - sum(g * S[0].exp() * (self.B[i] - B[0]) for g, i in zip(of_g, points, strict=True))
        weights = tuple(g * (S[0] - self.S[i]).exp() for g, i in zip(of_g, points, strict=True))
        return StepWeights(decay, offset, weights)

    def _moment(self, start: int, end: int, k: int) -> Tensor:
        """E_k = int e^{L + S - L_s - S_s} (lam - lam_s)^k / k! over the grid points from start to end."""
        part = slice(start, end + 1)
        growth = (self.L[part] + self.S[part] - self.L[start] - self.S[start]).exp()
        away = _column(self.lambdas[part] - self.lambdas[start], growth)
        return torch.trapezoid(growth * away**k / math.factorial(k), self.lambdas[part], dim=0)

    def _cumulative(self, values: Tensor) -> Tensor:
        total = torch.cumulative_trapezoid(values, self.lambdas, dim=0)
        return torch.cat([torch.zeros_like(values[:1]), total])


class DPMSolverV3:
    """DPM-Solver-v3 as a sampler: call it like the functions of `filtrun.diffusion.samplers`, on a grid from `grid`.

    Args:
        statistics: of the denoiser that will be sampled.
        order: 1, 2 or 3 (paper: 3 without guidance, 2 with it).
        pseudo_predictor: derivatives of the predictor by pseudo-order; None: in runs of 5 steps and fewer, as the
            official script for EDM does.
        corrector: "none", "full", "late" (only below `half_sigma`, the paper's half corrector), "early" (only above it,
            which is what the official Stable Diffusion code does under that name); None: full in runs of 6 steps and
            fewer, as the script for EDM does.
        pseudo_corrector: raise the corrector's order by one, by pseudo-order ("c_pseudo", the official choice for
            guided sampling).
        lower_order_final: order 1 in the last step and 2 in the one before it.
        half_sigma: where the two halves of sampling meet, for "late" and "early".
        spacing: of the noise levels that `grid` gives: "log", "karras" or "uniform_t".

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(
        self,
        statistics: ModelStatistics,
        order: int = 3,
        *,
        pseudo_predictor: bool | None = None,
        corrector: str | None = None,
        pseudo_corrector: bool = False,
        lower_order_final: bool = True,
        half_sigma: float = 0.5,
        spacing: str = "log",
    ) -> None:
        if order not in (1, 2, 3):
            raise UserError(f"order={order} is not allowed; choose 1, 2 or 3")
        if corrector is not None and corrector not in CORRECTORS:
            raise unknown("corrector", corrector, CORRECTORS)
        self.statistics, self.order, self.half_sigma, self.spacing = statistics, order, half_sigma, spacing
        self.pseudo_predictor, self.corrector = pseudo_predictor, corrector
        self.pseudo_corrector, self.lower_order_final = pseudo_corrector, lower_order_final
        self.integrals = Integrals(statistics)

    def grid(self, levels: NoiseLevels, steps: int) -> Tensor:
        """`steps` + 1 noise levels, float64: those of `levels.sigmas` (which see), moved onto the statistics' grid.

        Both ends are those of the statistics. Raises UserError when two levels meet in one grid point.
        """
        first, last = self.statistics.sigmas[0].item(), self.statistics.sigmas[-1].item()
        wanted = levels.sigmas(steps, self.spacing, sigma_min=last, sigma_max=first, zero=False)
        return self.statistics.sigmas[self.indices(wanted)]

    def indices(self, sigmas: Tensor) -> list[int]:
        """The nearest grid point of each noise level; UserError when two meet in one."""
        lambdas = self.integrals.lambdas
        place = (-sigmas.double().cpu().log() - lambdas[0]) / (lambdas[-1] - lambdas[0]) * (len(lambdas) - 1)
        found = [int(i) for i in place.round().clamp(0, len(lambdas) - 1)]
        if any(a >= b for a, b in zip(found, found[1:], strict=False)):
            raise UserError(
                f"{len(found) - 1} steps are too many for statistics at {len(lambdas)} noise levels: two of them fall "
                "on the same one; take fewer steps or a finer statistics grid"
            )
        return found

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        cond: Tensor | None = None,
        *,
        callback: Callback | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample from x (N, C, H, W), the state at sigmas[0]; one evaluation per step. Not used: `generator`.

        Noise levels off the statistics' grid are moved onto it. A last level 0 gets a plain step of first order.
        """
        levels, values = checked_grid(sigmas, x)
        to_zero = values[-1] == 0
        points = self.indices(sigmas[:-1] if to_zero else sigmas)
        on_grid = self.statistics.sigmas[points].to(x)
        levels = torch.cat([on_grid, levels[-1:]]) if to_zero else on_grid
        plan, steps = self.integrals, len(values) - 1
        corrector = self.corrector or ("full" if steps <= 6 else "none")
        pseudo = steps <= 5 if self.pseudo_predictor is None else self.pseudo_predictor
        linear = plan.l[points].to(x)
        predictors, correctors = self._weights(points, values, corrector, pseudo, x)
        begin(denoise, levels)
        history: list[Tensor] = []  # f at points[0], points[1], ..., newest last
        before = predicted = x
        for i in range(steps):
            x = begin_step(denoise, i, x, cond)
            now = denoise(x, levels[i], cond)
            if callback is not None:
                callback(i, levels[i], x, now)
            if i == steps - 1 and to_zero:
                return now.x0
            history.append(x - now.x0 - linear[i] * x)
            if i in correctors:
                nodes, step = correctors[i]
                # f at the new point stays: the correction moves x and leaves sigma * eps - l x
                x = x + (_apply(step, before, [history[j] for j in nodes]) - predicted)
            nodes, step = predictors[i]
            before = x
            x = predicted = _apply(step, x, [history[j] for j in nodes])
        return x

    def _weights(
        self, points: list[int], values: list[float], corrector: str, pseudo: bool, x: Tensor
    ) -> tuple[dict[int, tuple[list[int], StepWeights]], dict[int, tuple[list[int], StepWeights]]]:
        """What predicts from each step, and what corrects at some: (steps whose f is used, weights as x is).

        All of them before the first step and in one copy to the device, which the loop is not to wait for.
        """
        predictors: dict[int, tuple[list[int], StepWeights]] = {}
        correctors: dict[int, tuple[list[int], StepWeights]] = {}
        used, steps = 0, len(values) - 1
        for i in range(len(points) - 1):
            reach = used + self.pseudo_corrector
            if i > 0 and reach > 1 and self._corrects(corrector, values[i]):
                nodes = [i - 1, i, *range(i - 2, i - reach, -1)]
                correctors[i] = nodes, self._step(points, i - 1, nodes, self.pseudo_corrector)
            used = multistep_order(i, steps, self.order, self.lower_order_final)
            nodes = list(range(i, i - used, -1))
            predictors[i] = nodes, self._step(points, i, nodes, pseudo)
        return _moved(predictors, x), _moved(correctors, x)

    def _step(self, points: list[int], i: int, nodes: list[int], pseudo: bool) -> StepWeights:
        return self.integrals.step(points[i], points[i + 1], [points[j] for j in nodes], pseudo)

    def _corrects(self, corrector: str, sigma: float) -> bool:
        return {"none": False, "full": True, "late": sigma <= self.half_sigma, "early": sigma > self.half_sigma}[
            corrector
        ]


def _moved(steps: dict[int, tuple[list[int], StepWeights]], x: Tensor) -> dict[int, tuple[list[int], StepWeights]]:
    """The same weights in the dtype and on the device of x."""
    flat = [t for _, step in steps.values() for t in (step.decay, step.offset, *step.weights)]
    there = iter(torch.stack(flat).to(x).unbind()) if flat else iter(())
    return {
        i: (nodes, StepWeights(next(there), next(there), tuple(next(there) for _ in step.weights)))
        for i, (nodes, step) in steps.items()
    }


def _apply(step: StepWeights, x: Tensor, points: list[Tensor]) -> Tensor:
    x = step.decay * x + step.offset
    for weight, f in zip(step.weights, points, strict=True):
        x = x + weight * f
    return x


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
