"""Keys of records, and conditions on them: ``task=classify,method.sara.threshold<0.01``.

A key is one of `TOP`; ``split/name`` of a metric, ``cost/NAME``, ``report/NAME`` (of a method), ``evaluation/NAME`` or
``environment/NAME``; or the dotted path of a value in the run's configuration, such as ``trainer.lr``.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from filtrun.cells import flat
from filtrun.errors import UserError, closest

TOP = ("name", "status", "seed", "task", "data", "model", "methods", "key", "cell", "folder", "error")
PARTS = ("cost", "evaluation", "environment")
ABSENT = object()
"""What a record without a key has there."""

_CONDITION = re.compile(r"\s*(?P<key>[\w./@+-]+?)\s*(?P<sign>!=|<=|>=|==|=|<|>|~)\s*(?P<value>.*?)\s*", re.DOTALL)
_COMMA = re.compile(r",(?![^\[]*\])")
SIGNS = "= != < <= > >= ~"


class Condition(NamedTuple):
    """``key sign value``; `value` is text as it was given."""

    key: str
    sign: str
    value: str

    def __str__(self) -> str:
        return f"{self.key}{self.sign}{self.value}"


def parse_where(texts: Iterable[str]) -> list[Condition]:
    """Conditions split at commas outside brackets. Raises UserError for what is none."""
    found = []
    for word in (word for text in texts for word in _COMMA.split(text)):
        match = _CONDITION.fullmatch(word)
        if match is None:
            raise UserError(f"--where {word.strip()!r} must read KEY SIGN VALUE, such as seed<3; signs: {SIGNS}")
        made = Condition(match["key"], match["sign"].replace("==", "="), match["value"].strip("'\""))
        if made.sign[0] in "<>" and number_of(made.value) is None:
            raise UserError(f"--where {made}: {made.sign} compares numbers, and {made.value!r} is none")
        found.append(made)
    return found


def value_of(record: Mapping[str, Any], key: str) -> Any:
    """What a record holds for a key; `ABSENT` when it has none. Several methods are one text: ``ema+sara``."""
    if key in ("methods", "method"):
        return "+".join(map(str, record.get("methods") or ())) or "none"
    if key in TOP:
        return record.get(key, ABSENT)
    split, slash, name = key.partition("/")
    if not slash:
        return _at(record.get("config"), key.split("."))
    if split in PARTS:
        return _at(record.get(split), [name])
    if split == "report":
        reports = [r for r in (record.get("report") or {}).values() if isinstance(r, Mapping)]
        return next((r[name] for r in reports if name in r), ABSENT)
    return _at(record.get("metrics"), [key])


def _at(value: Any, path: Sequence[str]) -> Any:
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return ABSENT if isinstance(value, dict) and value else value


def keys_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key that a record has: `TOP`, the configuration's, then what was measured."""
    config: dict[str, None] = {}
    rest: dict[str, None] = {}
    seen: set[int] = set()  # the index gives records that share parts
    for record in records:
        for name, value in (record.get("config") or {}).items():
            if not isinstance(value, Mapping):
                config[name] = None
            elif id(value) not in seen:
                seen.add(id(value))
                config |= dict.fromkeys(flat(value, f"{name}."))
        rest |= dict.fromkeys(record.get("metrics") or ())
        for part in PARTS:
            rest |= {f"{part}/{name}": None for name in record.get(part) or ()}
        for report in (record.get("report") or {}).values():
            rest |= {f"report/{name}": None for name in report} if isinstance(report, Mapping) else {}
    return [*TOP, *(key for key in config if key not in TOP), *rest]


def check_keys(what: str, keys: Iterable[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError, with the closest, for a key that no record has. `what` names the option it came from."""
    for key in keys:
        if key in TOP or key == "method" or any(value_of(record, key) is not ABSENT for record in records):
            continue
        known = keys_of(records)
        inside = [k for k in known if k.startswith(f"{key}.")]
        near = f"; it holds {', '.join(inside[:5])}" if inside else closest(key, known)
        raise UserError(f"{what} {key}: no record has such a key{near}")


def matches(record: Mapping[str, Any], conditions: Iterable[Condition]) -> bool:
    """Whether all conditions hold. Only ``!=`` and ``=null`` hold for a key the record does not have."""
    return all(_holds(value_of(record, c.key), c) for c in conditions)


def _holds(held: Any, condition: Condition) -> bool:
    sign, wanted = condition.sign, condition.value
    if sign in ("=", "!="):
        return _equal(held, wanted) == (sign == "=")
    if held is ABSENT or held is None:
        return False
    if sign == "~":
        text, pattern = told(held).casefold(), wanted.casefold()
        return fnmatch.fnmatchcase(text, pattern) if set("*?[") & set(pattern) else pattern in text
    number, limit = number_of(held), number_of(wanted)
    if number is None or limit is None:
        return False
    if sign[0] == "<":
        return number < limit or (sign == "<=" and number == limit)
    return number > limit or (sign == ">=" and number == limit)


def _equal(held: Any, wanted: str) -> bool:
    if wanted.casefold() in ("null", "none") and (held is ABSENT or held is None):
        return True
    if held is ABSENT or held is None:
        return False
    if isinstance(held, bool):
        return wanted.casefold() == told(held)
    if told(held) == wanted.replace(", ", ",") or str(held) == wanted:
        return True
    number, other = number_of(held), number_of(wanted)
    return number is not None and number == other


def number_of(value: Any) -> float | None:
    """A finite number, also when it is written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def order(value: Any) -> tuple[int, float, str]:
    """Sorts values: numbers, then text, then what is not there."""
    if value is ABSENT or value is None:
        return (2, 0.0, "")
    number = number_of(value)
    return (1, 0.0, told(value)) if number is None else (0, number, "")


def told(value: Any) -> str:
    """A value for people: ``0.01``, ``[7,8,9]``, ``true``, ``null``; ``-`` where there is none."""
    if value is ABSENT:
        return "-"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(told, value)) + "]"
    return str(value)
