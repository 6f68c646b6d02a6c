"""Linear probe: only the classification head is trained; the features stay those of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from filtrun.errors import UserError
from filtrun.method import Method, train_head

if TYPE_CHECKING:
    from filtrun.context import Run


@dataclass
class LinearProbe(Method):
    """Train the last linear layer on frozen features (the lower PEFT baseline, e.g. of Jia et al. 2022, VPT, Table 1).

    Batch norm layers and dropout stay in evaluation mode, so that the features are those of the base to the bit.

    Raises UserError for a task whose models have no classification head.
    """

    trains: ClassVar = "part"
    tasks: ClassVar = ("classify",)
    paper: ClassVar[str] = "linear probe (baseline; protocol of VPT, arXiv 2203.12119)"

    def edit_model(self, run: Run) -> None:
        if not run.task.head(run.model):
            raise UserError("method=linear_probe needs a model with a classification head; use task=classify")
        train_head(run)
        self._held = [m for m in run.model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.Dropout))]
        for module in self._held:
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]

    def finish(self, run: Run) -> None:
        for module in self._held:
            del module.__dict__["train"]
        self._held = []
