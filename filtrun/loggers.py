"""Where numbers go while a run runs: JSON lines always, TensorBoard by default, others by config."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.options import opt


class Logger:
    """Base: `open` once, `write` numbers at a step, `close` at the end."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        """Start logging for the run in `folder`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at optimizer step `step`."""

    def rewind(self, step: int) -> None:
        """A resumed run goes on after `step`: what an earlier try logged beyond it will be logged again."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines(Logger):
    """``metrics.jsonl``: one object a line, flushed at once, so that it grows while the run runs."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        self.stream = self.path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        self.stream.close()
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        work = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        work.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(work, self.path)
        self.stream = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, "time": round(time.time(), 3), **values}
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


@dataclass
class TensorBoard(Logger):
    """TensorBoard event files in the run folder's ``tensorboard/``."""

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


@dataclass
class MLflow(Logger):
    """MLflow tracking (``pip install filtrun[mlflow]``)."""

    uri: str | None = opt(None, "tracking server or folder; null: MLflow's own default")
    experiment: str = opt("filtrun", "experiment the run is filed under")

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise UserError("logger=mlflow needs MLflow: pip install 'filtrun[mlflow]'") from error
        self.mlflow = mlflow
        if self.uri:
            mlflow.set_tracking_uri(self.uri)
        mlflow.set_experiment(self.experiment)
        mlflow.start_run(run_name=name)
        mlflow.log_dict(dict(config), "config.json")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({key.replace("@", "_"): value for key, value in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


@dataclass
class WandB(Logger):
    """Weights & Biases (``pip install filtrun[wandb]``)."""

    project: str = opt("filtrun", "project the run is filed under")
    mode: str = opt("offline", "where results go", choices=("online", "offline", "disabled"))

    def open(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("logger=wandb needs Weights & Biases: pip install 'filtrun[wandb]'") from error
        self.run = wandb.init(project=self.project, mode=self.mode, name=name, dir=str(folder), config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Loggers:
    """Several loggers as one; with none it swallows everything (processes other than the first)."""

    def __init__(self, loggers: list[Logger] | None = None) -> None:
        self.loggers = loggers or []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log to all."""
        for logger in self.loggers:
            logger.write(step, values)

    def rewind(self, step: int) -> None:
        """Rewind all."""
        for logger in self.loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Close all."""
        for logger in self.loggers:
            logger.close()
        self.loggers = []
