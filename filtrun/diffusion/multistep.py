"""DPM-Solver++ and UniPC: samplers of higher order that reuse the denoiser's earlier answers, one evaluation per step.

Both integrate dx / dlam = D(x, sigma) - x, lam = -ln sigma, the probability-flow ODE in variables x = x0 + sigma * eps,
exactly in x and with a polynomial in lam through the last denoised images D:

    x' = x0 + sigma' * eps + sum_j w_j (x0 - D_j)

Where a prediction's x0 and eps disagree (CFG++), the step goes to x0, renoises along eps, and the stored D_j are those
that belong to eps, `Prediction.x0_of_eps`: the unconditional ones. For DPM-Solver++ 2M that is the official CFG++ form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import begin, begin_step
from filtrun.diffusion.stepping import Callback, checked_grid, multistep_order
from filtrun.errors import UserError, unknown

VARIANTS = ("bh1", "bh2")


def dpmpp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    full_third_order: bool = False,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multistep DPM-Solver++ of order 1, 2 or 3 (Lu et al. 2022, arXiv 2211.01095; code LuChengTHU/dpm-solver).

    Order 1 is DDIM, order 2 the midpoint-like "dpmsolver" form of the code ("2M"), order 3 its Taylor form ("3M"). The
    step to sigma = 0 is of first order. Not used: `generator`.

    Args:
        order: 1, 2 or 3.
        lower_order_final: order 1 in the last step and 2 in the one before it, as the papers sample with few steps.
        full_third_order: the published third-order update takes half of its second-derivative term, so its error falls
            as that of a second-order method; True takes the whole term, and the error falls with the third power.

    Raises:
        UserError: another order, or levels that do not fall.
    """
    _check_order(order)
    sigmas, values = checked_grid(sigmas, x)
    steps = len(values) - 1
    begin(denoise, sigmas)
    past: list[Tensor] = []  # denoised images that belong to eps, newest first
    for i in range(steps):
        x = begin_step(denoise, i, x, cond)
        now = denoise(x, sigmas[i], cond)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        weights: list[float] = []
        if values[i + 1] > 0:
            used = multistep_order(i, steps, order, lower_order_final)
            weights = dpmpp_weights([-math.log(v) for v in values[i + 1 - used : i + 2]], full_third_order)
        stored = now.x0_of_eps(x, sigmas[i])
        x = now.x0 + sigmas[i + 1] * now.eps
        for weight, old in zip(weights, past, strict=False):
            x = x + weight * (now.x0 - old)
        past = [stored, *past][: order - 1]
    return x


