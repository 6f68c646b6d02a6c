"""Whether rows of records may be compared: their budgets, seeds, tuning, and every way in which they are unlike.

A row is a list of records. Records of the index share parts, so each part is looked at once and not once a record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from filtrun.cells import content, flat
from filtrun.report.select import ABSENT, told, value_of

MOST = 8
"""Differences that are listed one by one."""
NAMES = 5
"""Rows and values that are named one by one."""
Record = Mapping[str, Any]
Rows = Mapping[str, Sequence[Record]]
_AXES = {"methods": "method", "method": "method", "data": "data", "model": "model", "task": "task"}
"""Keys that stand for a part of the configuration."""


class Parts:
    """Parts of configurations as flat keys; which part computes what is worked out once for each."""

    def __init__(self) -> None:
        self._flat: dict[Any, dict[str, str]] = {}
        self._kept: list[Any] = []  # an id is one object's only as long as that is there

    def keys(self, name: str, value: Any) -> dict[str, str]:
        """What a part, such as ``trainer``, says of what is computed: flat key -> value as text."""
        mark = (name, id(value)) if isinstance(value, dict) else (name, told(value))
        if mark not in self._flat:
            self._kept.append(value)
            self._flat[mark] = {key: told(v) for key, v in flat(content({name: value})).items()}
        return self._flat[mark]

    def values(self, records: Iterable[Record]) -> dict[str, set[str]]:
        """The values that each key has among records. A key that some do not have is ``absent`` there, but for the
        options of methods: they say nothing of other methods."""
        configs = [r.get("config") or {} for r in records]
        parts: dict[str, list[dict[str, str]]] = {}
        for name in dict.fromkeys(name for config in configs for name in config):
            held = {id(value): value for value in (config.get(name, ABSENT) for config in configs)}
            parts[name] = [{} if value is ABSENT else self.keys(name, value) for value in held.values()]
        values: dict[str, set[str]] = {}
        for name, each in parts.items():
            for key in {key for found in each for key in found}:
                values[key] = {found.get(key, "absent") for found in each}
                if name == "method":
                    values[key].discard("absent")
        return values


def differences(rows: Rows, axes: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """({key: values} that differ within a row, {key: values} that differ between rows), beside seeds and `axes`.

    A seed that follows the run's seed is none of them, nor is what belongs to an axis: with ``methods`` compared, the
    methods' options may differ between rows, but not within one.
    """
    parts, axes = Parts(), list(axes)
    values = {row: parts.values(records) for row, records in rows.items() if records}
    seeds = {row: {str(r.get("seed")) for r in records} for row, records in rows.items()}
    roots = {_AXES[axis] for axis in axes if axis in _AXES}
    within: dict[str, str] = {}
    between: dict[str, str] = {}
    for key in sorted({key for found in values.values() for key in found}):
        follows = key.endswith("seed") and all(v.get(key, seeds[row]) == seeds[row] for row, v in values.items())
        if key in axes or follows:
            continue
        mixed = {row: ", ".join(sorted(v[key])) for row, v in values.items() if len(v.get(key, ())) > 1}
        if mixed and key.partition(".")[0] not in roots - {"method"}:
            within[key] = by_value(mixed) if len(values) > 1 else next(iter(mixed.values()))
        elif key.partition(".")[0] not in roots:
            held = {row: ", ".join(sorted(v.get(key, {"absent"}))) for row, v in values.items()}
            if len(set(held.values())) > 1 and not key.startswith("method."):
                between[key] = by_value(held)
    return within, between


def budgets(rows: Rows) -> dict[str, list[str]]:
    """``300 steps of 64, 19,200 images seen`` -> the rows that were trained so; rows that say nothing are left out."""
    found: dict[str, list[str]] = {}
    for row, records in rows.items():
        for text in dict.fromkeys(filter(None, map(_budget, records))):
            found.setdefault(text, []).append(row)
    return found


def _budget(record: Record) -> str:
    steps = (record.get("cost") or {}).get("steps")
    trainer = (record.get("config") or {}).get("trainer") or {}
    batch = trainer.get("batch_size")
    if steps == 0:
        return "nothing trained"
    if steps is None or not batch:
        return ""
    images = steps * batch * (trainer.get("accumulate") or 1)
    return f"{steps:,} steps of {batch:,}, {images:,} images seen"


def budget_line(rows: Rows) -> str:
    """The budgets in one line, of all rows together where they agree; empty when nothing is known."""
    found = budgets(rows)
    if len(found) == 1:
        return f"budget: {next(iter(found))}"
    told = [f"{names(each)}: {text}" if any(each) else text for text, each in found.items()]
    return f"budget: {'; '.join(told)}" if told else ""


def unlike(rows: Rows, configs: Iterable[str] = ()) -> list[str]:
    """How rows were measured unlike, beside their configurations: budget, evaluation, code and machine, seeds.

    Args:
        configs: keys already named as different; a budget that follows from one of the trainer is not told twice.
    """
    lines = []
    trained = {text: each for text, each in budgets(rows).items() if text != "nothing trained"}
    if len(trained) > 1 and not any(key.startswith("trainer.") for key in configs):
        lines.append("unlike budgets: " + "; ".join(f"{text} ({names(each)})" for text, each in trained.items()))
    notes = {
        row: [flat(note) for note in distinct(r.get("evaluation") or {} for r in records)]
        for row, records in rows.items()
        if records
    }
    for key in sorted({k for each in notes.values() for note in each for k in note}):
        found = {row: ", ".join(sorted({str(note.get(key)) for note in each})) for row, each in notes.items()}
        if len({str(note.get(key)) for each in notes.values() for note in each}) > 1:
            lines.append(f"measured unlike: {key.replace('_', ' ').replace('.', ', ')}: {by_value(found)}")
    environments = distinct(r.get("environment") or {} for records in rows.values() for r in records)
    for key in ("device", "torch", "filtrun", "git"):
        held = {str(each.get(key)) for each in environments}
        if len(held) > 1:
            name = "versions of the code (git)" if key == "git" else key
            lines.append(f"the cells were run with unlike {name}: {', '.join(sorted(held))}")
    held_seeds = {row: sorted({r.get("seed", 0) for r in records}) for row, records in rows.items() if records}
    counts = {row: str(len(each)) for row, each in held_seeds.items()}
    seeds = {row: ", ".join(map(str, each)) for row, each in held_seeds.items()}
    if len(set(counts.values())) > 1:
        lines.append(f"the rows have unlike numbers of seeds: {by_value(counts)}")
    elif len(set(seeds.values())) > 1:
        lines.append(f"the rows have unlike seeds: {by_value(seeds)}")
    return lines


def tried(records: Sequence[Record], shown: Iterable[Record]) -> dict[str, int]:
    """How many settings are recorded of each method shown: the most with a task, data, model and scale that are shown.

    Neither seeds count nor where a run ran.
    """
    here = {_setting(record) for record in shown}
    methods = {setting[0] for setting in here}
    places = {setting[1:] for setting in here}
    parts = Parts()
    marks: dict[Any, int] = {}  # of parts that compute the same but for seeds
    known: dict[Any, int] = {}
    found: dict[str, dict[Any, set[Any]]] = {}
    for record in records:
        method, *place = _setting(record)
        if method not in methods or tuple(place) not in places:
            continue
        setting = []
        for name, value in (record.get("config") or {}).items():
            if name in ("data", "task", "model", "scale"):
                continue
            mark = known.get((name, id(value)))
            if mark is None:
                keys = parts.keys(name, value).items()
                mark = marks.setdefault(frozenset((k, v) for k, v in keys if not k.endswith("seed")), len(marks))
                known[name, id(value)] = mark
            setting.append(mark)
        found.setdefault(method, {}).setdefault(tuple(place), set()).add(frozenset(setting))
    return {method: max(map(len, each.values())) for method, each in sorted(found.items())}


def _setting(record: Record) -> tuple[str, ...]:
    """Methods, task, data, model and scale."""
    scale = (record.get("config") or {}).get("scale")
    return (value_of(record, "methods"), *(str(record.get(key)) for key in ("task", "data", "model")), str(scale))


def distinct(values: Iterable[Record]) -> list[Record]:
    """Each object once; equal ones that are two objects may come twice."""
    return list({id(value): value for value in values}.values())


def listed(found: Mapping[str, str]) -> str:
    """``key: values; key: values; and 3 more: ...``."""
    shown = [f"{key}: {text}" for key, text in list(found.items())[:MOST]]
    more = f"; and {len(found) - MOST} more: {', '.join(list(found)[MOST:])}" if len(found) > MOST else ""
    return "; ".join(shown) + more


def by_value(found: Mapping[str, str]) -> str:
    """``0.1 (a, b), 0.2 (c)``."""
    rows: dict[str, list[str]] = {}
    for row, value in found.items():
        rows.setdefault(value, []).append(row)
    shown = [f"{value} ({names(each)})" for value, each in list(rows.items())[:NAMES]]
    return ", ".join(shown) + (f" and {len(rows) - NAMES} more" if len(rows) > NAMES else "")


def names(found: Sequence[str]) -> str:
    """``a, b, c and 7 more``."""
    return ", ".join(found[:NAMES]) + (f" and {len(found) - NAMES} more" if len(found) > NAMES else "")
