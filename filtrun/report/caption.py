"""What has to be said with a table: scale, data, backbone, budget, seeds, tuning; and where its cells differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from filtrun.cells import content, flat
from filtrun.report.fairness import budget_line, by_value, listed, unlike
from filtrun.report.grid import Grid
from filtrun.report.table import SCALE_NOTES
from filtrun.report.units import plain


def caption(grid: Grid, tuning: str) -> list[str]:
    """The lines that state under which conditions the table was measured; `tuning` is that of the tuning budgets."""
    records = grid.records()
    configs = [r.get("config") or {} for r in records] or [s.job.config for s in grid.slots]
    choices = [s.job.choices for s in grid.slots]
    what = {
        "data": some(r.get("data") for r in records) if records else some(c.get("data") for c in choices),
        "model": backbones(records) if records else some(c.get("model") for c in choices),
        "task": some(r.get("task") for r in records) if records else some(c.get("task") for c in choices),
    }
    lines = [
        f"{SCALE_NOTES[grid.scale]}; {grid.table.setting}",
        "; ".join(f"{key} {value}" for key, value in what.items() if value),
        budget_line(rows_of(grid)),
        "base: " + base(configs),
        f"seeds {', '.join(map(str, grid.seeds))}; mean ± sample standard deviation over seeds" if grid.seeds else "",
        "tuning: " + (grid.table.tuning or grid.card.tuning or "not stated"),
        tuning,
        "measured with " + evaluation(records[0].get("evaluation") or {}) if records else "",
        "ran on " + some(where(r) for r in records) if records else "",
    ]
    return [plain(line) for line in lines if line and line != "base: "]


def warnings(grid: Grid) -> list[str]:
    """What makes the rows unlike beside the axis they are compared on."""
    lines = []
    if grid.scale == "smoke" and grid.records():
        lines.append("smoke runs are too short to mean anything; so are the verdicts")
    given, others = differences(grid)
    if given:
        lines.append("the rows also set " + listed(given))
    if others:
        lines.append("the rows also differ in " + listed(others))
    lines += unlike(rows_of(grid), [*given, *others])
    return [plain(line) for line in lines]


def rows_of(grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """The finished records of each row."""
    return {row: grid.records(row) for row in grid.rows}


def differences(grid: Grid) -> tuple[dict[str, str], dict[str, str]]:
    """Keys outside ``method`` and ``model`` whose values differ between the rows' records.

    Returns ({key: values}) of those the card's rows set themselves, and of the others.
    """
    configs = {}
    for row in grid.rows:
        for record in grid.records(row)[:1]:
            values = flat(content(record.get("config") or {}))
            configs[row] = {
                k: v for k, v in values.items() if k != "seed" and k.partition(".")[0] not in ("method", "model")
            }
    named = {o.lstrip("+~").partition("=")[0] for row in grid.rows for o in grid.table.rows[row]}
    given: dict[str, str] = {}
    others: dict[str, str] = {}
    for key in sorted({k for values in configs.values() for k in values}):
        found = {row: str(values.get(key, "absent")) for row, values in configs.items()}
        if len(set(found.values())) > 1:
            mine = any(key == name or key.startswith(f"{name}.") for name in named)
            (given if mine else others)[key] = by_value(found)
    return given, others


def some(values: Iterable[Any]) -> str:
    """Each once, but for what says nothing."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v))


def backbones(records: Sequence[Mapping[str, Any]]) -> str:
    """``resnet20 (19,074 parameters)``."""
    told = []
    for record in records:
        total = (record.get("cost") or {}).get("total_params")
        told.append(f"{record.get('model')}" + (f" ({total:,} parameters)" if total else ""))
    return some(told)


def base(configs: Sequence[Mapping[str, Any]]) -> str:
    """What was trained from."""
    told = []
    for config in configs:
        kind = (config.get("model") or {}).get("base")
        steps = (config.get("pretrain") or {}).get("steps")
        told.append(
            f"pre-trained for {steps:,} steps" if kind == "pretrain" and isinstance(steps, int) else str(kind or "")
        )
    return some(told)


def evaluation(notes: Mapping[str, Any]) -> str:
    """How it was measured."""
    return "; ".join(f"{key.replace('_', ' ')}: {_words(value)}" for key, value in notes.items())


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{str(k).replace('_', ' ')} {_words(v)}" for k, v in value.items())
    return str(value)


def where(record: Mapping[str, Any]) -> str:
    """Device and version of torch."""
    environment = record.get("environment") or {}
    return f"{environment.get('device')}, torch {environment.get('torch')}"
