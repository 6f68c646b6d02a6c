"""CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models.

ICLR 2025, arXiv 2406.08070; official code CFGpp-diffusion/CFGpp (``latent_diffusion.py``). The clean image is taken
from the interpolated noise eps_u + scale * (eps_c - eps_u), scale in [0, 1], but the step back to the next noise level
uses the unconditional noise, so that the state stays where noisy images lie.

In this package a prediction carries both: `x0`, to which a step denoises, and `eps`, along which it renoises. So the
rule is one line, and every sampler has its CFG++ form: DDIM, Euler, Euler ancestral, DPM++ 2M (which stores the clean
image that eps stands for, the unconditional one) and DPM++ 2S ancestral agree with the official ones, and
`ddim_inversion` swaps the roles as theirs does.

Exactly, one DDIM step with `scale` is one step of classifier-free guidance with scale / (1 - sigma' / sigma)
(`equivalent_scale`): the guidance grows with the number of steps, so choose scale and steps together.

On any denoise callable, in two lines:

>>> images = ddim(cfgpp(denoise, scale=0.6), x, sigmas, classes)  # doctest: +SKIP
>>> noise = ddim_inversion(cfgpp(denoise, scale=0.6), images, sigmas, classes)  # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from filtrun.diffusion.denoiser import Denoise, Prediction
from filtrun.diffusion.guidance import Guided, both
from filtrun.diffusion.inversion import ddim_inversion
from filtrun.method import Method
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

__all__ = ["CFGpp", "cfgpp", "ddim_inversion", "equivalent_scale"]


def equivalent_scale(scale: float, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor | float:
    """The scale of classifier-free guidance whose DDIM step from `sigma` to `sigma_next` is that of CFG++.

    scale / (1 - sigma_next / sigma); at the step to 0 it is `scale` itself.
    """
    return scale / (1 - sigma_next / sigma)


class ManifoldGuidance(Guided):
    """CFG++ around a denoise callable; see `cfgpp`."""

    def __init__(self, inner: Denoise, scale: float) -> None:
        super().__init__(inner)
        self.scale = scale

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        if self.scale == 0:
            return self.inner(x, sigma, None)
        with_class, without = both(self.inner, x, sigma, cond)
        return Prediction(without.x0 + self.scale * (with_class.x0 - without.x0), without.eps)


def cfgpp(denoise: Denoise, scale: float) -> ManifoldGuidance:
    """CFG++ around a denoise callable: x0 interpolated by `scale`, eps unconditional; two evaluations a call.

    scale 0 is the unconditional sampler (one evaluation); 1 is not the conditional one, as eps stays unconditional.
    Values above 1 are allowed.
    """
    return ManifoldGuidance(denoise, scale)


@dataclass
class CFGpp(Method):
    """Guide the clean image and renoise without guidance; the paper pairs scales 0.2 to 1 with CFG's 2 to 12.5."""

    scale: float = opt(0.6, "share lambda of the way from the unconditional to the conditional prediction", low=0,
                       source="readme: 0.6 with 50 DDIM steps")  # fmt: skip

    tasks: ClassVar[tuple[str, ...]] = ("diffuse",)
    combines: ClassVar[bool] = True
    paper: ClassVar[str] = "CFG++, arXiv 2406.08070 (ICLR 2025)"

    def __post_init__(self) -> None:
        check_options(self, "method.cfgpp")

    def guide(self, run: Run, denoise: Denoise) -> Denoise:
        return cfgpp(denoise, self.scale)

    def report(self, run: Run) -> dict[str, float | int | str]:
        """`mean_equivalent_scale`: the scale of classifier-free guidance with the same DDIM steps, over the steps."""
        from filtrun.diffusion.noise import noise_levels
        from filtrun.tasks.diffuse import Diffuse

        report: dict[str, float | int | str] = {"scale": self.scale}
        if isinstance(run.task, Diffuse):
            task = run.task
            sigmas = noise_levels(task.noise, task.sigma_data).sigmas(task.sample_steps, task.grid, zero=task.to_zero)
            report["mean_equivalent_scale"] = float((self.scale / (1 - sigmas[1:] / sigmas[:-1])).mean())
        return report