def dpmpp_weights(lambdas: list[float], full_third_order: bool = False) -> list[float]:
    """Weights w_j of the differences x0 - D_j, newest D_j first, of a DPM-Solver++ step of order len(lambdas) - 1.

    Args:
        lambdas: lam = -ln sigma of the points in use, oldest first, then that of the step's end.
        full_third_order: see `dpmpp`.
    """
    h = lambdas[-1] - lambdas[-2]
    phi1 = math.expm1(-h)
    if len(lambdas) == 2:
        return []
    r0 = (lambdas[-2] - lambdas[-3]) / h
    if len(lambdas) == 3:
        return [-phi1 / (2 * r0)]
    r1 = (lambdas[-3] - lambdas[-4]) / h
    phi2 = phi1 / h + 1
    phi3 = phi2 / h - 0.5
    # slopes over the newest interval and the one before it; (a, b) stands for a (x0 - D_1) + b (x0 - D_2)
    first, second = (1 / r0, 0.0), (-1 / r1, 1 / r1)
    slope = [f + r0 / (r0 + r1) * (f - s) for f, s in zip(first, second, strict=True)]
    bend = [(f - s) / (r0 + r1) for f, s in zip(first, second, strict=True)]
    return [phi2 * d1 - phi3 * (2 if full_third_order else 1) * d2 for d1, d2 in zip(slope, bend, strict=True)]


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    cond: Tensor | None = None,
    *,
    order: int = 3,
    variant: str = "bh2",
    lower_order_final: bool = True,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """UniPC of order 1, 2 or 3 on data predictions (Zhao et al. 2023, arXiv 2302.04867; official code wl-zhao/UniPC).

    Each new denoised image first corrects the state it was computed at, then predicts the next one: with order p the
    error falls with the power p + 1 for one evaluation per step. The last step has no correction, the step to
    sigma = 0 is of first order. Not used: `generator`.

    Args:
        order: 1, 2 or 3.
        variant: B(h) of the paper, bh1: h, bh2: e^h - 1. They differ where the code fixes the one weight at 1/2: the
            prediction of order 2 and the correction of order 1.
        lower_order_final: order 1 in the last step and 2 in the one before it.

    Raises:
        UserError: another order or variant, or levels that do not fall.
    """
    _check_order(order)
    if variant not in VARIANTS:
        raise unknown("variant of unipc", variant, VARIANTS)
    sigmas, values = checked_grid(sigmas, x)
    steps = len(values) - 1
    begin(denoise, sigmas)
    past: list[Tensor] = []
    plain = predicted = x
    differences: list[Tensor] = []
    correction: list[float] = []
    for i in range(steps):
        x = begin_step(denoise, i, x, cond)
        now = denoise(x, sigmas[i], cond)
        if callback is not None:
            callback(i, sigmas[i], x, now)
        stored = now.x0_of_eps(x, sigmas[i])
        if i > 0:  # a guidance may have moved the state since it was predicted: keep that
            corrected = _add(plain, correction, [*differences, now.x0 - past[0]])
            x = x + (corrected - predicted)
        plain = now.x0 + sigmas[i + 1] / sigmas[i] * (x - stored)
        differences = [now.x0 - old for old in past]
        prediction: list[float] = []
        if values[i + 1] > 0:
            used = multistep_order(i, steps, order, lower_order_final)
            lambdas = [-math.log(v) for v in values[i + 1 - used : i + 2]]
            prediction, correction = unipc_weights(lambdas, variant)
        differences = differences[: len(prediction)]
        x = predicted = _add(plain, prediction, differences)
        past = [stored, *past][: max(order - 1, 1)]
    return x


def unipc_weights(lambdas: list[float], variant: str = "bh2") -> tuple[list[float], list[float]]:
    """Weights of one UniPC step of order len(lambdas) - 1: those of the prediction and those of its correction.

    Args:
        lambdas: lam = -ln sigma of the points in use, oldest first, then that of the step's end.
        variant: bh1 or bh2.

    Returns:
        Weights of x0 - D_j, newest D_j first; the correction has one more, of (D at the step's end) - x0.
    """
    order, h = len(lambdas) - 1, lambdas[-1] - lambdas[-2]
    ratios = [(lam - lambdas[-2]) / h for lam in reversed(lambdas[:-2])] + [1.0]
    scale = -h if variant == "bh1" else math.expm1(-h)
    phi, factorial, right = math.expm1(-h) / -h - 1, 1, []
    for k in range(1, order + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    points = torch.tensor(ratios, dtype=torch.float64)
    powers = torch.stack([points**k for k in range(order)])
    known = torch.tensor(right, dtype=torch.float64)
    predictor = [0.5] if order == 2 else torch.linalg.solve(powers[:-1, :-1], known[:-1]).tolist()  # [] for order 1
    corrector = [0.5] if order == 1 else torch.linalg.solve(powers, known).tolist()
    # a point's slope is (D_j - x0) / ratio; the weights are of x0 - D_j, and of (D - x0) for the end, whose ratio is 1
    return (
        [scale * rho / r for rho, r in zip(predictor, ratios, strict=False)],
        [scale * rho / r for rho, r in zip(corrector[:-1], ratios, strict=False)] + [-scale * corrector[-1]],
    )


def _add(x: Tensor, weights: list[float], tensors: list[Tensor]) -> Tensor:
    for weight, tensor in zip(weights, tensors, strict=True):
        x = x + weight * tensor
    return x


def _check_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise UserError(f"order={order} is not allowed; choose 1, 2 or 3")
