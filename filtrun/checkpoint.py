"""Checkpoints of a training: whole or absent, the last two kept, bit for bit what the run was."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.aside import Aside
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.pack import load_tree, pack_tree, write_packed
from filtrun.stopping import stop_asked

if TYPE_CHECKING:
    from filtrun.context import Run

KEPT = 2
_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16


def weights_sha256(weights: dict[str, Tensor] | nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of a state dict, in name order."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        sha.update(tensor.flatten().view(dtype=_AS_INTEGER[tensor.element_size()]).numpy().tobytes())
    return sha.hexdigest()


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"))


def save_checkpoint(run: Run) -> None:
    """Write the state of a training under its run folder and drop all but the last two."""
    _write(run.dir, run.step, _state(run))


def _state(run: Run) -> tuple[dict[str, Tensor], str]:
    """A copy of the training's state, on the CPU: later steps do not reach it."""
    return pack_tree({
        "step": run.step,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "methods": {m.slug: m.state_dict() for m in run.hooks if m.slug},
    })  # fmt: skip


def _write(folder: Path, step: int, state: tuple[dict[str, Tensor], str]) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_packed(folder / "checkpoints" / f"step-{step:09d}.safetensors", state)
    for old in checkpoint_files(folder)[:-KEPT]:
        old.unlink()


def load_checkpoint(run: Run) -> bool:
    """Take the newest readable checkpoint of the run folder; False when there is none."""
    for path in reversed(checkpoint_files(run.dir)):
        try:
            state, _ = load_tree(path)
        except UserError:
            continue  # damaged: the one before it is still good
        shapes = [p.shape for p in run.model.parameters()]
        for method in run.hooks:
            if method.slug in state["methods"]:
                method.load_state_dict(state["methods"][method.slug])
        if shapes != [p.shape for p in run.model.parameters()]:
            runner.refit(run)  # the checkpoint is from after a removal of channels, which has been replayed
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = state["step"]
        return True
    return False


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished run; its weights are in model.safetensors."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


class Checkpoints(Method):
    """Callback that writes a checkpoint every `every` steps, when all other hooks of the step are through.

    The state is copied in the step; a thread brings the copy to the disk while training goes on. One at a time: the
    next waits for the one before. What goes wrong there is raised at the next checkpoint or at the end of the
    training (`close`).

    It must be the last callback: after the one that checks for NaN. A signal to stop is obeyed here, after a checkpoint
    of its own (none where `every` is 0), by KeyboardInterrupt.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._writer: Aside[None] = Aside("checkpoint")

    def _due(self, run: Run) -> bool:
        due = bool(self.every) and (run.step % self.every == 0 or stop_asked())
        return due and run.fabric.global_rank == 0

    def after_step(self, run: Run) -> None:
        if (stop_asked() or self._due(run)) and not run.ends_epoch:
            self.after_epoch(run)

    def after_epoch(self, run: Run) -> None:
        if self._due(run):
            self._save(run)
        if stop_asked():
            self.wait()
            raise KeyboardInterrupt

    def _save(self, run: Run) -> None:
        self.wait()  # before the state is copied: two copies would not fit in memory where one just does
        self._writer.start(_write, run.dir, run.step, _state(run))

    def wait(self) -> None:
        """Until the last checkpoint is written; raises what went wrong with it."""
        self._writer.wait()

    def close(self) -> None:
        """Wait for the last checkpoint, for good."""
        self._writer.close()
