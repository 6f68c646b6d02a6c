"""AG: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models.

AAAI 2025, arXiv 2312.12487; no official code. Late in a run the conditional and the unconditional noise agree, and the
unconditional network call changes nothing. AG compares the two noises by their cosine; once it reaches a threshold the
rest of the run is conditional only. LinearAG (``variant=linear``) goes further: in the first half of the run every
second unconditional noise is a linear combination of the noises before, the second half is conditional.

Every sample of a batch decides for itself, and only those still guided are in the unconditional call: the saving is
real, and the number of network calls a sample is a mean. A decision is taken once a step, also by solvers that call
the network more often, and never taken back. Noises of very noisy states are alike on any data, so the first
`min_steps` are always guided; where images are small and grids start high, as with EDM's levels, the cosine is above
0.99 nearly everywhere and `min_steps` is what decides.

On any denoise callable, in two lines:

>>> guided = adaptive_guidance(denoise, scale=4.0, threshold=0.991, min_steps=0.5)  # doctest: +SKIP
>>> images = heun(guided, x, sigmas, classes)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from filtrun.diffusion.denoiser import Denoise, Prediction
from filtrun.diffusion.guidance import Guided, begin, both, mixed
from filtrun.method import Method
from filtrun.methods.guidance.linear_guidance import (
    LinearCoefficients,
    LinearGuidance,
    Trajectories,
    fit_linear,
    guided_steps,
)
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

__all__ = ["AdaptiveGuidance", "LinearCoefficients", "adaptive_guidance", "agreement", "fit_linear"]


def agreement(eps_c: Tensor, eps_u: Tensor) -> Tensor:
    """Cosine of two noise predictions (N, ...) for each sample over all other axes: (N,) in [-1, 1]."""
    return F.cosine_similarity(eps_c.flatten(1), eps_u.flatten(1), dim=1)


class ThresholdGuidance(Guided):
    """AG around a denoise callable; see `adaptive_guidance`.

    Attributes:
        calls, evaluations: calls of this object, and network evaluations a sample in them (guidance takes two a call).
        cosines: agreement at each guided step of the last run, mean over the samples still guided.
    """

    def __init__(self, inner: Denoise, scale: float, threshold: float, min_steps: float) -> None:
        self.scale, self.threshold, self.min_steps = scale, threshold, min_steps
        self.calls = self.evaluations = 0.0
        super().__init__(inner)

    def reset(self) -> None:
        self.done: Tensor | None = None
        self.crossed: Tensor | None = None
        self.left: Tensor | None = None  # samples still guided; None: all
        self.seen = -1
        self.cosines: list[Tensor] = []

    def guide(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Prediction:
        self.calls += 1
        self.evaluations += 1
        if self.scale == 1:
            return self.inner(x, sigma, cond)
        starts = self.step != self.seen
        if starts:  # what the last step found counts from here on
            self.seen, self.done = self.step, self.crossed
            # how large the call is to be has to be known here: the one wait for the device in a step
            self.left = None if self.done is None else (~self.done).nonzero()[:, 0]
        rows = self.left
        if rows is not None and len(rows) == 0:
            return self.inner(x, sigma, cond)
        if rows is not None and len(rows) == len(x):
            rows = None
        self.evaluations += 1 if rows is None else len(rows) / len(x)
        with_class, without = both(self.inner, x, sigma, cond, rows)
        some = with_class if rows is None else Prediction(with_class.x0[rows], with_class.eps[rows])
        if starts:
            self._compare(some, without, rows, len(x))
        guided = mixed(some, without, self.scale)
        if rows is None:
            return guided
        return Prediction(with_class.x0.index_copy(0, rows, guided.x0), with_class.eps.index_copy(0, rows, guided.eps))

    def _compare(self, conditional: Prediction, unconditional: Prediction, rows: Tensor | None, n: int) -> None:
        """Note which samples agree well enough to be done after this step."""
        cosine = agreement(conditional.eps, unconditional.eps)
        self.cosines.append(cosine.mean())
        least = self.min_steps if self.min_steps >= 1 else round(self.min_steps * self.steps)
        if self.step + 1 < least:  # the device need not be waited for yet
            return
        reached = cosine >= self.threshold
        if rows is None:
            self.crossed = reached
        else:
            assert self.done is not None
            self.crossed = self.done.index_copy(0, rows, reached)


def adaptive_guidance(
    denoise: Denoise, scale: float, threshold: float = 0.991, min_steps: float = 0.5
) -> ThresholdGuidance:
    """AG around a denoise callable: classifier-free guidance until eps_c and eps_u agree to `threshold`.

    S steps of which a sample is guided in g cost it S + g evaluations. `min_steps`: steps guided in any case, at
    least the first; below 1 it is a share of the run. A threshold above 1 is plain guidance.
    """
    return ThresholdGuidance(denoise, scale, threshold, min_steps)


@dataclass
class AdaptiveGuidance(Method):
    """Stop guiding when it changes nothing any more: AG by a threshold, LinearAG by a fitted combination."""

    scale: float = opt(7.5, "guidance scale w while guided", low=0, source="paper")
    variant: str = opt("threshold", "AG, or LinearAG", choices=("threshold", "linear"))
    threshold: float = opt(0.991, "cosine of eps_c and eps_u from which on a sample is conditional; above 1: never",
                           source="paper: 0.991 saves a quarter of the calls at 20 steps")  # fmt: skip
    min_steps: float = opt(0.5, "steps guided in any case (below 1: share of the run): noisy states look alike", low=0,
                           source="ours; the paper's 30 of 40 calls are 10 guided steps of 20")  # fmt: skip
    linear_share: float = opt(0.5, "share of the run that LinearAG guides", low=0, high=1, source="paper")
    trajectories: int = opt(200, "samples LinearAG is fitted on", low=2, source="paper")
    fit_seed: int = opt(77, "seed of their noise", low=0)

    tasks: ClassVar[tuple[str, ...]] = ("diffuse",)
    combines: ClassVar[bool] = True
    paper: ClassVar[str] = "AG, arXiv 2312.12487 (AAAI 2025)"

    def __post_init__(self) -> None:
        check_options(self, "method.adaptive_guidance")
        self.guided: ThresholdGuidance | LinearGuidance | None = None

    # -- hooks -----------------------------------------------------------------------------------------------------
    def guide(self, run: Run, denoise: Denoise) -> Denoise:
        if self.variant == "linear":
            self.guided = LinearGuidance(denoise, self.scale, self.coefficients(run, denoise), self.linear_share)
        else:
            self.guided = adaptive_guidance(denoise, self.scale, self.threshold, self.min_steps)
        return self.guided

    def coefficients(self, run: Run, denoise: Denoise) -> LinearCoefficients:
        """LinearAG's coefficients for the model as it is now and the task's sampler, fitted once (a stage)."""
        from filtrun.checkpoint import weights_sha256
        from filtrun.code_version import code_version
        from filtrun.pack import load_tree, save_tree

        others = {m.slug: dataclasses.asdict(m) for m in run.methods if m is not self and m.trains == "nothing"}
        settings: Any = run.task
        names = ("noise", "prediction", "sigma_data", "sampler", "sample_steps", "grid", "to_zero", "clip")
        parts = {
            "model": weights_sha256(run.model),
            "task": {name: getattr(settings, name) for name in names},
            "classes": [run.which, run.data.source, run.data.target, run.data.num_classes],
            "method": [self.scale, self.linear_share, self.trajectories, self.fit_seed],
            "others": others,
            "code": code_version(self, run.task, *run.methods),
        }

        def build(folder: Path) -> None:
            found = self._fit(run, denoise)
            if run.fabric.global_rank == 0:
                save_tree(folder / "coefficients.safetensors", dataclasses.asdict(found))

        folder = run.stage("linear-guidance", parts, build)
        state, _ = load_tree(folder / "coefficients.safetensors")
        return LinearCoefficients(**state)

    def _fit(self, run: Run, denoise: Denoise) -> LinearCoefficients:
        """Sample with full guidance and fit; every process does the same."""
        from filtrun.diffusion.noise import noise_levels

        task: Any = run.task
        levels = noise_levels(task.noise, task.sigma_data)
        solve, sigmas = task.solver(run, levels)
        keep = guided_steps(len(sigmas) - 1, self.linear_share)
        recorder = Trajectories(denoise, self.scale, keep)
        classes = task.classes(run, run.which, self.trajectories)
        shape = (self.trajectories, run.data.channels, run.data.image_size, run.data.image_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.fit_seed))
        kept: list[tuple[list[Tensor], list[Tensor]]] = []
        for i, rows in enumerate(torch.arange(self.trajectories).split(task.sample_batch)):
            start = levels.start(noise[rows].to(run.device), sigmas[0].item())
            generator = torch.Generator(run.device).manual_seed(self.fit_seed + 1 + i)
            begin(recorder, sigmas)
            solve(recorder, start, sigmas, classes[rows].to(run.device), generator=generator)
            kept.append((recorder.cond, recorder.uncond))
        cond, uncond = ([torch.cat([part[k][t] for part in kept]) for t in range(keep)] for k in (0, 1))
        return fit_linear(cond, uncond)

    def report(self, run: Run) -> dict[str, float | int | str]:
        """`calls_saved`: share of the network calls of full guidance that were not made while sampling."""
        report: dict[str, float | int | str] = {"scale": self.scale, "variant": self.variant}
        if self.guided is not None and self.guided.calls:
            report["calls_saved"] = 1 - self.guided.evaluations / (2 * self.guided.calls)
        if isinstance(self.guided, LinearGuidance):
            report["r2"] = self.guided.coefficients.r2[1::2].mean().item()
        return report
