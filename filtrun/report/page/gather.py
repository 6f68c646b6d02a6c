"""Everything a report page shows, from records, as JSON values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.cells import content, flat
from filtrun.report.index import find
from filtrun.report.page.curves import POINTS, curves_of
from filtrun.report.page.images import Images
from filtrun.report.select import check_keys, matches, order, parse_where, told, value_of
from filtrun.report.sheet import COST, metric_facts
from filtrun.report.tuning import Searches, by_setting, read_searches, tuning_line, unlike_tuning
from filtrun.stages import digest

COSTS = ("trainable_params", "stored_bytes", "flops", "train_seconds", "nfe")
"""Costs that have a column; they come first among those a chart can show."""
_KINDS = {
    "stored_bytes": "bytes", "peak_memory_bytes": "bytes", "saved_bytes": "bytes", "optimizer_bytes": "bytes",
    "train_seconds": "seconds", "total_seconds": "seconds", "latency_seconds": "seconds",
    "base_latency_seconds": "seconds",
}  # fmt: skip
_SPLITS = ("test", "tuned", "base")
LONGEST = 500
"""Characters of a value that the page holds; of an error `ERROR`."""
ERROR = 4000
Record = Mapping[str, Any]


def gather(folder: Path, where: Iterable[str] = (), image_bytes: int = 5_200_000) -> dict[str, Any]:
    """What a page about the records below `folder` shows.

    Args:
        where: conditions as `filtrun table --where` has them; records that do not meet them are left out.
        image_bytes: bytes that all sample grids may take together as base64 text.

    Raises UserError when a condition is none, or names a key that no record has.
    """
    found = find(folder)
    conditions = parse_where(where)
    check_keys("--where", (c.key for c in conditions), found.records)
    records = sorted((r for r in found.records if matches(r, conditions)), key=_place)
    searches = read_searches(folder)
    runs = [
        _run(record, folder) | _tuning(record, searches) | {"group": group}
        for record, group in zip(records, groups_of(records), strict=True)
    ]
    folders = [Path(record["folder"]) for record in records]
    images = Images(image_bytes)
    for run, pictures in zip(runs, images.add([(f, r.get("artifacts") or ()) for f, r in zip(folders, records,
                                                strict=True)]), strict=True):  # fmt: skip
        run["images"] = pictures
    for run, series in zip(runs, curves_of(folders), strict=True):
        run["curves"] = series
    return {
        "title": folder.resolve().name or str(folder),
        "where": [str(c) for c in conditions],
        "runs": runs,
        "values": _columns(records),
        "metrics": _metrics(records),
        "costs": _costs(records),
        "images": images.encoded,
        "left_out": images.left_out,
        "broken": [str(path) for path in found.broken],
        "tuning": _tuning_notes(records, searches),
        "points": POINTS,
    }


def _place(record: Record) -> list[tuple[int, float, str]]:
    """Like runs stand together, and seeds in their order."""
    return [order(value_of(record, key)) for key in ("task", "data", "model", "methods", "seed", "folder")]


def _run(record: Record, folder: Path) -> dict[str, Any]:
    """What is a run's own: names and numbers."""
    place = Path(record["folder"])
    name = str(place.relative_to(folder)) if place.is_relative_to(folder) else str(place)
    return {
        "folder": place.resolve().name if name == "." else name,
        "name": _text(record.get("name") or ""),
        "status": _text(record.get("status") or "unknown"),
        "seed": _text(record.get("seed", 0)),
        "task": _text(record.get("task") or "-"),
        "data": _text(record.get("data") or "-"),
        "model": _text(record.get("model") or "-"),
        "methods": _text("+".join(map(str, record.get("methods") or ())) or "none"),
        "scale": _text((record.get("config") or {}).get("scale") or "-"),
        "command": _text("filtrun " + " ".join(map(str, record.get("overrides") or ())), ERROR),
        "error": _text(record["error"], ERROR) if record.get("error") else "",
        "cell": record["cell"],
        "metrics": _numbers(record.get("metrics")),
        "cost": _numbers(record.get("cost")),
    }


def _tuning(record: Record, searches: Searches) -> dict[str, Any]:
    """What was spent on tuning a run's setting."""
    budget = searches.of(record)
    return {"tuning": budget.short, "trials": budget.trials}


def _tuning_notes(records: Sequence[Record], searches: Searches) -> dict[str, Any]:
    """The budgets of all settings in one line, and where they are unlike."""
    found = by_setting((r for r in records if r.get("status") == "finished"), searches)
    line = tuning_line({name: budget for name, (budget, _) in found.items()})
    warnings = unlike_tuning({name: budget for name, (budget, trains) in found.items() if trains})
    return {"line": _text(line, ERROR), "warnings": [_text(w, ERROR) for w in warnings + searches.problems()]}


