"""LinearAG: the unconditional noise as a linear combination of the noises of the steps so far (arXiv 2312.12487).

    eps_u(x_t) ~ sum_{i <= t} cond[t, i] eps_c(x_i) + sum_{i < t} uncond[t, i] eps_u(x_i)     (steps counted from 0)

with scalar coefficients, shared by all pixels and samples and fitted once by least squares on stored trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise, Prediction
from filtrun.diffusion.guidance import Guided, both, mixed, per_sample
from filtrun.errors import UserError

MAX_ROWS = 400_000
"""Pixels used for a fit: of more, evenly spread ones are taken (38 coefficients need no more)."""


@dataclass(frozen=True)
class LinearCoefficients:
    """Coefficients of S steps: `cond` (S, S), row t with entries up to t; `uncond` (S, S), row t up to t - 1.

    `r2` (S,): share of eps_u's squares explained in the fit, row t for step t; all float64.
    """

    cond: Tensor
    uncond: Tensor
    r2: Tensor

    def predict(self, step: int, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> Tensor:
        """eps_u at `step` from eps_c of steps 0 to `step` and eps_u (or what stood for it) of those before."""
        terms = [self.cond[step, i].item() * cond[i] for i in range(step + 1)]
        terms += [self.uncond[step, i].item() * uncond[i] for i in range(step)]
        return torch.stack(terms).sum(0)


def fit_linear(cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> LinearCoefficients:
    """Fit the coefficients of every step on trajectories.

    Args:
        cond, uncond: for each of S steps in order, eps_c and eps_u of M samples (M, ...).

    Step 0 has nothing but its own eps_c to go by. Where the noises are collinear the shortest solution is taken.
    """
    steps = len(cond)
    stride = -(-cond[0].numel() // MAX_ROWS)
    c = [t.double().flatten().cpu()[::stride] for t in cond]
    u = [t.double().flatten().cpu()[::stride] for t in uncond]
    made = torch.zeros(2, steps, steps, dtype=torch.float64)
    r2 = torch.zeros(steps, dtype=torch.float64)
    for t in range(steps):
        columns = torch.stack([*c[: t + 1], *u[:t]], 1)
        solution = torch.linalg.lstsq(columns, u[t][:, None], driver="gelsd").solution[:, 0]
        made[0, t, : t + 1], made[1, t, :t] = solution[: t + 1], solution[t + 1 :]
        r2[t] = 1 - (columns @ solution - u[t]).square().sum() / u[t].square().sum().clamp(min=1e-300)
    return LinearCoefficients(made[0], made[1], r2)


def guided_steps(steps: int, share: float) -> int:
    """Steps at the start of a run in which LinearAG guides; afterwards it is conditional."""
    return min(steps, max(1, round(share * steps)))


class Trajectories(Guided):
    """Classifier-free guidance that keeps eps_c and eps_u of the first `keep` steps: what the fit is made from."""

    def __init__(self, inner: Denoise, scale: float, keep: int) -> None:
        self.scale, self.keep = scale, keep
        super().__init__(inner)

    def reset(self) -> None:
        self.cond: list[Tensor] = []
        self.uncond: list[Tensor] = []

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        with_class, without = both(self.inner, x, sigma, cond)
        if self.step < self.keep:
            refuse_second_call(self.step, self.cond)
            self.cond.append(with_class.eps)
            self.uncond.append(without.eps)
        return mixed(with_class, without, self.scale)


class LinearGuidance(Guided):
    """LinearAG around a denoise callable: S steps cost S evaluations and one more for every second guided step.

    In the first `share` of the run even steps are guided in full and odd ones with the predicted eps_u, which enters
    the history of the steps after it; the rest of the run is conditional.
    """

    def __init__(self, inner: Denoise, scale: float, coefficients: LinearCoefficients, share: float = 0.5) -> None:
        self.scale, self.coefficients, self.share = scale, coefficients, share
        self.calls = self.evaluations = 0.0
        super().__init__(inner)

    def reset(self) -> None:
        self.cond: list[Tensor] = []
        self.uncond: list[Tensor] = []

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        self.calls += 1
        self.evaluations += 1
        guided = guided_steps(self.steps, self.share)
        if len(self.coefficients.cond) < guided:
            raise UserError(
                f"the LinearAG coefficients are for {len(self.coefficients.cond)} guided steps, the run has {guided}"
            )
        if self.step >= guided:
            return self.inner(x, sigma, cond)
        refuse_second_call(self.step, self.cond)
        if self.step % 2 == 0:
            self.evaluations += 1
            with_class, without = both(self.inner, x, sigma, cond)
            self.cond.append(with_class.eps)
            self.uncond.append(without.eps)
            return mixed(with_class, without, self.scale)
        now = self.inner(x, sigma, cond)
        self.cond.append(now.eps)
        self.uncond.append(self.coefficients.predict(self.step, self.cond, self.uncond))
        eps = self.uncond[-1] + self.scale * (now.eps - self.uncond[-1])
        return Prediction(now.x0 - per_sample(sigma, x) * (eps - now.eps), eps)


def refuse_second_call(step: int, seen: Sequence[Tensor]) -> None:
    """Raise UserError when a step makes more than one evaluation: the coefficients belong to steps."""
    if len(seen) > step:
        raise UserError(
            "method.adaptive_guidance.variant=linear needs a sampler with one evaluation per step, such as "
            "task.sampler=ddim or dpmpp_2m"
        )
