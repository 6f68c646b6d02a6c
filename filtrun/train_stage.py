"""Train a model as a cached stage with the ordinary loop: bases to adapt, judges, classifiers that guide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from filtrun import runner
from filtrun.callbacks import Ema, Log
from filtrun.cells import MACHINE_OPTIONS, without_later
from filtrun.code_version import code_version, module_version
from filtrun.context import Run, seed_generators
from filtrun.loggers import Loggers
from filtrun.method import Method
from filtrun.methods.baseline.full import Full
from filtrun.pack import load_tree, save_tree
from filtrun.task import Task, show_images
from filtrun.trainer import Trainer


def trainer_key(trainer: Trainer) -> dict[str, Any]:
    """The options of a trainer that change its result."""
    options = without_later({"trainer": dataclasses.asdict(trainer)})["trainer"]
    return {name: value for name, value in options.items() if name not in MACHINE_OPTIONS}


def train_stage(
    run: Run,
    name: str,
    make: Callable[[], nn.Module],
    *,
    parts: Mapping[str, Any],
    task: Task,
    trainer: Trainer,
    which: str = "all",
    seed: int = 0,
    normalize: str = "data",
    methods: Sequence[Method] = (),
) -> tuple[nn.Module, Path]:
    """Return (the trained model, its stage folder), trained now or taken from the cache.

    Args:
        run: the run that needs it: gives device, data and stage cache.
        name: what the stage is called.
        make: builds the untrained model; called under `seed`.
        parts: what the model itself depends on; data, task, trainer, seed and code are added here.
        which: classes it is trained on.
        methods: fresh methods that act in the training, keyed by class and options; what else they hold (masks, a
            part of the data) belongs into `parts`. Empty: plain training of everything.
    """
    seed_generators(seed, run.device)
    model = make()
    key = {
        **parts,
        "data": run.data.fingerprint(),
        "which": which,
        "classes": None if which == "all" else [run.data.source, run.data.target],
        "splits": [run.data.seed, run.data.val_fraction, run.data.few_shot if which != "source" else 0],
        "augment": str(task.augment(run.data)),
        "task": {"kind": task.kind, **task.training_key()},
        "trainer": trainer_key(trainer),
        "seed": seed,
        "normalize": normalize,
        "code": {**code_version(model, task, *methods), runner.__name__: module_version(runner.__name__)},
    }

    if methods:
        key["methods"] = [{"class": type(m).__qualname__, **dataclasses.asdict(m)} for m in methods]

    def build(folder: Path) -> None:
        log, ema = Log(trainer.log_every, Loggers(), run.bar), Ema(trainer.ema) if trainer.ema else None
        inner = Run(
            fabric=run.fabric, task=task, data=run.data, model=model, methods=[*methods] or [Full()], trainer=trainer,
            stages=run.stages, seed=seed, train_split=run.data.split("train", which), normalize=normalize,
            callbacks=[log, *([ema] if ema else [])], label=name, which=which, bar=run.bar,
        )  # fmt: skip
        inner.model.to(run.device)
        show_images(inner)
        runner.edit(inner)
        runner.setup(inner)
        if ema:
            ema.start(inner)
        runner.fit(inner)
        inner.each_reversed("finish")
        if run.fabric.global_rank == 0:
            save_tree(folder / "model.safetensors", inner.model.state_dict())

    folder = run.stage(name, key, build)
    fresh_state, _ = load_tree(folder / "model.safetensors")
    model.load_state_dict(fresh_state)
    return model.to(run.device), folder
