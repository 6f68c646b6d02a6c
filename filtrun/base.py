"""Where a run's model starts: from nothing, from a base pre-trained here, from a weights file, or from a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from filtrun.checkpoint import weights_sha256
from filtrun.context import Run, seed_generators
from filtrun.errors import UserError
from filtrun.plan import Plan
from filtrun.task import show_images
from filtrun.train_stage import train_stage


def base_model(plan: Plan, run: Run) -> tuple[nn.Module, str]:
    """The model a run starts from, on its device, and the SHA-256 of its weights."""
    normalize = plan.config["model"].get("normalize", "data")
    if plan.base == "pretrain":
        model, _ = train_stage(
            run, "pretrain", plan.make_model, parts={"model": model_options(plan.config)},
            task=plan.task.pretraining(), trainer=plan.pretrain, which=plan.config["pretrain"].get("classes", "source"),
            seed=plan.config["pretrain"].get("seed", 0), normalize=normalize,
        )  # fmt: skip
        return model, weights_sha256(model)
    seed_generators(plan.config["seed"], run.device)
    model = plan.make_model(pretrained=plan.base == "hub")
    if plan.base == "checkpoint":
        from filtrun.models.checkpoint import load_weights

        load_weights(model, plan.config["model"]["checkpoint"])
    model = run.model = model.to(run.device)
    if plan.base == "scratch":
        show_images(run)
    return model, weights_sha256(model)


def model_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says of the model itself, without where its weights come from."""
    from filtrun.build import RESERVED

    return {k: v for k, v in config.get("model", {}).items() if k not in RESERVED or k == "_target_"}


def _notes(run: Run) -> dict[str, Any]:
    """How the base itself is measured: without the run's methods."""
    methods, run.methods = run.methods, []
    try:
        return run.task.notes(run)
    finally:
        run.methods = methods


def evaluate_base(run: Run, base_sha256: str) -> dict[str, float]:
    """Metrics of the unchanged base, measured once for all runs that share it (a stage)."""
    import dataclasses

    from filtrun.code_version import code_version

    parts = {
        "base": base_sha256,
        "model": model_options(run.config),  # the same weights can compute something else
        "task": dataclasses.asdict(run.task),
        "data": run.data.fingerprint(),
        "classes": [run.which, run.keeps, run.data.source, run.data.target],
        "splits": [run.data.seed, run.data.val_fraction],
        "normalize": run.normalize,
        "notes": _notes(run),
        "code": code_version(run.model, run.task),
    }

    def build(folder: Path) -> None:
        with run.plainly():
            metrics = run.task.evaluate(run)
        if run.fabric.global_rank == 0:
            (folder / "metrics.json").write_text(json.dumps(metrics))

    folder = run.stage("evaluate-base", parts, build)
    try:
        return json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
