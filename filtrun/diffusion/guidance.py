"""Guidance: rules that wrap a denoise callable, how they learn where in a run they are, and classifier-free guidance.

A rule is a denoise callable around another one, so rules nest and any sampler takes them. Many need more than the
state: the step, the next noise level, a memory of the run. Samplers therefore announce what they do: `begin` once
before their first call, `begin_step` at the start of every step. Both do nothing for a plain denoiser or function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise, Prediction
from filtrun.errors import UserError


def begin(denoise: Denoise, sigmas: Tensor) -> None:
    """Tell a denoise callable that a sampling run over `sigmas` (S + 1,) starts: it forgets the run before."""
    announce = getattr(denoise, "begin", None)
    if announce is not None:
        announce(sigmas)


def begin_step(denoise: Denoise, step: int, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """Tell it that solver step `step` (from 0) starts at x (N, C, H, W); returns the state to step from, mostly x.

    Every call up to the next announcement belongs to this step, also the second one of Heun's method.
    """
    announce = getattr(denoise, "begin_step", None)
    return x if announce is None else announce(step, x, cond)


def both(
    denoise: Denoise, x: Tensor, sigma: Tensor, cond: Tensor, rows: Tensor | None = None
) -> tuple[Prediction, Prediction]:
    """(conditional, unconditional) predictions: one joint network call where `denoise` can, else two calls.

    `rows` (M,) int64 names the samples to make the unconditional prediction for; its tensors are then (M, C, H, W).
    """
    together = getattr(denoise, "both", None)
    if together is not None:
        return together(x, sigma, cond) if rows is None else together(x, sigma, cond, rows)
    if rows is None:
        return denoise(x, sigma, cond), denoise(x, sigma, None)
    return denoise(x, sigma, cond), denoise(x[rows], sigma if sigma.ndim == 0 else sigma[rows], None)


class Guided:
    """Base of guidance rules: a denoise callable around another one that knows the step and the noise levels.

    A rule overrides `guide`, and `reset` when it keeps something over the run. Calls without a condition go through
    unguided, so that rules nest: the outer one asks the inner one for its unconditional prediction.

    A sampler that announces no steps (any function that calls a denoiser can sample) is taken to make one call for
    each step; it must be announced by `begin` itself.

    Attributes:
        inner: the denoise callable inside.
        sigmas: noise levels of the run, S + 1 numbers; empty before `begin`.
        step: number of the solver step, -1 before the first.
    """

    def __init__(self, inner: Denoise) -> None:
        self.inner = inner
        self.begin(torch.empty(0))

    def begin(self, sigmas: Tensor) -> None:
        """See `begin`."""
        self.sigmas: list[float] = sigmas.tolist()
        self.step, self.announced = -1, False
        begin(self.inner, sigmas)
        self.reset()

    def begin_step(self, step: int, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """See `begin_step`."""
        self.step, self.announced = step, True
        return begin_step(self.inner, step, x, cond)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Prediction:
        if cond is None:
            return self.inner(x, sigma, None)
        if not self.announced:
            self.step += 1
        return self.guide(x, sigma, cond)

    def reset(self) -> None:
        """Forget the run before."""

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        """The guided prediction for classes `cond` (N,) at x (N, C, H, W)."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Solver steps S of the run. Raises UserError when it was not announced."""
        if not self.sigmas:
            raise UserError(
                f"{type(self).__name__} needs the noise levels of the run: call begin(denoise, sigmas) before sampling"
            )
        return len(self.sigmas) - 1


class ClassifierFree(Guided):
    """Classifier-free guidance as a `Guided` rule; see `cfg`."""

    def __init__(self, inner: Denoise, scale: float) -> None:
        super().__init__(inner)
        self.scale = scale

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        if self.scale == 1:
            return self.inner(x, sigma, cond)
        if self.scale == 0:
            return self.inner(x, sigma, None)
        return mixed(*both(self.inner, x, sigma, cond), self.scale)


def cfg(denoise: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): D_u + scale * (D_c - D_u).

    scale 1 is the conditional denoiser and costs one evaluation, 0 the unconditional one; everything else costs two.
    (The paper's weight w is scale - 1.) A call without condition is passed on unguided, so rules nest.
    """
    return ClassifierFree(denoise, scale)


def mixed(conditional: Prediction, unconditional: Prediction, scale: float) -> Prediction:
    """Unconditional + scale * (conditional - unconditional), for both x0 and eps."""
    d_c, d_u = conditional, unconditional
    return Prediction(d_u.x0.lerp(d_c.x0, scale), d_u.eps.lerp(d_c.eps, scale))


def per_sample(value: Any, x: Tensor) -> Tensor:
    """`value`, a number, a scalar tensor or (N,), with the trailing axes of x (N, ...), dtype and device of x."""
    made = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return made.reshape(-1, *[1] * (x.ndim - 1)) if made.ndim else made
