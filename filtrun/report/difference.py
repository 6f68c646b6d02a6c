"""What differs between two runs: configuration, code, data, environment, what they cost and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from filtrun.cells import cell_digest, content, flat

DIGITS = 12
"""Metrics that agree to so many digits count as equal: a record holds them as JSON."""


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two records (as JSON values) compared, part by part.

    Returns:
        same_cell: whether both compute the same (`filtrun.cells.cell_digest`).
        config: {flat key: {"a", "b"}} of what is computed and differs; a key that one does not have is left out there.
        machine: the same of keys that only say where a run ran.
        run, code, data, evaluation, environment: likewise, of the records' other parts. `code` has the run's key,
        which covers configuration, data and the code it used, and filtrun's version and commit.
        cost, report, metrics: {name: {"a", "b", "difference", "relative"}} of every number that differs; difference is
        b - a, relative that over abs(a) (None when a is 0 or one is missing).
        equal: {part: how many values are equal}.
    """
    configs = [flat(r.get("config") or {}) for r in (first, second)]
    computed = [flat(content(r.get("config") or {})) for r in (first, second)]
    where = [{k: v for k, v in c.items() if k not in kept} for c, kept in zip(configs, computed, strict=True)]
    places = [dict(flat(r.get("environment") or {})) for r in (first, second)]
    code = [{"key": r.get("key")} | {k: p.pop(k, None) for k in ("filtrun", "git")}
            for r, p in zip((first, second), places, strict=True)]  # fmt: skip
    data_keys = [{k: computed_.pop(k) for k in list(computed_) if _is_data(k)} for computed_ in computed]
    for keys, record in zip(data_keys, (first, second), strict=True):
        keys["data"] = record.get("data")
    parts = {
        "run": [{k: r.get(k) for k in ("name", "status", "seed", "task", "model", "error")}
                | {"methods": list(r.get("methods") or ())} for r in (first, second)],
        "code": code,
        "config": [{k: v for k, v in c.items() if k != "seed"} for c in computed],
        "data": data_keys,
        "machine": where,
        "evaluation": [flat(r.get("evaluation") or {}) for r in (first, second)],
        "environment": places,
    }  # fmt: skip
    numbers = {
        "cost": [dict(r.get("cost") or {}) for r in (first, second)],
        "report": [flat(r.get("report") or {}) for r in (first, second)],
        "metrics": [dict(r.get("metrics") or {}) for r in (first, second)],
    }
    found: dict[str, Any] = {
        "same_cell": cell_digest(first.get("config") or {}) == cell_digest(second.get("config") or {})
    }
    found |= {part: _unlike(*pair) for part, pair in parts.items()}
    found |= {part: {k: v | _change(v) for k, v in _unlike(*pair).items()} for part, pair in numbers.items()}
    found["equal"] = {p: len(a.keys() | b.keys()) - len(found[p]) for p, (a, b) in (parts | numbers).items()}
    return found


def _is_data(key: str) -> bool:
    return key.partition(".")[0] in ("data", "classes", "split_seed")


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for key in dict.fromkeys([*first, *second]):
        pair = {side: values[key] for side, values in (("a", first), ("b", second)) if key in values}
        if len(pair) < 2 or not _equal(pair["a"], pair["b"]):
            found[key] = pair
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return f"{a:.{DIGITS}g}" == f"{b:.{DIGITS}g}"
    return bool(a == b)


def _change(pair: Mapping[str, Any]) -> dict[str, float | None]:
    a, b = pair.get("a"), pair.get("b")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b)):
        return {"difference": None, "relative": None}
    assert a is not None and b is not None
    return {"difference": b - a, "relative": (b - a) / abs(a) if a else None}
