"""APG: Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models.

ICLR 2025, arXiv 2410.02416; there is no official repository, the paper prints the rule. Classifier-free guidance adds
a multiple of d = D_c - D_u to the conditional prediction. The part of d that is parallel to D_c mostly raises contrast
and saturation, so it is turned down (`eta`); d is limited in length (`norm`) and freed of what it has in common with
the steps before (`momentum`, negative). No training, no further network call.

Where other implementations differ: the guider of diffusers adds ``scale * update`` to D_u or D_c, and works on the
network's raw output; the paper adds ``(scale - 1) * update`` to D_c and works on denoised images (``space=x0``). In
terms of eps the parallel direction is mostly noise and the effect almost vanishes (``space=eps`` to see it).

On any denoise callable, in two lines:

>>> guided = apg(denoise, scale=4.0, norm=2.5)  # doctest: +SKIP
>>> images = heun(guided, x, sigmas, classes)  # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from filtrun.diffusion.denoiser import Denoise, Prediction
from filtrun.diffusion.guidance import Guided, both, per_sample
from filtrun.method import Method
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run


def project(update: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """Split `update` (N, ...) into its parts (parallel, orthogonal) to `onto`, for each sample over all other axes.

    Computed in float64 and returned in the type of `update` (paper, Algorithm 1).
    """
    a, b = update.double().flatten(1), onto.double().flatten(1)
    share = (a * b).sum(1) / b.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    parallel = (share[:, None] * b).reshape(update.shape)
    return parallel.to(update.dtype), (update.double() - parallel).to(update.dtype)


def clipped(update: Tensor, norm: float | None) -> Tensor:
    """Shorten each sample of `update` (N, ...) to an L2 norm of at most `norm`; None or 0 leaves it."""
    if not norm:
        return update
    length = update.flatten(1).norm(dim=1)
    return update * per_sample((norm / length.clamp(min=1e-30)).clamp(max=1.0), update)


def normalized_guidance(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    *,
    eta: float = 0.0,
    norm: float | None = None,
    momentum: float = 0.0,
    average: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The APG rule for two predictions of the clean image (N, C, H, W).

    Returns:
        The guided prediction conditional + (scale - 1) * (orthogonal + eta * parallel), and the running average to
        pass as `average` at the next step (None at the first): d + momentum * average.
    """
    update = conditional - unconditional
    if average is not None:
        update = update + momentum * average
    parallel, orthogonal = project(clipped(update, norm), conditional)
    return conditional + (scale - 1) * (orthogonal + eta * parallel), update


class ProjectedGuidance(Guided):
    """APG around a denoise callable; see `apg`."""

    def __init__(
        self, inner: Denoise, scale: float, eta: float, norm: float | None, momentum: float, space: str = "x0"
    ) -> None:
        self.scale, self.eta, self.norm, self.momentum, self.space = scale, eta, norm, momentum, space
        super().__init__(inner)

    def reset(self) -> None:
        self.average: Tensor | None = None

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        if self.scale == 1:  # the rule gives the conditional prediction whatever the average
            return self.inner(x, sigma, cond)
        with_class, without = both(self.inner, x, sigma, cond)
        level = per_sample(sigma, x)
        options: dict[str, Any] = {"eta": self.eta, "norm": self.norm, "momentum": self.momentum}
        if self.space == "eps":
            eps, self.average = normalized_guidance(
                with_class.eps, without.eps, self.scale, average=self.average, **options
            )
            return Prediction(with_class.x0 - level * (eps - with_class.eps), eps)
        x0, self.average = normalized_guidance(with_class.x0, without.x0, self.scale, average=self.average, **options)
        return Prediction(x0, with_class.eps - (x0 - with_class.x0) / level)


def apg(
    denoise: Denoise,
    scale: float,
    *,
    eta: float = 0.0,
    norm: float | None = 2.5,
    momentum: float = -0.5,
    space: str = "x0",
) -> ProjectedGuidance:
    """Adaptive projected guidance around a denoise callable; options as in `APG`.

    Two evaluations a call. The average belongs to one run: built-in samplers announce themselves, before another
    function that samples call ``begin(guided, sigmas)``. It is updated at every evaluation, in order.
    """
    return ProjectedGuidance(denoise, scale, eta, norm, momentum, space)


@dataclass
class APG(Method):
    """Guide without the part of the update that saturates.

    `norm` is an L2 norm over all pixels of D_c - D_u and depends on image size and data: about half of the median norm
    in the first third of a run is a good start.
    """

    scale: float = opt(4.0, "guidance scale w, 1: conditional", low=0, source="paper, Table 1: EDM2-S")
    eta: float = opt(0.0, "weight of the parallel part; 1 keeps it whole", source="paper")
    norm: float | None = opt(2.5, "greatest L2 norm of the update; 0 or null: no limit", low=0,
                             source="presets after the paper: SD 1.5; 7.5 for SD 2.1, 15 for SDXL")  # fmt: skip
    momentum: float = opt(-0.5, "weight of the running average of updates; 0: off", low=-1, high=1,
                          source="presets after the paper: SDXL; -0.75 for SD 2.1")  # fmt: skip
    space: str = opt(
        "x0", "predictions the rule works on: clean images, or eps (for comparison)", choices=("x0", "eps")
    )

    tasks: ClassVar[tuple[str, ...]] = ("diffuse",)
    combines: ClassVar[bool] = True
    paper: ClassVar[str] = "APG, arXiv 2410.02416 (ICLR 2025)"

    def __post_init__(self) -> None:
        check_options(self, "method.apg")

    def guide(self, run: Run, denoise: Denoise) -> Denoise:
        return apg(denoise, self.scale, eta=self.eta, norm=self.norm, momentum=self.momentum, space=self.space)

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {"scale": self.scale}
