"""What has to be said with a table: scale, data, backbone, budget, seeds, tuning; and where its cells differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from filtrun.cells import content, flat
from filtrun.report.grid import Grid
from filtrun.report.table import SCALE_NOTES
from filtrun.report.units import plain

MOST = 8
"""Differences that are listed one by one."""


def caption(grid: Grid) -> list[str]:
    """The lines that state under which conditions the table was measured."""
    records = grid.records()
    configs = [r.get("config") or {} for r in records] or [s.job.config for s in grid.slots]
    choices = [s.job.choices for s in grid.slots]
    what = {
        "data": _some(r.get("data") for r in records) if records else _some(c.get("data") for c in choices),
        "model": _backbones(records) if records else _some(c.get("model") for c in choices),
        "task": _some(r.get("task") for r in records) if records else _some(c.get("task") for c in choices),
    }
    lines = [
        f"{SCALE_NOTES[grid.scale]}; {grid.table.setting}",
        "; ".join(f"{key} {value}" for key, value in what.items() if value),
        budget(grid),
        "base: " + _base(configs),
        f"seeds {', '.join(map(str, grid.seeds))}; mean ± sample standard deviation over seeds" if grid.seeds else "",
        "tuning: " + (grid.table.tuning or grid.card.tuning or "not stated"),
        "measured with " + _evaluation(records) if records else "",
        "ran on " + _some(_where(r) for r in records) if records else "",
    ]
    return [plain(line) for line in lines if line and line != "base: "]


def budget(grid: Grid) -> str:
    """Steps, batch and images seen, of all rows together where they agree."""
    told: dict[str, list[str]] = {}
    for row in grid.rows:
        for record in grid.records(row)[:1]:
            steps = (record.get("cost") or {}).get("steps")
            batch = ((record.get("config") or {}).get("trainer") or {}).get("batch_size")
            if steps == 0:
                told.setdefault("nothing trained", []).append(row)
            elif steps is not None and batch:
                told.setdefault(f"{steps:,} steps of {batch:,}, {steps * batch:,} images seen", []).append(row)
    if len(told) == 1:
        return f"budget: {next(iter(told))}"
    return "budget: " + "; ".join(f"{', '.join(rows)}: {text}" for text, rows in told.items()) if told else ""


def warnings(grid: Grid) -> list[str]:
    """What makes the rows unlike beside the axis they are compared on."""
    lines = []
    if grid.scale == "smoke" and grid.records():
        lines.append("smoke runs are too short to mean anything; so are the verdicts")
    given, unlike = differences(grid)
    if given:
        lines.append("the rows also set " + _listed(given))
    if unlike:
        lines.append("the rows also differ in " + _listed(unlike))
    firsts = {row: r for row in grid.rows for r in grid.records(row)[:1]}
    for key in sorted({k for r in firsts.values() for k in r.get("evaluation") or {}}):
        found = {row: str((r.get("evaluation") or {}).get(key)) for row, r in firsts.items()}
        if len(set(found.values())) > 1:
            lines.append(f"measured unlike: {key.replace('_', ' ')}: {_by_value(found)}")
    for key in ("device", "torch", "filtrun", "git"):
        values = {str((r.get("environment") or {}).get(key)) for r in grid.records()}
        if len(values) > 1:
            name = "versions of the code (git)" if key == "git" else key
            lines.append(f"the cells were run with unlike {name}: {', '.join(sorted(values))}")
    counts = {row: str(len(grid.records(row))) for row in grid.rows if grid.records(row)}
    if len(set(counts.values())) > 1:
        lines.append(f"the rows have unlike numbers of seeds: {_by_value(counts)}")
    return [plain(line) for line in lines]


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
    unlike: dict[str, str] = {}
    for key in sorted({k for values in configs.values() for k in values}):
        found = {row: str(values.get(key, "absent")) for row, values in configs.items()}
        if len(set(found.values())) > 1:
            mine = any(key == name or key.startswith(f"{name}.") for name in named)
            (given if mine else unlike)[key] = _by_value(found)
    return given, unlike


def _listed(found: Mapping[str, str]) -> str:
    shown = [f"{key}: {told}" for key, told in list(found.items())[:MOST]]
    more = f"; and {len(found) - MOST} more: {', '.join(list(found)[MOST:])}" if len(found) > MOST else ""
    return "; ".join(shown) + more


def _by_value(found: Mapping[str, str]) -> str:
    """``0.1 (a, b), 0.2 (c)``."""
    rows: dict[str, list[str]] = {}
    for row, value in found.items():
        rows.setdefault(value, []).append(row)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in rows.items())


def _some(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values if v))


def _backbones(records: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for record in records:
        total = (record.get("cost") or {}).get("total_params")
        told.append(f"{record.get('model')}" + (f" ({total:,} parameters)" if total else ""))
    return _some(told)


def _base(configs: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for config in configs:
        kind = (config.get("model") or {}).get("base")
        steps = (config.get("pretrain") or {}).get("steps")
        told.append(
            f"pre-trained for {steps:,} steps" if kind == "pretrain" and isinstance(steps, int) else str(kind or "")
        )
    return _some(told)


def _evaluation(records: Sequence[Mapping[str, Any]]) -> str:
    notes = records[0].get("evaluation") or {}
    return "; ".join(f"{key.replace('_', ' ')}: {_words(value)}" for key, value in notes.items())


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{str(k).replace('_', ' ')} {_words(v)}" for k, v in value.items())
    return str(value)


def _where(record: Mapping[str, Any]) -> str:
    environment = record.get("environment") or {}
    return f"{environment.get('device')}, torch {environment.get('torch')}"
