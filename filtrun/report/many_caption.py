"""What has to be said with a table of any records: how they were measured, and in what else they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.report import caption as parts
from filtrun.report.fairness import budget_line, by_value, differences, distinct, listed, names, unlike
from filtrun.report.table import SCALE_NOTES
from filtrun.report.units import plain

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def caption(rows: Rows, counts: Mapping[str, int], folder: Path, tuning: str) -> list[str]:
    """Scale, data, backbone, budget, base, tuning, seeds and machine of the records in `rows`.

    `counts` has the settings tried of each method among all records below the folder (`filtrun.report.fairness.tried`):
    what was tried counts, whether or not it is shown. `tuning` is the line of the searches on record.
    """
    records = [r for each in rows.values() for r in each]
    what = {
        "data": parts.some(r.get("data") for r in records),
        "model": parts.backbones(records),
        "task": parts.some(r.get("task") for r in records),
    }
    told = ", ".join(f"{method} {count:,}" for method, count in counts.items())
    seeds = sorted({r.get("seed", 0) for r in records})
    notes = distinct(r.get("evaluation") or {} for r in records)
    same = {k: v for k, v in notes[0].items() if all(k in note and note[k] == v for note in notes)}
    base = parts.base(distinct(r.get("config") or {} for r in records))
    lines = [
        "; ".join(SCALE_NOTES.get(s, f"scale {s}") for s in _scales(records)),
        "; ".join(f"{key} {value}" for key, value in what.items() if value),
        budget_line(rows),
        f"base: {base}" if base else "",
        f"{'seed' if len(seeds) == 1 else 'seeds'} {names([str(s) for s in seeds])}",
        f"tuning: settings recorded below {folder} with one task, data, model and scale: {told}",
        tuning,
        "measured with " + parts.evaluation(same) if same else "",
        "ran on " + parts.some(map(parts.where, records)),
    ]
    return [plain(line) for line in lines if line]


def warnings(rows: Rows, axes: Sequence[str], counts: Mapping[str, int], *, single: bool = False) -> list[str]:
    """Where the records differ in anything but the axes they are compared along.

    Args:
        counts: as in `caption`.
        single: `rows` is one row of all records, each shown by itself.
    """
    lines = []
    records = [r for each in rows.values() for r in each]
    scales = _scales(records)
    if "smoke" in scales:
        lines.append("smoke runs are too short to mean anything")
    if len(scales) > 1 and "scale" not in axes:
        lines.append(f"scales are mixed: {', '.join(scales)}")
    for key in ("task", "data", "model"):
        found = parts.some(r.get(key) for r in records)
        if ", " in found and key not in axes:
            lines.append(f"the records have unlike {key}: {found}")
            axes = (*axes, key)  # its options follow from it
    within, between = differences(rows, axes)
    skip = {"scale"} if len(scales) > 1 else set()
    within, between = ({k: v for k, v in each.items() if k not in skip} for each in (within, between))
    if within:
        lines.append(("the records also differ in " if single else "mixed within a row: ") + listed(within))
    if between:
        lines.append("the rows also differ in " + listed(between))
    if len(set(counts.values())) > 1:
        settings = {method: f"{count:,}" for method, count in counts.items()}
        lines.append(f"unlike tuning: settings tried: {by_value(settings)}")
    lines += [line.replace(" ()", "") for line in unlike(rows, [*within, *between])]
    return [plain(line) for line in lines]


def _scales(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str((r.get("config") or {}).get("scale")) for r in records))
