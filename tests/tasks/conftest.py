"""Tiny photographs on disk, and runs of an image-to-image task with any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture
def photo_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write `n` smooth colour images of height x width, each different, as PNG files; returns the folder."""
    from PIL import Image

    def write(name: str, n: int = 3, height: int = 60, width: int = 72, seed: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width] / 20
        for i in range(n):
            phase, pace = rng.uniform(0, 6, (3, 1, 1)), rng.uniform(0.5, 2, (3, 1, 1))
            waves = 0.5 + 0.4 * np.sin(pace * x + phase) * np.cos(pace * y - phase)
            Image.fromarray((waves * 255).round().astype(np.uint8).transpose(1, 2, 0)).save(folder / f"img{i}.png")
        return folder

    return write


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Any]:
    """A run of a task on data with a model: optimizer and wrapping are made, nothing is trained yet."""

    def make(task: Any, data: Any, model: nn.Module, method: Any = None, **trainer: Any) -> Any:
        from lightning_fabric import Fabric

        from filtrun import runner
        from filtrun.context import Run, seed_generators
        from filtrun.methods.baseline.full import Full
        from filtrun.stages import Stages
        from filtrun.trainer import Trainer

        task.check_data(data)
        made = method or Full()
        made.slug = "method"
        options = {"steps": 2, "batch_size": 4, "lr": 1e-3, "schedule": "constant", **trainer}
        run = Run(
            fabric=Fabric(accelerator="cpu", devices=1), task=task, data=data.setup(0), model=model, methods=[made],
            trainer=Trainer(**options), stages=Stages(tmp_path / "stages", lambda line: None), dir=tmp_path,
        )  # fmt: skip
        run.train_split = run.data.split("train", "all")
        seed_generators(0, torch.device("cpu"))
        runner.edit(run)
        runner.setup(run)
        return run

    return make


@pytest.fixture
def train() -> Callable[..., Any]:
    """Run the loop to its end and return the loss of every step."""

    def fit(run: Any) -> list[float]:
        from filtrun import runner
        from filtrun.method import Method

        losses = []

        class Keep(Method):
            def after_step(self, run: Any) -> None:
                losses.append(float(run.total_loss))

        run.callbacks = [Keep()]
        runner.fit(run)
        return losses

    return fit
