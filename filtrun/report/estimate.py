"""What a cell that is not run would take, by earlier records: of its row, of its table, of cells like it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filtrun.report.index import read_records

RUNS = "runs"
ALIKE = ("task", "data", "model")


class Estimate(NamedTuple):
    """Seconds one cell takes; `basis` says whose records that is from, empty when its own row's."""

    seconds: float
    basis: str = ""


def estimate(row: str, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Estimate | None:
    """By the finished records of a table by row: the row's own, else the mean of the other rows'."""
    own = _seconds(records.get(row, ()))
    if own:
        return Estimate(sum(own) / len(own))
    others = {name: _seconds(found) for name, found in records.items() if name != row}
    means = {name: sum(each) / len(each) for name, each in others.items() if each}
    if not means:
        return None
    return Estimate(sum(means.values()) / len(means), f"by {', '.join(means)}")


def like(config: Mapping[str, Any], choices: Mapping[str, str], folder: Path) -> Estimate | None:
    """By finished cells below `folder`, and single runs beside it, of the same scale, task, data and model.

    Those with the same method come first. Where they were trained for another number of images, their training time is
    scaled to the cell's.
    """
    wanted = tuple(choices.get(key) for key in ALIKE)
    found: dict[bool, list[float]] = {True: [], False: []}
    for record in (*_below(folder), *_below(folder.parent / RUNS)):
        held = record.get("config") or {}
        if held.get("scale") != config.get("scale"):
            continue
        took = _scaled(record, _images(config))
        if took is not None and tuple(record.get(key) for key in ALIKE) == wanted:
            found[record.get("methods") == list(config.get("method") or {})].append(took)
    for same, told in ((True, "the same method"), (False, "other methods")):
        if found[same]:
            count = len(found[same])
            runs = "1 run" if count == 1 else f"{count} runs"
            return Estimate(sum(found[same]) / count, f"by {runs} of {told} on the same data and model")
    return None


def _below(folder: Path) -> tuple[dict[str, Any], ...]:
    try:
        return _read(folder, folder.stat().st_mtime_ns)
    except OSError:
        return ()


@functools.lru_cache(maxsize=2)
def _read(folder: Path, changed: int) -> tuple[dict[str, Any], ...]:
    """Looked through once for all rows of all tables; a new cell changes the folder's time."""
    return tuple(read_records(folder, finished=True))


def _seconds(records: Iterable[Mapping[str, Any]]) -> list[float]:
    return [float(r["cost"]["total_seconds"]) for r in records if (r.get("cost") or {}).get("total_seconds")]


def _images(config: Mapping[str, Any]) -> float | None:
    """Images a configuration trains on, where it counts steps."""
    trainer = config.get("trainer") or {}
    steps, batch = trainer.get("steps"), trainer.get("batch_size")
    return float(steps) * batch if isinstance(steps, int) and isinstance(batch, int) else None


def _scaled(record: Mapping[str, Any], images: float | None) -> float | None:
    cost = record.get("cost") or {}
    total, train = cost.get("total_seconds"), cost.get("train_seconds")
    if not total:
        return None
    seen = _images(record.get("config") or {})
    if not train or not seen or not images:
        return float(total)
    return float(total) + float(train) * (images / seen - 1)
