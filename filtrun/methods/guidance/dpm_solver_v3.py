"""DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics.

NeurIPS 2023, arXiv 2310.13268; official code thu-ml/DPM-Solver-v3. A solver of few steps guesses how the network's
output goes on. How much there is to guess depends on how the ODE is written; this method writes it with coefficients
for every pixel and noise level, estimated once from the network itself, such that least is left. Sampling then costs
one evaluation per step, corrector included.

What differs from the official code: it never published how the statistics are computed, so `estimate` follows the
paper's formulas; the solver works in float64 where the statistics' grid is float32 there (2e-6 on the same statistics);
its "half" corrector corrects the first half of sampling, the paper's the second (``corrector=late``; ``early`` is the
code's).

On any denoise callable:

>>> solver = DPMSolverV3(estimate(denoise, images, levels.sigmas(120, "log", zero=False)))  # doctest: +SKIP
>>> x = solver(denoise, start, solver.grid(levels, steps=10))                               # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from filtrun.checkpoint import weights_sha256
from filtrun.code_version import code_version
from filtrun.diffusion.dpm_solver_v3 import DPMSolverV3
from filtrun.diffusion.model_statistics import ModelStatistics, estimate
from filtrun.diffusion.noise import NoiseLevels
from filtrun.method import Method
from filtrun.options import check_options, opt
from filtrun.pack import load_tree, save_tree
from filtrun.stages import digest

if TYPE_CHECKING:
    from filtrun.context import Run

FILE = "statistics.safetensors"


@dataclass
class DPMSolverV3Sampler(Method):
    """Sample with coefficients estimated from the denoiser itself, so that few steps go further."""

    order: int | None = opt(None, "order of the predictor; null: 3, and 2 with guidance", low=1, high=3,
                            source="official README")  # fmt: skip
    corrector: str = opt("auto", "correct each point by the next: none, full, late or early half of sampling; auto: "
                         "full with guidance or in runs of 6 steps or fewer",
                         choices=("auto", "none", "full", "late", "early"),
                         source="official script for EDM; paper, appendix D")  # fmt: skip
    pseudo_predictor: bool | None = opt(None, "derivatives of the predictor by pseudo-order; null: in runs of 5 steps "
                                        "or fewer without guidance", source="official script for EDM")  # fmt: skip
    pseudo_corrector: bool | None = opt(None, "raise the corrector's order by one, by pseudo-order; null: with "
                                        "guidance", source="official scripts")  # fmt: skip
    lower_order_final: bool = opt(True, "order 1 in the last step, 2 in the one before it", source="official scripts")
    spacing: str = opt("log", "noise levels of the steps", choices=("log", "karras", "uniform_t"),
                       source="paper: log for small images, uniform_t for large ones")  # fmt: skip
    sigma_min: float | None = opt(None, "noise level where sampling ends; null: the schedule's lowest", low=1e-6)
    statistics_levels: int = opt(60, "intervals N of the statistics' grid", low=2,
                                 source="paper, Table 8: 120 to 1200")  # fmt: skip
    draws: int = opt(128, "noisy training images K at each of them", low=2, source="paper: 1024 to 4096")
    batch: int = opt(256, "noisy images at a time", low=1)
    seed: int = opt(0, "seed of the statistics' images and noises", low=0)
    derivative: str = opt("forward", "forward-mode derivatives of the network, or central differences",
                          choices=("forward", "difference"), source="paper, appendix C.1: forward mode")  # fmt: skip

    tasks: ClassVar[tuple[str, ...]] = ("diffuse",)
    paper: ClassVar[str] = "DPM-Solver-v3, arXiv 2310.13268 (NeurIPS 2023)"

    def __post_init__(self) -> None:
        check_options(self, "method.dpm_solver_v3")
        self._made: dict[str, DPMSolverV3] = {}

    def sampler(self, run: Run) -> Callable[..., Tensor]:
        task: Any = run.task
        levels = task.denoiser(run).levels
        parts = self.parts(run, levels)
        key = digest(parts)
        if key not in self._made:  # one model at a time: that of the last evaluation
            self._made = {key: self.solver(self.statistics(run, levels, parts), levels, self._guided(run))}
        return self._made[key]

    def solver(self, statistics: ModelStatistics, levels: NoiseLevels, guided: bool) -> DPMSolverV3:
        """The solver with this method's options, filled in by whether the denoiser is guided."""
        times = [levels.sigma_to_t(torch.tensor(s, dtype=torch.float64)) for s in (levels.sigma_min, levels.sigma_max)]
        auto = "full" if guided else None
        return DPMSolverV3(
            statistics,
            self.order or (2 if guided else 3),
            pseudo_predictor=False if guided and self.pseudo_predictor is None else self.pseudo_predictor,
            corrector=auto if self.corrector == "auto" else self.corrector,
            pseudo_corrector=guided if self.pseudo_corrector is None else self.pseudo_corrector,
            lower_order_final=self.lower_order_final,
            half_sigma=levels.t_to_sigma((times[0] + times[1]) / 2).item(),
            spacing=self.spacing,
        )

    # -- the statistics: a cached stage ------------------------------------------------------------------------------
    def ladder(self, levels: NoiseLevels) -> Tensor:
        """The noise levels the statistics are taken at, (N + 1,) float64, from where sampling starts to its end."""
        ends = levels.sigmas(1, self.spacing, sigma_min=self.sigma_min, zero=False).tolist()
        return levels.sigmas(self.statistics_levels, "log", sigma_max=ends[0], sigma_min=ends[1], zero=False)

    def parts(self, run: Run, levels: NoiseLevels) -> dict[str, Any]:
        """What the statistics depend on: weights, guidance, noise levels, counts, images and code."""
        task, others = run.task, [m for m in run.methods if m is not self]
        own = ("statistics_levels", "draws", "batch", "seed", "derivative")
        return {
            "weights": weights_sha256(run.model),
            "task": {name: getattr(task, name) for name in ("prediction", "noise", "sigma_data", "guidance", "clip")},
            "methods": {m.slug: dataclasses.asdict(m) for m in others},
            "levels": [levels.sigmas(1, self.spacing, sigma_min=self.sigma_min, zero=False).tolist()],
            "own": {name: getattr(self, name) for name in own},
            "data": run.data.fingerprint(),
            "classes": [_which(run), run.data.source, run.data.target],
            "splits": [run.data.seed, run.data.val_fraction, run.data.few_shot],
            "code": code_version(run.model, task, self, *others),
        }

    def statistics(self, run: Run, levels: NoiseLevels, parts: dict[str, Any]) -> ModelStatistics:
        """The statistics of the run's denoiser as it is now, with every guidance around it; cached."""

        def build(folder: Path) -> None:
            task: Any = run.task
            _, denoise = task.guided(run)  # with a count of its own: these calls are no part of a sample's cost
            split = run.data.split("train", _which(run))
            rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(self.seed))[: self.draws]
            images = split.batch(rows.sort().values).to(run.device)
            found = estimate(
                denoise, images.x * 2 - 1, self.ladder(levels), images.y,
                draws=self.draws, batch=self.batch, seed=self.seed, derivative=self.derivative,
            )  # fmt: skip
            if run.fabric.global_rank == 0:
                save_tree(folder / FILE, {name: getattr(found, name) for name in ("sigmas", "l", "s", "b")})

        folder = run.stage("dpm-solver-v3", parts, build)
        tree, _ = load_tree(folder / FILE)
        return ModelStatistics(**tree)

    def _guided(self, run: Run) -> bool:
        task: Any = run.task
        return task.guidance != 1 or any(type(m).guide is not Method.guide for m in run.methods)

    def report(self, run: Run) -> dict[str, float | int | str]:
        guided = self._guided(run)
        return {
            "order": self.order or (2 if guided else 3),
            "corrector": self.corrector,
            "statistics_levels": self.statistics_levels + 1,
            "statistics_draws": self.draws,
        }


def _which(run: Run) -> str:
    """The classes samples are drawn of: also those a tuned model should keep."""
    return "all" if run.keeps else run.which
