"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): the rule every other guidance is compared with.

The conditional prediction is pushed away from the unconditional one, D_u + scale * (D_c - D_u), with one scale for the
whole run. Works on any denoiser trained with dropped labels. On any denoise callable, in two lines:

>>> denoise = Denoiser(net, EDMLevels(), num_classes=10)  # doctest: +SKIP
>>> images = heun(cfg(denoise, scale=3.0), x, sigmas, classes)  # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from filtrun.diffusion.denoiser import Denoise
from filtrun.diffusion.guidance import cfg
from filtrun.method import Method
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

__all__ = ["ClassifierFreeGuidance", "cfg"]


@dataclass
class ClassifierFreeGuidance(Method):
    """Guide with one constant scale: 0 unconditional, 1 conditional (one network call a step), above 1 guided (two).

    The paper's weight is scale - 1. Takes the place of ``task.guidance``, which is the same rule.
    """

    scale: float = opt(2.0, "guidance scale w; the paper's weight is w - 1", low=0, source="paper, Table 1: 1.1 to 5")

    tasks: ClassVar[tuple[str, ...]] = ("diffuse",)
    combines: ClassVar[bool] = True
    paper: ClassVar[str] = "Classifier-Free Diffusion Guidance, arXiv 2207.12598 (baseline)"

    def __post_init__(self) -> None:
        check_options(self, "method.cfg")

    def guide(self, run: Run, denoise: Denoise) -> Denoise:
        return cfg(denoise, self.scale)

    def report(self, run: Run) -> dict[str, Any]:
        return {"scale": self.scale}