def groups_of(records: Sequence[Record]) -> list[str]:
    """For each record a digest that it shares with those which compute the same but for the seed.

    Other seeds (``split_seed``) count, unless they follow the run's in all records that are otherwise the same.
    """
    bases, seeds = [], []
    for record in records:
        config = {k: told(v) for k, v in flat(content(record.get("config") or {})).items() if k != "seed"}
        seeds.append({k: v for k, v in config.items() if k.endswith("seed")})
        own = {k: v for k, v in config.items() if k not in seeds[-1]}
        bases.append(digest(own | {"record": [record.get(k) for k in ("task", "data", "model", "methods")]}))
    fixed: dict[str, set[str]] = {}
    for record, base, found in zip(records, bases, seeds, strict=True):
        mine = told(record.get("seed"))
        fixed.setdefault(base, set()).update(key for key, value in found.items() if value != mine)
    return [
        digest([base, {k: v for k, v in found.items() if k in fixed[base]}])
        for base, found in zip(bases, seeds, strict=True)
    ]


def _numbers(values: Any) -> dict[str, float]:
    """Finite numbers by name, with seven figures."""
    found = values.items() if isinstance(values, Mapping) else ()
    return {
        str(k): float(f"{v:.7g}") if isinstance(v, float) else v
        for k, v in found
        if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    }


def _text(value: Any, longest: int = LONGEST) -> str:
    text = told(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _columns(records: Sequence[Record]) -> dict[str, dict[str, list[Any]]]:
    """Settings by columns: {key: {"values": distinct texts, "runs": for each run the place of its value, -1 for none}}.

    Runs of a sweep hold nearly the same configuration, so this takes a small part of the room that each in full would.
    """
    columns: dict[str, dict[str, list[Any]]] = {}
    places: dict[str, dict[str, int]] = {}
    known: dict[tuple[str, int], dict[str, str]] = {}
    for i, record in enumerate(records):
        config = record.get("config") or {}
        parts = [*((f"{k}.", v) for k, v in config.items()), *((f"{p}/", record.get(p) or {})
                 for p in ("evaluation", "environment"))]  # fmt: skip
        for before, value in parts:
            mark = (before, id(value))  # the index keeps what records share alive, so an id is one object's
            if mark not in known:
                inner = flat(value, before) if isinstance(value, Mapping) and value else {before.rstrip("."): value}
                known[mark] = {} if before.endswith("/") and not value else {k: _text(v) for k, v in inner.items()}
            for key, text in known[mark].items():
                column = columns.setdefault(key, {"values": [], "runs": [-1] * len(records)})
                place = places.setdefault(key, {}).setdefault(text, len(column["values"]))
                if place == len(column["values"]):
                    column["values"].append(text)
                column["runs"][i] = place
    return columns


def _metrics(records: Sequence[Record]) -> list[dict[str, str]]:
    """Every metric of any record with its title and better side; what the stored model does comes first."""
    names = list(dict.fromkeys(name for r in records for name in _numbers(r.get("metrics"))))
    tasks = [_target(r) for r in records]
    facts = metric_facts(list(dict.fromkeys(filter(None, tasks))))
    found = []
    for name in sorted(
        names, key=lambda n: _SPLITS.index(n.partition("/")[0]) if n.partition("/")[0] in _SPLITS else 9
    ):
        split, _, short = name.partition("/")
        fact = facts.get(short)
        title = fact.title if fact else (short or name).replace("_", " ")
        found.append({
            "key": name, "title": title if split == "test" else f"{title} ({split})",
            "better": fact.better if fact else "", "meaning": fact.meaning if fact else "",
            "form": fact.format if fact else "",
        })  # fmt: skip
    return found


def _target(record: Record) -> str:
    node = (record.get("config") or {}).get("task")
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return target if isinstance(target, str) else ""


def _costs(records: Sequence[Record]) -> list[dict[str, Any]]:
    names = dict.fromkeys([*COSTS, *(name for r in records for name in _numbers(r.get("cost")))])
    there = {name for r in records for name in _numbers(r.get("cost"))}
    return [
        {"key": name, "title": COST[name][0] if name in COST else name.replace("_", " "),
         "kind": _KINDS.get(name, "number"), "column": name in COSTS}
        for name in names if name in there
    ]  # fmt: skip


def embedded(data: Any) -> str:
    """JSON that is safe inside a script element: no ``<``, ``>`` or ``&`` is in it, whatever records hold."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate of a record has no form in a file
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
