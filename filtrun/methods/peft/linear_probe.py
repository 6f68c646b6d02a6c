"""Linear probe: only the classification head is trained; the features stay those of the base.

Alone, on any classifier:

>>> probe = LinearProbe().attach(model, model.head.parameters())  # doctest: +SKIP
>>> ...                                                           # train the parameters that require a gradient
>>> probe.release()                                               # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable
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

    def __post_init__(self) -> None:
        self._held: list[nn.Module] = []

    def attach(self, model: nn.Module, head: Iterable[nn.Parameter]) -> LinearProbe:
        """Freeze `model` but for the parameters of its `head`; returns self.

        Raises UserError when `head` is empty.
        """
        parameters = list(head)
        if not parameters:
            raise UserError("method=linear_probe needs the parameters of a classification head, and got none")
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._hold(model)
        return self

    def _hold(self, model: nn.Module) -> None:
        """Keep batch norm and dropout in evaluation mode, whatever ``model.train()`` says."""
        self._held = [m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.Dropout))]
        for module in self._held:
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]

    def release(self) -> None:
        """Let batch norm and dropout follow ``model.train()`` again."""
        for module in self._held:
            del module.__dict__["train"]
        self._held = []

    def edit_model(self, run: Run) -> None:
        if not run.task.head(run.model):
            raise UserError("method=linear_probe needs a model with a classification head; use task=classify")
        train_head(run)
        self._hold(run.model)

    def finish(self, run: Run) -> None:
        self.release()
