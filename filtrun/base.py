"""Where a run's model starts: from nothing, from a base pre-trained here, from a weights file, or from a hub."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from filtrun.checkpoint import weights_sha256
from filtrun.context import Run, seed_generators
from filtrun.errors import UserError
from filtrun.plan import Plan
from filtrun.train_stage import train_stage


def base_model(plan: Plan, run: Run) -> tuple[nn.Module, str]:
    """The model a run starts from, on its device, and the SHA-256 of its weights."""
    normalize = plan.config["model"].get("normalize", "data")
    if plan.base == "pretrain":
        from filtrun.build import RESERVED

        options = {k: v for k, v in plan.config["model"].items() if k not in RESERVED or k == "_target_"}
        model, _ = train_stage(
            run, "pretrain", plan.make_model, parts={"model": options}, task=plan.task, trainer=plan.pretrain,
            which="source", seed=plan.config["pretrain"].get("seed", 0), normalize=normalize,
        )  # fmt: skip
        return model, weights_sha256(model)
    seed_generators(plan.config["seed"], run.device)
    model = plan.make_model(pretrained=plan.base == "hub")
    if plan.base == "checkpoint":
        from filtrun.models.checkpoint import load_weights

        load_weights(model, plan.config["model"]["checkpoint"])
    return model.to(run.device), weights_sha256(model)


def evaluate_base(run: Run, base_sha256: str) -> dict[str, float]:
    """Metrics of the unchanged base, measured once for all runs that share it (a stage)."""
    import dataclasses

    from filtrun.code_version import code_version

    parts = {
        "base": base_sha256,
        "task": dataclasses.asdict(run.task),
        "data": run.data.fingerprint(),
        "classes": [run.which, run.keeps, run.data.source, run.data.target],
        "splits": [run.data.seed, run.data.val_fraction],
        "normalize": run.normalize,
        "notes": run.task.notes(run),
        "code": code_version(run.task),
    }

    def build(folder: Path) -> None:
        methods, run.methods = run.methods, []
        callbacks, run.callbacks = run.callbacks, []
        try:
            with run.evaluating():
                metrics = run.task.evaluate(run)
        finally:
            run.methods, run.callbacks = methods, callbacks
        if run.fabric.global_rank == 0:
            (folder / "metrics.json").write_text(json.dumps(metrics))

    folder = run.stage("evaluate-base", parts, build)
    try:
        return json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
