"""One run from plan to record: base, evaluation, training, evaluation, finish, what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from filtrun import runner
from filtrun.base import base_model, evaluate_base
from filtrun.callbacks import Ema, Log
from filtrun.checkpoint import Checkpoints, drop_checkpoints, load_checkpoint
from filtrun.context import Run
from filtrun.cost import (
    environment,
    latency,
    operations,
    optimizer_bytes,
    peak_memory,
    reset_peak_memory,
    saved_for_backward,
)  # fmt: skip
from filtrun.delta import save_delta
from filtrun.errors import Stopped
from filtrun.loggers import JsonLines, Loggers
from filtrun.method import Method, count
from filtrun.midway import Midway
from filtrun.plan import Plan
from filtrun.record import Record
from filtrun.stages import Stages, file_sha256
from filtrun.stopping import training


def new_run(plan: Plan, fabric: Any, folder: Path, bar: Any = None, log: Any = None) -> Run:
    """The run of a plan, its data read and its splits cut; the model is still missing."""
    data = plan.data.setup(plan.config["split_seed"])
    stages = Stages(Path(plan.config["stages"]["root"]), log or (lambda line: None))
    return Run(
        fabric=fabric, task=plan.task, data=data, model=torch.nn.Module(), methods=plan.methods, trainer=plan.trainer,
        stages=stages, seed=plan.config["seed"], dir=folder, normalize=plan.config["model"].get("normalize", "data"),
        config=plan.config, which=plan.which, keeps=plan.keeps, bar=bar,
    )  # fmt: skip


def experiment(
    plan: Plan, fabric: Any, folder: Path, record: Record, bar: Any = None, log: Any = None, fit: Any = None
) -> Record:
    """Carry out a plan in `folder`, keeping `record` up to date; every process of a run calls this.

    `fit` trains a run that is set up, as `runner.fit` does, which is used when there is none.

    Raises UserError and RunFailure; the caller writes them into the record.
    """
    started, first = time.perf_counter(), fabric.global_rank == 0
    run = new_run(plan, fabric, folder, bar, log)
    record.stages = run.stages.used
    record.environment = environment(run.device)
    save = record.write if first else (lambda: None)
    save()

    run.model, base_sha256 = base_model(plan, run)
    run.task.prepare(run)
    run.shared["base_buffers"] = {name: b.detach().cpu().clone() for name, b in run.model.named_buffers()}
    record.cost["total_params"] = count(run.model.parameters())
    with run.plainly():
        record.cost |= {f"base_{name}": value for name, value in _speed(run).items()}
    record.evaluation = run.task.notes(run)
    if plan.trainer.evaluate and plan.base != "scratch":
        record.metrics |= _named("base", evaluate_base(run, base_sha256))
        _show(run, folder / "samples_before.png", record, "samples before", without_methods=True)
    save()

    loggers = _open_loggers(plan, folder, record.name) if first else Loggers()
    try:
        train(plan, run, record, loggers, fit or runner.fit)
        save()
        measure(plan, run, record, base_sha256)
    finally:
        loggers.close()
    record.cost["total_seconds"] = time.perf_counter() - started
    record.status, record.error = "finished", None
    save()
    if first:
        drop_checkpoints(folder)
    return record


def train(plan: Plan, run: Run, record: Record, loggers: Loggers, fit: Callable[[Run], None]) -> None:
    """Let the methods edit the model, resume from a checkpoint if there is one, and fit."""
    log = Log(plan.trainer.log_every, loggers, run.bar)
    ema = Ema(plan.trainer.ema) if plan.trainer.ema else None
    run.callbacks = [log, *([ema] if ema else []), Checkpoints(plan.trainer.checkpoint_every)]
    if plan.trainer.evaluations:
        run.callbacks.insert(-1, Midway(plan.trainer.evaluations, log, loggers))
    run.train_split = run.data.split("train", plan.which)
    runner.edit(run)
    trainable = count(p for p in run.model.parameters() if p.requires_grad)
    runner.setup(run)
    if run.optimizer is None:
        run.callbacks = []
    if ema is not None and run.optimizer is not None:
        ema.start(run)
    if run.optimizer is not None:
        load_checkpoint(run)
        loggers.rewind(run.step)  # without a checkpoint, to the start: all of it will be logged again
        log.last = run.step
    if run.speed is not None:
        record.environment["speed"] = run.speed.facts()
    reset_peak_memory(run.device)
    try:
        with training():
            fit(run)
    except Stopped:  # for good, most likely: its checkpoints would only take room
        record.cost |= {"steps": run.step, "train_seconds": log.seconds}
        if run.fabric.global_rank == 0:
            drop_checkpoints(run.dir)
        raise
    record.report = {m.slug: found for m in run.methods if (found := m.report(run))}
    own = [r["trainable_params"] for r in record.report.values() if "trainable_params" in r]  # not all it stores trains
    record.cost |= {
        "trainable_params": int(own[0]) if own else trainable,
        "peak_memory_bytes": peak_memory(run.device) if run.optimizer is not None else None,
        **_training_memory(run),
        "train_seconds": log.seconds,
        "images_per_second": log.images / log.seconds if log.seconds else None,
        "steps": run.step,
        **({"together": run.shared["together"]} if "together" in run.shared else {}),
    }


def _training_memory(run: Run) -> dict[str, int | None]:
    """Bytes autograd keeps for the backward pass of the task's probe, and bytes of the optimizer's state."""
    if run.optimizer is None:
        return {"saved_bytes": None, "optimizer_bytes": None}
    with run.evaluating(), torch.enable_grad():
        saved = saved_for_backward(lambda: run.task.probe(run), run.model)
    return {"saved_bytes": saved, "optimizer_bytes": optimizer_bytes(run.optimizer)}


def measure(plan: Plan, run: Run, record: Record, base_sha256: str) -> None:
    """Evaluate, store the delta, finish, evaluate again where finishing changed the output, and show."""
    folder, first = run.dir, run.fabric.global_rank == 0
    untouched = run.optimizer is None and not any(_changes_evaluation(m) for m in run.methods)
    if plan.trainer.evaluate and untouched and _plain(record.metrics, "base"):
        record.metrics |= _named("tuned", _plain(record.metrics, "base"))
    elif plan.trainer.evaluate:
        with run.evaluating():
            record.metrics |= _named("tuned", run.task.evaluate(run))
    record.report = {m.slug: found for m in run.methods if (found := m.report(run))}  # some know more by now
    record.metrics |= run.measured
    with run.evaluating():  # averaged weights, where there are any, are the ones to keep
        before = run.task.probe(run)
        if first:
            stored = save_delta(run, folder, base_sha256)
            record.cost["stored_bytes"] = stored.stat().st_size
            record.artifacts.append(_artifact(folder, stored, "model"))
    run.each_reversed("finish")
    run.callbacks = []
    record.cost["params"] = count(run.model.parameters())
    record.cost["nonzero_params"] = sum(int(torch.count_nonzero(p)) for p in run.model.parameters())
    for report in record.report.values():  # by the methods' own formulas, where the counter sees no saving
        record.cost |= {f"effective_{name}": report[name] for name in ("flops", "macs") if name in report}
    with run.evaluating():
        unchanged = torch.equal(before, run.task.probe(run))
        record.cost |= _speed(run)
        if plan.trainer.evaluate:
            # the same output to the bit gives the same metrics: no need to measure twice
            again = _plain(record.metrics, "tuned") if unchanged else run.task.evaluate(run)
            record.metrics |= _named("test", again)
    if "nfe" in run.shared:
        record.cost["nfe"] = run.shared["nfe"]
    _show(run, folder / "samples.png", record, "samples")


def _speed(run: Run) -> dict[str, float]:
    """Operations of one sample's forward pass, and the median seconds of one over the whole probe batch."""

    def probe() -> torch.Tensor:
        return run.task.probe(run)

    return {**operations(probe), "latency_seconds": latency(probe, run.device)}


def _changes_evaluation(method: Method) -> bool:
    """Whether a method that trains nothing may still change what is measured."""
    hooks = ("edit_model", "before_eval", "guide", "sampler", "prepare")
    return any(getattr(type(method), hook) is not getattr(Method, hook) for hook in hooks)


def _show(run: Run, path: Path, record: Record, kind: str, without_methods: bool = False) -> None:
    methods, run.methods = run.methods, [] if without_methods else run.methods
    try:
        with run.evaluating():
            drawn = run.task.show(run, path)
    finally:
        run.methods = methods
    if drawn and run.fabric.global_rank == 0:
        record.artifacts.append(_artifact(path.parent, path, kind))


def _open_loggers(plan: Plan, folder: Path, name: str) -> Loggers:
    loggers = [JsonLines(), *plan.loggers]
    for logger in loggers:
        logger.open(folder, name, plan.config)
    return Loggers(loggers)


def _artifact(folder: Path, path: Path, kind: str) -> dict[str, Any]:
    return {"path": str(path.relative_to(folder)), "kind": kind, "sha256": file_sha256(path)}


def _named(split: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": float(value) for name, value in values.items()}


def _plain(metrics: dict[str, float], split: str) -> dict[str, float]:
    return {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(f"{split}/")}
