"""Where numbers go: JSON lines that survive a kill, TensorBoard files, and what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import UserError
from filtrun.loggers import JsonLines, Logger, Loggers, MLflow, TensorBoard, WandB


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def opened(folder: Path) -> JsonLines:
    logger = JsonLines()
    logger.open(folder, "run", {})
    return logger


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    logger = opened(tmp_path)
    logger.write(2, {"loss": 1.5})
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(2, 1.5)]
    logger.write(4, {"loss": 1.25, "lr": 0.5})
    assert rows(tmp_path)[1].keys() == {"step", "time", "loss", "lr"}
    logger.close()


@pytest.mark.parametrize(("step", "kept"), [(4, [2, 4]), (5, [2, 4]), (0, []), (9, [2, 4, 6])])
def test_a_resumed_run_logs_no_step_twice(tmp_path: Path, step: int, kept: list[int]) -> None:
    first = opened(tmp_path)
    for done in (2, 4, 6):
        first.write(done, {"loss": float(done)})
    first.stream.write('{"step": 8, "lo')  # killed in the middle of a line
    first.close()
    again = opened(tmp_path)
    again.rewind(step)
    again.write(10, {"loss": 0.0})
    again.close()
    assert [r["step"] for r in rows(tmp_path)] == [*kept, 10]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    logger = TensorBoard()
    logger.open(tmp_path, "run", {})
    logger.write(3, {"train/loss": 0.5})
    logger.write(6, {"train/loss": 0.25})
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.5), (6, 0.25)]


@pytest.mark.parametrize(("logger", "module"), [(MLflow(), "mlflow"), (WandB(), "wandb")])
def test_a_logger_that_is_not_installed_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: Logger, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install 'filtrun\\[{module}\\]'"):
        logger.open(tmp_path, "run", {})


def test_several_are_one_and_none_is_quiet() -> None:
    calls: list[tuple[Any, ...]] = []

    class Keeps(Logger):
        def write(self, step: int, values: Any) -> None:
            calls.append(("write", step, values))

        def rewind(self, step: int) -> None:
            calls.append(("rewind", step))

        def close(self) -> None:
            calls.append(("close",))

    both = Loggers([Keeps(), Keeps()])
    both.write(1, {"a": 1.0})
    both.rewind(0)
    both.close()
    both.close()  # once is enough
    assert calls == [("write", 1, {"a": 1.0})] * 2 + [("rewind", 0)] * 2 + [("close",)] * 2
    Loggers().write(1, {})
