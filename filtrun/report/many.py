"""Any records as a table: one a row, or groups with mean ± std, filtered, pivoted and sorted by any key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.report.evidence import measured
from filtrun.report.fairness import tried
from filtrun.report.many_caption import caption, warnings
from filtrun.report.select import ABSENT, Condition, check_keys, keys_of, matches, order, told, value_of
from filtrun.report.sheet import Box, Column, Number, Sheet, marks, metric_facts
from filtrun.report.statistics import mean, std
from filtrun.report.tuning import Searches, by_setting, read_searches, tuning_line, unlike_tuning

FINISHED = "finished"
USUAL = ("methods", "task", "data", "model", "scale", "seed", "status")
"""Columns of a table of single records, where they hold more than one value."""
METRICS = 4
"""So many metrics are shown when none is asked for."""
LOWER = ("params", "bytes", "flops", "macs", "seconds", "nfe")


@dataclass(frozen=True)
class Question:
    """What is asked of a folder of records. `by` and `pivot` group; `limit` cuts a long table (0: nothing)."""

    where: tuple[Condition, ...] = ()
    by: tuple[str, ...] = ()
    pivot: str = ""
    metrics: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    sort: str = ""
    reverse: bool = False
    limit: int = 0


Records = list[dict[str, Any]]


def folder_sheet(records: Records, folder: Path, ask: Question, broken: Sequence[Path] = ()) -> Sheet:
    """The table of a folder's records.

    ``data["rows"]`` has the same rows as flat mappings of values. Raises UserError for a key that no record has, or
    when none is left.
    """
    if not records:
        raise UserError(f"there is no {'readable ' if broken else ''}record below {folder}")
    every = "all" in ask.columns
    named = {
        "--where": [c.key for c in ask.where], "--by": ask.by, "--pivot": [ask.pivot] if ask.pivot else [],
        "--metric": ask.metrics, "--columns": [c for c in ask.columns if c != "all"],
        "--sort": [ask.sort] if ask.sort not in ("", "n") else [],
    }  # fmt: skip
    for option, keys in named.items():
        check_keys(option, keys, records)
    chosen = [r for r in records if matches(r, ask.where)]
    if not chosen:
        raise UserError(f"none of {len(records):,} records below {folder} has {', '.join(map(str, ask.where))}")
    notes = [f"{len(broken)} files could not be read, {broken[0]} first"] if broken else []
    grouped = bool(ask.by or ask.pivot)
    if grouped and not any(c.key == "status" for c in ask.where):
        chosen, left = _only_finished(chosen)
        notes += [left] if left else []
    if grouped:
        chosen, repeated = _once(chosen)
        notes += [repeated] if repeated else []
    metrics = ask.metrics or _usual_metrics(chosen)
    facts = metric_facts(list(dict.fromkeys(_task(r) for r in chosen)))
    numbers = {m: Number.of(m, facts) for m in metrics}
    better = {m: _direction(m, facts) for m in (*metrics, ask.sort)}
    searches = read_searches(folder)
    notes += searches.problems()
    title = f"{len(chosen):,} records below {folder}"
    title += f" with {', '.join(map(str, ask.where))}" if ask.where else ""
    if grouped:
        by = ask.by or tuple(k for k in ("methods",) if k != ask.pivot)
        sheet, rows, axes = _groups(chosen, by, ask, numbers, better, searches)
    else:
        columns = tuple(c for c in ask.columns if c != "all") or _usual_columns(chosen)
        sheet, rows, axes = _singles(chosen, folder, columns, ask, numbers, better, searches)
        if every:
            keys = [key for key in keys_of(chosen) if key not in ("folder", "error")]
            ordered = {r["folder"]: r for r in chosen}
            for row in sheet.data["rows"]:
                row |= {key: _plain(value_of(ordered[row["folder"]], key)) for key in keys}
    sheet.title = title
    counts = tried(records, [r for each in rows.values() for r in each])
    budgets = by_setting([r for each in rows.values() for r in each], searches)
    sheet.caption = caption(rows, counts, folder, tuning_line({name: budget for name, (budget, _) in budgets.items()}))
    sheet.notes = notes + sheet.notes
    sheet.warnings = warnings(rows, axes, counts, single=not grouped)
    sheet.warnings += unlike_tuning({name: budget for name, (budget, trains) in budgets.items() if trains})
    sheet.data |= {
        "title": title, "records": len(chosen), "caption": sheet.caption, "notes": sheet.notes,
        "warnings": sheet.warnings, "tried": counts,
    }  # fmt: skip
    return sheet


def _singles(
    chosen: Records, folder: Path, columns: Sequence[str], ask: Question, numbers: Mapping[str, Number],
    better: Mapping[str, str], searches: Searches,
) -> tuple[Sheet, dict[str, Records], tuple[str, ...]]:  # fmt: skip
    ordered = _sorted(chosen, lambda r: value_of(r, ask.sort), better[ask.sort], ask) if ask.sort else chosen
    shown = ordered[: ask.limit or None]
    places = [_place(r, folder) for r in shown]
    heads = [Column("run", number=False)]
    rows = [[Box(place)] for place in places]
    for key in columns:
        values = [value_of(r, key) for r in shown]
        digits = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        heads.append(Column(key, number=digits))
        for row, value in zip(rows, values, strict=True):
            row.append(Box(told(value)))
    for metric, number in numbers.items():
        held = [measured(r, metric) for r in ordered]
        marked = marks(held, better[metric] if _alike(ordered) else "")
        heads.append(Column(number.title, better[metric]))
        for row, value, mark in zip(rows, held, marked, strict=False):
            row.append(Box("-" if value is None else number.values([value]), mark))
    sheet = Sheet("", heads, rows)
    if len(shown) < len(ordered):
        left = len(ordered) - len(shown)
        sheet.notes.append(f"and {left:,} records more: --limit 0 shows all, --where and --by make them fewer")
    sheet.data["rows"] = [
        {"folder": r["folder"]} | {key: _plain(value_of(r, key)) for key in columns}
        | {metric: measured(r, metric) for metric in numbers}
        for r in ordered
    ]  # fmt: skip
    _tuned(sheet, [[r] for r in ordered], searches)
    return sheet, {"": ordered}, tuple(columns)


def _groups(
    chosen: Records, by: Sequence[str], ask: Question, numbers: Mapping[str, Number], better: Mapping[str, str],
    searches: Searches,
) -> tuple[Sheet, dict[str, Records], tuple[str, ...]]:  # fmt: skip
    groups: dict[tuple[str, ...], Records] = {}
    for record in chosen:
        groups.setdefault(tuple(told(value_of(record, key)) for key in by), []).append(record)
    order_of = {name: [order(value_of(records[0], key)) for key in by] for name, records in groups.items()}
    names = sorted(groups, key=lambda name: order_of[name])
    if ask.sort:

        def sorts(name: tuple[str, ...]) -> Any:
            values = _values(groups[name], ask.sort)
            if ask.sort == "n":
                return len(groups[name])
            return mean(values) if values else value_of(groups[name][0], ask.sort)

        names = _sorted(names, sorts, "higher" if ask.sort == "n" else better[ask.sort], ask)
    pivots: list[str | None] = [None]
    if ask.pivot:
        found = {told(value_of(r, ask.pivot)): value_of(r, ask.pivot) for r in chosen}
        texts = sorted(found, key=lambda text: order(found[text]))
        pivots = [*texts]

    def cell(name: tuple[str, ...], pivot: str | None) -> Records:
        return [r for r in groups[name] if pivot is None or told(value_of(r, ask.pivot)) == pivot]

    cells = {(name, each): cell(name, each) for name in names for each in pivots}
    counts = {len(records) for records in cells.values() if records}
    heads = [Column(key, number=False) for key in by]
    rows = [[Box(text) for text in name] for name in names]
    data: list[dict[str, Any]] = [
        dict(zip(by, (_plain(value_of(groups[name][0], key)) for key in by), strict=True)) for name in names
    ]
    for pivot in pivots:
        column: list[Records] = [cells[name, pivot] for name in names]
        where = f"{ask.pivot}={pivot} " if pivot is not None else ""
        if pivot is None:
            heads.append(Column("n"))
            for row, records in zip(rows, column, strict=True):
                row.append(Box(str(len(records))))
        for line, records in zip(data, column, strict=True):
            line[f"{where}n"] = len(records)
        alike = _alike([r for records in column for r in records])
        for metric, number in numbers.items():
            held = [_values(records, metric) for records in column]
            marked = marks([mean(v) if v else None for v in held], better[metric] if alike else "")
            heads.append(Column(number.title, better[metric], where.strip()))
            for row, line, inside, values, mark in zip(rows, data, column, held, marked, strict=True):
                told_already = len(counts) == 1 or pivot is None
                many = f" ({len(values)})" if values and not (told_already and len(values) == len(inside)) else ""
                row.append(Box(number.values(values) + many, mark))
                line[f"{where}{metric}"] = mean(values) if values else None
                line[f"{where}{metric} std"] = std(values)
    sheet = Sheet("", heads, rows[: ask.limit or None])
    if len(sheet.rows) < len(names):
        sheet.notes.append(f"and {len(names) - len(sheet.rows):,} groups more: --limit 0 shows all")
    n = f"n = {counts.pop()}" if len(counts) == 1 else "(n)" if ask.pivot else "n"
    sheet.notes.append(f"mean ± sample standard deviation over the {n} records of a group")
    sheet.data["rows"] = data
    _tuned(sheet, [groups[name] for name in names], searches)
    apart = ask.pivot not in ("", "seed")  # seeds are what a row is measured over, also when each has its column
    found_rows = {
        _label(by, name, ask.pivot, each if apart else None): records
        for (name, each), records in (cells if apart else {(name, None): groups[name] for name in names}).items()
        if records
    }
    return sheet, found_rows, (*by, *([ask.pivot] if ask.pivot else []))


def _tuned(sheet: Sheet, each: Sequence[Records], searches: Searches) -> None:
    """Say of each row what was spent on its tuning; a column of its own where something was."""
    found = [
        sorted(dict.fromkeys(searches.of(record) for record in records), key=lambda budget: -budget.trials)
        for records in each
    ]
    for line, budgets in zip(sheet.data["rows"], found, strict=True):
        line["tuning"] = "; ".join(dict.fromkeys(budget.text for budget in budgets))
        line["tuning trials"] = budgets[0].trials if len(budgets) == 1 else None
    if any(budget.trials for budgets in found for budget in budgets):
        sheet.columns.append(Column("tuning", number=False))
        for row, budgets in zip(sheet.rows, found, strict=False):
            row.append(Box(", ".join(dict.fromkeys(budget.short for budget in budgets))))


def _label(by: Sequence[str], name: Sequence[str], key: str, pivot: str | None) -> str:
    words = [text if k == "methods" else f"{k}={text}" for k, text in zip(by, name, strict=True)]
    return " ".join(words + ([f"{key}={pivot}"] if pivot is not None else []))


def _values(records: Records, metric: str) -> list[float]:
    return [value for r in records if (value := measured(r, metric)) is not None]


def _only_finished(records: Records) -> tuple[Records, str]:
    done = [r for r in records if r.get("status") == FINISHED]
    rest = [str(r.get("status")) for r in records if r.get("status") != FINISHED]
    if not done:
        raise UserError(f"none of the {len(records):,} records is finished; --where status=... shows others")
    counts = ", ".join(f"{rest.count(status)} {status}" for status in dict.fromkeys(rest))
    return done, f"left out because they are not finished: {counts} (--where status=... shows them)" if rest else ""


def _once(records: Records) -> tuple[Records, str]:
    """Each cell once, the last in the order of folders: the same run twice is no second seed."""
    kept = {r["cell"]: r for r in records}
    left = len(records) - len(kept)
    return [*kept.values()], f"{left} repeat what another record computed and count once" if left else ""


def _sorted(items: Iterable[Any], value: Callable[[Any], Any], better: str, ask: Question) -> list[Any]:
    """The best first where that is known, else ascending; what has no value comes last either way."""
    pairs = [(order(value(item)), item) for item in items]
    there = sorted((p for p in pairs if p[0][0] < 2), key=lambda p: p[0], reverse=(better == "higher") != ask.reverse)
    return [item for _, item in [*there, *(p for p in pairs if p[0][0] == 2)]]


def _usual_columns(records: Records) -> tuple[str, ...]:
    """Of the usual columns those that tell records apart."""
    varied = [key for key in USUAL if len({told(value_of(r, key)) for r in records}) > 1]
    return tuple(varied) or ("methods", "seed")


def _usual_metrics(records: Records) -> tuple[str, ...]:
    """The test metrics that most records have."""
    counts: dict[str, int] = {}
    for record in records:
        for metric in record.get("metrics") or ():
            if metric.startswith("test/"):
                counts[metric] = counts.get(metric, 0) + 1
    most = sorted(counts, key=lambda m: -counts[m])[:METRICS]
    return tuple(m for m in counts if m in most)


def _direction(metric: str, facts: Mapping[str, Any]) -> str:
    split, _, name = metric.partition("/")
    if split == "cost":
        return "higher" if name == "images_per_second" else "lower" if name.endswith(LOWER) else ""
    fact = facts.get(name) if split != "report" else None
    return fact.better if fact else ""


def _alike(records: Records) -> bool:
    """Whether one of the records can be the best: all solve one task on one data set at one scale."""
    return len({(r.get("task"), r.get("data"), (r.get("config") or {}).get("scale")) for r in records}) == 1


def _task(record: Mapping[str, Any]) -> str:
    node = (record.get("config") or {}).get("task")
    return str(node.get("_target_")) if isinstance(node, Mapping) else ""


def _place(record: Mapping[str, Any], folder: Path) -> str:
    place = Path(record["folder"])
    return str(place.relative_to(folder)) if place != folder else place.name


def _plain(value: Any) -> Any:
    """A value as a cell of a file: lists and mappings become text."""
    return None if value is ABSENT else told(value) if isinstance(value, (list, dict)) else value
