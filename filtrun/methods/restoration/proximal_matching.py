"""Proximal matching: train a denoiser to the mode of the posterior, so that a learned proximal network finds the prior.

Fang, Buchanan, Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024 (arXiv
2310.14344); official code Sulam-Group/learned-proximal-networks (``lpn/train.py``, ``lpn/utils/utils.py``). After an L1
phase the loss is ``1 - exp(-|f(y) - x|^2 / gamma^2)`` with gamma halved from stage to stage. As in the official code
the factor (pi gamma^2)^(-n/2) of the paper is dropped: it does not move the minimiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.options import check_options, opt
from filtrun.trainer import Phase

if TYPE_CHECKING:
    from filtrun.context import Run


def matching_loss(output: Tensor, target: Tensor, gamma: float) -> Tensor:
    """``mean_b [1 - exp(-|output_b - target_b|^2 / gamma^2)]``, a scalar in [0, 1] (eq. 3.4 without its constant)."""
    squared = (output - target).square().flatten(1).sum(1)
    return -(-squared / gamma**2).expm1().mean()


def gamma_schedule(smallest: float, stages: int) -> list[float]:
    """gamma of each stage: halved from one to the next, down to `smallest`."""
    return [smallest * 2.0 ** (stages - 1 - stage) for stage in range(stages)]


@dataclass
class ProximalMatching(Method):
    """L1 first, then proximal matching in stages; the task's own loss is replaced.

    After every optimizer step, weights that must not be negative are put to 0 (every part of the model that has a
    ``project`` method is asked to).
    """

    warmup: float = opt(0.5, "share of the steps with the L1 loss, before matching", low=0, high=1,
                        source="train.py: 20000 of 40000")  # fmt: skip
    stages: int = opt(4, "stages of matching, gamma halved between them", low=1, source="train.py")
    gamma: float | None = opt(None, "smallest gamma; null: gamma_scale * sqrt(C H W)", low=1e-9)
    gamma_scale: float = opt(0.08, "smallest gamma for each root of a pixel value", low=1e-9, source="train.py")
    warmup_lr: float = opt(1e-3, "learning rate of the L1 phase", low=0, source="train.py")
    lr: float = opt(1e-4, "learning rate of matching", low=0, source="train.py")

    trains: ClassVar = "all"
    tasks: ClassVar = ("denoise", "derain")
    paper: ClassVar[str] = "Learned Proximal Networks, arXiv 2310.14344 (ICLR 2024)"

    def __post_init__(self) -> None:
        check_options(self, "method.proximal_matching")
        self._projected: list[Any] = []

    def smallest(self, target: Tensor) -> float:
        """The last gamma for targets (N, C, H, W)."""
        return self.gamma if self.gamma is not None else self.gamma_scale * math.sqrt(target[0].numel())

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        self._projected = [m for m in run.model.modules() if callable(getattr(m, "project", None))]

    def phases(self, run: Run) -> list[Phase]:
        total = run.trainer.total_steps(len(run.train_split) if run.train_split is not None else 0)
        first = round(self.warmup * total)
        each = (total - first) // self.stages
        lengths = [each] * (self.stages - 1) + [total - first - each * (self.stages - 1)]
        matching = [Phase(f"match{i + 1}", steps, self.lr) for i, steps in enumerate(lengths)]
        return [phase for phase in [Phase("l1", first, self.warmup_lr), *matching] if phase.steps]

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        from filtrun.tasks.image_to_image import result

        target, output = run.shared["pair"].y, result(run.shared["output"]).float()
        if output.shape != target.shape:
            raise UserError(f"method=proximal_matching: output {tuple(output.shape)}, target {tuple(target.shape)}")
        assert run.phase is not None
        if run.phase.name == "l1":
            return F.l1_loss(output, target)
        stage = int(run.phase.name.removeprefix("match")) - 1
        return matching_loss(output, target, gamma_schedule(self.smallest(target), self.stages)[stage])

    def after_step(self, run: Run) -> None:
        for module in self._projected:
            module.project()

    def report(self, run: Run) -> dict[str, float | int | str]:
        made = run.shared.get("pair")
        return {} if made is None else {"gamma": self.smallest(made.y), "stages": self.stages}
