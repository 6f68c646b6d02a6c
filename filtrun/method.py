"""Method: what a paper adds to a run. A dataclass whose fields are its hyper-parameters, and hooks that do nothing.

A method overrides the hooks it needs; the runner calls them in the order the methods are listed, and `finish` in the
reverse order, so that each can undo what it did. Methods hold Parameter objects, never names: another method may
rename a tensor (an adapter turns ``0.weight`` into ``0.base_layer.weight``), the object stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.trainer import Phase

HOOKS = (
    "prepare", "edit_model", "param_groups", "phases", "start_phase", "own_step", "loss", "after_backward",
    "after_step", "after_epoch", "after_refit", "before_eval", "after_eval", "constrain", "guide", "sampler", "finish",
)  # fmt: skip


@dataclass
class Method:
    """Base of all methods; every hook is a no-op.

    Class facts, read by the runner, the conformance suite and ``filtrun info``:

    - `trains`: ``"part"`` freezes the model first and the method makes trainable what it trains; ``"all"`` trains
      everything unless another method of the run trains a part; ``"nothing"`` asks for no training.
    - `tasks`: the kinds of task it works with (None: any).
    - `identity_at_start`: `edit_model` leaves the model's output unchanged.
    - `exact_finish`: `finish` leaves the output unchanged (within 1e-5).
    - `unused_params`: some trainable tensor may get no gradient in a step (needed to know under DDP).
    - `combines`: its `guide` is a rule of classifier-free guidance: it combines the conditional and the unconditional
      prediction. It takes the place of the task's own guidance, and a run has at most one.
    - `nan_ok`: its own loss term may be NaN or infinite now and then without the run being stopped.
    - `waits`: functions that wait for the device in every training step -> why they must: nothing else may, but for
      what a method does every few steps, or when a phase or an epoch starts or ends. Models and tasks may have it too.
    - `paper`: title, link and year, as shown by ``filtrun list`` and ``info``.
    """

    trains: ClassVar[Literal["part", "all", "nothing"]] = "nothing"
    tasks: ClassVar[tuple[str, ...] | None] = None
    identity_at_start: ClassVar[bool] = True
    exact_finish: ClassVar[bool] = True
    unused_params: ClassVar[bool] = False
    combines: ClassVar[bool] = False
    nan_ok: ClassVar[bool] = False
    waits: ClassVar[dict[str, str]] = {}
    paper: ClassVar[str] = ""

    slug: ClassVar[str] = ""
    """Its key in the config; set on the instance by the builder."""

    # -- before training -------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        """Gather what the method needs before the model changes: statistics, helper models through ``run.stage``."""

    def edit_model(self, run: Run) -> None:
        """Inject, freeze, reparametrise or mask; `run.weights` still has every base tensor by its base name."""

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        """Extra optimizer groups (own learning rate or decay); tensors listed here leave the default group."""
        return []

    def phases(self, run: Run) -> list[Phase] | None:
        """The run's phases, if the method replaces the single default one."""
        return None

    # -- in the loop -----------------------------------------------------------------------------------------------
    def start_phase(self, run: Run) -> None:
        """Called before the first step of `run.phase`."""

    own_step: ClassVar[Callable[..., Tensor] | None] = None
    """``own_step(run, batch) -> loss``: takes over forward, backward and optimizer step; at most one owner a run."""

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        """Add a term to the scalar loss or replace it."""
        return loss

    def after_backward(self, run: Run) -> None:
        """Edit gradients; called once per optimizer step, before clipping."""

    def after_step(self, run: Run) -> None:
        """Called after the optimizer step while gradients are still there."""

    def after_epoch(self, run: Run) -> None:
        """Called when an epoch, or a phase in the middle of one, ends."""

    def after_refit(self, run: Run) -> None:
        """Called when the run went on with a new optimizer (`runner.refit`): tensors may have other shapes now."""

    # -- evaluation ------------------------------------------------------------------------------------------------
    def before_eval(self, run: Run) -> None:
        """Change the model for evaluation only (a temporary merge, averaged weights)."""

    def after_eval(self, run: Run) -> None:
        """Undo `before_eval`; called in the reverse order."""

    def constrain(self, run: Run) -> None:
        """Put the weights back where the method allows them (masks, bounds): called when averaged weights come in."""

    def guide(self, run: Run, denoise: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the denoiser used for sampling; guidances nest in the order of the methods."""
        return denoise

    def sampler(self, run: Run) -> Callable[..., Tensor] | None:
        """A sampler that replaces the task's, or None; an attribute ``grid`` of it gives noise levels of its own.

        In task inverse it is a solver of inverse problems: called with ``measurement=`` beside a sampler's arguments,
        see `filtrun.tasks.inverse.Inverse`.
        """
        return None

    # -- the end ---------------------------------------------------------------------------------------------------
    def finish(self, run: Run) -> None:
        """Merge, slim, bake in: leave a plain model behind."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model and the optimizer; tensors and JSON values, nested."""
        return {}

    def delta_state(self) -> dict[str, Any]:
        """What the finished model needs when it is used again; it is stored in ``model.safetensors``.

        Less than `state_dict`, which checkpoints keep, where that holds what only further training needs (the
        discriminator of a GAN, an optimizer's moments).
        """
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` or `delta_state` gave, or nothing from an empty dict.

        Called after `edit_model` and before the model's own tensors load.
        """

    def report(self, run: Run) -> dict[str, float | int | str]:
        """Extra columns of the record (rank, sparsity, threshold), read before `finish`."""
        return {}


def train_head(run: Run) -> None:
    """Make the classification head trainable, as PEFT protocols do; no effect for tasks without one."""
    for parameter in run.task.head(run.model):
        parameter.requires_grad_(True)


def modules_of(model: nn.Module, kinds: tuple[type, ...]) -> list[tuple[str, nn.Module]]:
    """(name, module) of every sub-module of one of the given kinds, in definition order."""
    found: list[tuple[str, nn.Module]] = list(model.named_modules())
    return [(name, module) for name, module in found if isinstance(module, kinds)]


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the sub-module `name`, and the attribute it is held under."""
    path, _, attribute = name.rpartition(".")
    return (model.get_submodule(path) if path else model), attribute


@torch.no_grad()
def count(parameters: Any) -> int:
    """Number of scalars in an iterable of tensors."""
    return sum(p.numel() for p in parameters)
