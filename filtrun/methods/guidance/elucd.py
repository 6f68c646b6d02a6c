"""EluCD: Elucidating The Design Space of Classifier-Guided Diffusion Generation.

ICLR 2024, arXiv 2310.11311; official code AlexMaOLS/EluCD. A classifier that has only ever seen clean images guides a
diffusion model, without being trained on noise: its ReLUs become Softplus, so that gradients are smooth; it looks at
the denoised image and the gradient stops there; the denominator of its softmax has a temperature of its own; and the
strength follows a schedule with a sine added. Two variants, as released:

- ``ddpm`` (``DDPM/``, for an ancestral sampler): after each step the state moves by (variance + bonus) times the
  gradient at the denoised image, with the variance of the step's posterior.
- ``edm`` (``EDM/``, for Heun): before each step the state moves along the gradient at the noisy state itself, divided
  by its root mean square where that is above 1; the move has a fixed share of the state's length.

It adds to a class-conditional model and does not replace the condition; with a rule of classifier-free guidance it
nests: ``method=[apg,elucd]`` moves the state by the gradient at APG's image. The ddpm variant's moves are in the
variance-preserving variables of the paper, whatever the noise levels of the model.

Where the official code surprises: its classifiers, trained on images normalised for ImageNet, are given images in
[-1, 1] (``classifier_input=signed``); the gradient at the denoised image is used as if it were one at the state; the
edm variant looks at the noisy state although the paper argues for the denoised one. The last two are kept.

On any denoise callable, in two lines (`classifier` maps images in [-1, 1] to logits):

>>> guided = elucd(denoise, classifier, gamma=0.3)  # doctest: +SKIP
>>> images = ancestral(guided, x, sigmas, classes)  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from filtrun.diffusion.denoiser import Denoise, Prediction
from filtrun.diffusion.guidance import Guided, per_sample
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.methods.guidance.guide_classifier import (
    INPUTS,
    Guide,
    classifier_gradient,
    guide_classifier,
    soften,
    softened,
    tempered_log_prob,
)
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

__all__ = ["EluCD", "classifier_gradient", "elucd", "soften", "tempered_log_prob"]


def posterior_variance(sigma: float, sigma_next: float) -> float:
    """Variance of q(z' | z, x0) between two noise levels of a variance-preserving process: DDPM's beta tilde."""
    return sigma_next**2 / (1 + sigma_next**2) * (1 - (sigma_next / sigma) ** 2)


def sine_bonus(t: float, steps: int, largest_variance: float, gamma: float) -> float:
    """What the ddpm variant adds to the variance at time t of `steps`: gamma V sin(pi t / T), at least 0."""
    return max(gamma * largest_variance * math.sin(math.pi * t / steps), 0.0)


def edm_strength(step: int, steps: int, max_guidance: float, add_factor: float) -> float:
    """Length of the edm variant's move as a share of the state's, at step number `step` (from 0) of `steps`.

    Falls linearly from max_guidance, never below 1e-5, plus max_guidance * add_factor * sin(pi step / steps).
    max_guidance = 0 switches the guidance off, floor included.
    """
    if max_guidance == 0:
        return 0.0
    line = max(max_guidance / (steps + 1) * (steps + 1 - step), 1e-5)
    return line + math.sin(math.pi * step / steps) * max_guidance * add_factor


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample (N,) of x (N, ...)."""
    return x.flatten(1).square().mean(1).sqrt()


class ClassifierGuided(Guided):
    """What both variants share: the classifier, the temperatures and the count of classifier calls per sample."""

    def __init__(self, inner: Denoise, classifier: Callable[[Tensor], Tensor], joint: float, denominator: float):
        self.classifier, self.joint, self.denominator = classifier, joint, denominator
        super().__init__(inner)

    def reset(self) -> None:
        self.calls = 0

    def gradient(self, x: Tensor, cond: Tensor) -> Tensor:
        self.calls += 1
        return classifier_gradient(self.classifier, x, cond, self.joint, self.denominator)

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        if not self.announced and self.step > 0:  # one call alone is a question about the denoiser, not a run
            raise UserError(
                "this sampler does not say where its steps begin, which elucd needs: call x = begin_step(denoise, i, "
                "x, cond) at the start of each step"
            )
        return self.inner(x, sigma, cond)


class PosteriorShift(ClassifierGuided):
    """The ddpm variant around a denoise callable; see `elucd`.

    A step's shift is added when the next one begins, after the sampler's noise: the same as shifting the mean.
    """

    def __init__(
        self, inner: Denoise, classifier: Callable[[Tensor], Tensor], joint: float, discount: float, gamma: float,
        scale: float,
    ) -> None:  # fmt: skip
        self.gamma, self.scale = gamma, scale
        super().__init__(inner, classifier, joint, joint * discount)

    def reset(self) -> None:
        super().reset()
        self.shift: Tensor | None = None
        self.largest, self.seen = 0.0, -1

    def begin_step(self, step: int, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.shift is not None:
            x, self.shift = x + self.shift, None
        return super().begin_step(step, x, cond)

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        now = super().guide(x, sigma, cond)
        if self.step != self.seen and self.scale:  # the second call of a step is none of its own
            self.seen = self.step
            strength = self.strength(self.step)
            if strength:
                self.shift = strength * self.gradient(now.x0, cond)
        return now

    def strength(self, step: int) -> float:
        """Factor of the gradient in the move after step number `step`, in variables x = x0 + sigma eps."""
        steps, (sigma, below) = self.steps, self.sigmas[step : step + 2]
        variance = posterior_variance(sigma, below)
        self.largest = max(self.largest, variance)
        bonus = sine_bonus(steps - 1 - step, steps, self.largest, self.gamma)
        return (variance + bonus) * self.scale * math.sqrt(1 + below**2)


class StateShift(ClassifierGuided):
    """The edm variant around a denoise callable; see `elucd`."""

    def __init__(
        self, inner: Denoise, classifier: Callable[[Tensor], Tensor], joint: float, denominator: float,
        max_guidance: float, add_factor: float,
    ) -> None:  # fmt: skip
        self.max_guidance, self.add_factor = max_guidance, add_factor
        super().__init__(inner, classifier, joint, denominator)

    def begin_step(self, step: int, x: Tensor, cond: Tensor | None = None) -> Tensor:
        x = super().begin_step(step, x, cond)
        strength = edm_strength(step, self.steps, self.max_guidance, self.add_factor)
        if cond is None or not strength:
            return x
        length = rms(x)
        direction = self.gradient(x / per_sample(length.clamp(min=1), x), cond)
        return x + direction * per_sample(length * strength / rms(direction).clamp(min=1e-30), x)


def elucd(
    denoise: Denoise,
    classifier: Callable[[Tensor], Tensor],
    variant: str = "ddpm",
    *,
    scale: float = 1.0,
    joint_temperature: float = 1.0,
    margin_discount: float = 0.5,
    gamma: float = 0.3,
    uncond_temperature: float = 0.0,
    max_guidance: float = 0.004,
    add_factor: float = 0.3,
) -> ClassifierGuided:
    """Guidance by a clean-image classifier around a denoise callable; options as in `EluCD`.

    `classifier` maps images (N, C, H, W) in [-1, 1] to logits (N, K) and is differentiable (`Guide` makes one of any
    network, `soften` smooths it). One classifier call a step. The sampler must announce its steps, as all of this
    package do.

    Raises UserError for an unknown variant.
    """
    if variant == "ddpm":
        return PosteriorShift(denoise, classifier, joint_temperature, margin_discount, gamma, scale)
    if variant == "edm":
        return StateShift(denoise, classifier, joint_temperature, uncond_temperature, max_guidance, add_factor)
    raise UserError(f"variant={variant} is not allowed; choose from ddpm, edm")


@dataclass
class EluCD(Method):
    """Guide with the gradient of an off-the-shelf classifier; `scale`, `margin_discount` and `gamma` belong to ddpm,
    `uncond_temperature`, `max_guidance` and `add_factor` to edm."""

    variant: str = opt("ddpm", "move by posterior variance after a step, or by a share of the state before it",
                       choices=("ddpm", "edm"))  # fmt: skip
    softplus_beta: float | None = opt(3.0, "sharpness of the Softplus that replaces ReLU; null: keep ReLU", low=1e-3,
                                      source="DDPM/guided_sample.sh; EDM: 5.0")  # fmt: skip
    joint_temperature: float = opt(1.0, "factor of the logits, the numerator's", low=0, source="guided_sample.sh")
    scale: float = opt(1.0, "factor of the gradient; 0: off", low=0, source="DDPM/guided_sample.sh")
    margin_discount: float = opt(0.5, "the denominator's temperature / the numerator's; 1: softmax, 0: logit only",
                                 low=0, source="DDPM/guided_sample.sh")  # fmt: skip
    gamma: float = opt(0.3, "sine bonus over the largest variance", low=0, source="DDPM/guided_sample.sh")
    uncond_temperature: float = opt(0.0, "the denominator's temperature", low=0, source="EDM/guided_sample.sh")
    max_guidance: float = opt(0.004, "move / length of the state at the first step; 0: off", low=0,
                              source="EDM/guided_sample.sh")  # fmt: skip
    add_factor: float = opt(0.3, "sine added to it, as a share of max_guidance", source="EDM/guided_sample.sh")
    classifier: str = opt("small_cnn", "the classifier: small_cnn, or a timm model", source="paper: ResNet-50, 101")
    classifier_weights: str | None = opt(None, "local file with its weights; null: train it, on clean images")
    classifier_steps: int | None = opt(None, "steps of that training; null: as many as the judge's", low=1)
    classifier_input: str = opt("unit", "what it reads: [0, 1], ImageNet-normalised, or [-1, 1] as the official code",
                                choices=INPUTS)  # fmt: skip

    tasks: ClassVar[tuple[str, ...]] = ("diffuse",)
    paper: ClassVar[str] = "EluCD, arXiv 2310.11311 (ICLR 2024)"

    def __post_init__(self) -> None:
        check_options(self, "method.elucd")
        self.net: Guide | None = None
        self.guided: ClassifierGuided | None = None

    # -- hooks -----------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        steps = self.classifier_steps or int(getattr(run.task, "judge_steps", 400))
        net = guide_classifier(run, self.classifier, self.classifier_weights, steps, self.classifier_input)
        self.net = Guide(softened(net, self.softplus_beta), self.classifier_input)

    def guide(self, run: Run, denoise: Denoise) -> Denoise:
        assert self.net is not None
        self.guided = elucd(
            denoise, self.net, self.variant, scale=self.scale, joint_temperature=self.joint_temperature,
            margin_discount=self.margin_discount, gamma=self.gamma, uncond_temperature=self.uncond_temperature,
            max_guidance=self.max_guidance, add_factor=self.add_factor,
        )  # fmt: skip
        return self.guided

    def report(self, run: Run) -> dict[str, float | int | str]:
        """`classifier_calls`: forward and backward passes of the classifier for one sample."""
        calls = {} if self.guided is None else {"classifier_calls": self.guided.calls}
        return {"classifier": self.classifier, **calls}
