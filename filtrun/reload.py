"""Bring a finished run's model back: its base, its methods' edits, the stored tensors, finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filtrun import runner
from filtrun.base import base_model
from filtrun.context import Run
from filtrun.delta import FILE, load_delta
from filtrun.errors import UserError
from filtrun.experiment import new_run
from filtrun.launch import make_fabric
from filtrun.plan import make_plan
from filtrun.record import Record


def reload(folder: Path | str, *, device: str = "auto", overrides: dict[str, Any] | None = None) -> tuple[Run, Record]:
    """The run stored in `folder`, its model trained, finished and on its device, ready to sample or predict.

    Use it inside ``with run.evaluating():``, as measuring does: some methods act there (the mean over masks of MID).

    Args:
        folder: the run folder.
        device: auto, cpu, cuda or cuda:N.
        overrides: options of the task to change (``{"sample_steps": 50}``).

    Raises:
        UserError: no finished run there, its base differs from the one it was trained on, or a file is damaged.
    """
    record = Record.read(folder)
    path = record.folder / FILE
    if not path.exists():
        raise UserError(f"{folder} holds no trained model ({FILE}): the run is {record.status}")
    config = {**record.config, "device": device, "logger": {}, "task": {**record.config["task"], **(overrides or {})}}
    choices = {"data": record.data, "model": record.model, "task": record.task}
    plan = make_plan(config, choices)
    run = new_run(plan, make_fabric(plan, device, 1), record.folder)
    run.model, base_sha256 = base_model(plan, run)
    run.train_split = run.data.split("train", plan.which)
    runner.edit(run)
    load_delta(run, path, base_sha256)
    run.net = run.model.to(run.device)
    run.each_reversed("finish")
    run.model.eval()
    return run, record
