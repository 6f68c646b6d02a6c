"""``filtrun --dry-run``: compose, check and build every cell, say how many there are and what they would cost."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from filtrun.cli import complain
from filtrun.errors import RunFailure, Unfit, UserError


class DryRun:
    """Stands in for the job of a real run: builds each cell, writes nothing."""

    def __init__(self, sweep: bool = False) -> None:
        self.sweep, self.skipped = sweep, 0
        self.folder = tempfile.TemporaryDirectory(prefix="filtrun-dry-")
        self.rows: list[dict[str, Any]] = []
        self.codes: list[int] = []

    def overrides(self) -> list[str]:
        """Keep the folders Hydra makes out of the user's outputs."""
        return [f"hydra.run.dir={self.folder.name}", f"hydra.sweep.dir={self.folder.name}"]

    def run(self, config: Any) -> None:
        """Build one cell; what is wrong with it is told and counted."""
        from hydra.core.hydra_config import HydraConfig

        from filtrun.api import plain
        from filtrun.cli import _with_hydra

        hydra = HydraConfig.get()
        cell = " ".join(str(o) for o in hydra.overrides.task) or "(defaults)"
        try:
            values, choices = plain(_with_hydra(config, hydra))
        except UserError as error:
            self.codes.append(complain(error))
            return
        self.cell(cell, values, choices)

    def cell(self, label: str, config: dict[str, Any], choices: dict[str, str]) -> None:
        """Build a cell that is composed."""
        try:
            self.rows.append({"cell": label, **estimate(config, choices)})
            self.codes.append(0)
        except Unfit as error:
            self.skip(label, error)
        except (UserError, RunFailure) as error:
            print(f"{label}:")
            self.codes.append(complain(error))

    def skip(self, label: str, reason: Unfit) -> None:
        """Tell of a cell whose parts do not go together: a mistake where it is the only one, skipped in a sweep."""
        if self.sweep:
            print(f"{label}: skipped: {str(reason).splitlines()[0]}", file=sys.stderr)
            self.skipped += 1
        else:
            self.codes.append(complain(reason))

    def close(self) -> int:
        """Print the table and return the exit code."""
        from rich.console import Console
        from rich.table import Table

        self.folder.cleanup()
        if self.rows:
            table = Table("cell", "parameters", "steps", "images seen", "training FLOPs", "seconds (earlier runs)")
            for row in self.rows:
                seconds = f"{row['seconds']:.0f}" if row["seconds"] is not None else "unknown"
                table.add_row(
                    row["cell"], f"{row['parameters']:,}", str(row["steps"]), f"{row['images']:,}",
                    f"{row['flops']:.2e}", seconds,
                )  # fmt: skip
            Console().print(table)
        known = [row["seconds"] for row in self.rows if row["seconds"] is not None]
        total = f", about {sum(known):.0f} s for the {len(known)} cells with earlier runs" if known else ""
        flops = sum(row["flops"] for row in self.rows)
        print(
            f"{len(self.rows)} cells would run ({flops:.2e} floating-point operations of training{total})"
            + (f", {self.skipped} skipped" if self.skipped else "")
        )
        return max(self.codes, default=2 if self.skipped else 0)


def estimate(config: dict[str, Any], choices: dict[str, str]) -> dict[str, Any]:
    """Parameters, steps, images and training FLOPs of a cell, and the mean time of earlier runs like it."""
    import torch

    from filtrun import runner
    from filtrun.cost import forward_flops
    from filtrun.experiment import new_run
    from filtrun.launch import make_fabric
    from filtrun.method import count
    from filtrun.plan import make_plan

    plan = make_plan(config, choices)
    run = new_run(plan, make_fabric(plan, config["device"], 1), Path())
    torch.default_generator.manual_seed(0)
    run.model = plan.make_model().to(run.device)
    run.train_split = run.data.split("train", plan.which)
    parameters = count(run.model.parameters())
    run.net = run.model
    with run.evaluating():
        flops = forward_flops(lambda: run.task.probe(run)) or 0.0
    trains = any(m.trains != "nothing" for m in run.methods)
    steps = plan.trainer.total_steps(len(run.train_split)) if trains else 0
    images = steps * plan.trainer.batch_size
    runner.edit(run)  # the methods' own checks: layers that are not there, tensors claimed twice
    return {
        "parameters": parameters, "steps": steps, "images": images,
        "flops": 3 * flops * images,  # backward costs about twice the forward
        "seconds": earlier_seconds(config, choices),
    }  # fmt: skip


def earlier_seconds(config: dict[str, Any], choices: dict[str, str]) -> float | None:
    """Mean total seconds of finished runs below ``outputs`` with the same data, model, task, methods and steps."""
    from filtrun.report.evidence import finished_records

    found = []
    for record in finished_records():
        same = all(record.get(key) == choices.get(key) for key in ("data", "model", "task"))
        if same and record.get("methods") == list(config.get("method") or {}):
            if record["config"].get("trainer") == config["trainer"]:
                found.append(float((record.get("cost") or {}).get("total_seconds") or 0))
    return sum(found) / len(found) if found else None
