"""What was spent on tuning a row of a table: the searches on record for its methods, task, data and model.

A search is on record where ``filtrun search`` has left its ``search.json``, in ``searches/NAME`` beside the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filtrun.report.fairness import by_value, names

FOLDER, FILE = "searches", "search.json"
NOTHING = "no search on record"
PARTS = ("task", "data", "model")
KEYS = 4
"""Searched keys that are named."""
Record = Mapping[str, Any]
Setting = tuple[str, ...]
"""Methods joined by ``+``, task, data, model."""


@dataclass(frozen=True)
class Search:
    """Trials of one search with one setting; each took a run for every one of `seeds` seeds, or fewer where pruned."""

    name: str
    setting: Setting
    scale: str
    trials: int
    seeds: int
    keys: tuple[str, ...]
    split: str

    @property
    def amount(self) -> str:
        """``24 trials of 2 seeds``."""
        return f"{_count(self.trials, 'trial')} of {_count(self.seeds, 'seed')}"

    def text(self, scale: str) -> str:
        """``24 trials of 2 seeds over trainer.lr``, and what is particular about them for a row at `scale`."""
        more = f" and {len(self.keys) - KEYS} more" if len(self.keys) > KEYS else ""
        told = f"{self.amount} over {', '.join(self.keys[:KEYS])}{more}"
        told += f" at {self.scale} scale" if self.scale and scale and self.scale != scale else ""
        return told + (" judged on the test split" if self.split == "test" else "")


@dataclass(frozen=True)
class Budget:
    """What was spent on a row."""

    searches: tuple[Search, ...] = ()
    scale: str = ""

    @property
    def trials(self) -> int:
        """Of all searches together."""
        return sum(s.trials for s in self.searches)

    @property
    def short(self) -> str:
        """``24 trials``."""
        return _count(self.trials, "trial") if self.searches else NOTHING

    @property
    def amount(self) -> str:
        """What two rows are compared by: trials and seeds of each search."""
        return " and ".join(sorted(s.amount for s in self.searches)) or NOTHING

    @property
    def text(self) -> str:
        """All of it in one line."""
        return " and ".join(s.text(self.scale) for s in self.searches) or NOTHING

    def data(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "text": self.text, "trials": self.trials,
            "searches": [
                {"name": s.name, "trials": s.trials, "seeds": s.seeds, "keys": list(s.keys), "split": s.split,
                 "scale": s.scale} for s in self.searches
            ],
        }  # fmt: skip


@dataclass
class Searches:
    """The searches on record in some folders; those that cannot be read are in `broken`."""

    found: dict[Setting, list[Search]] = field(default_factory=dict)
    broken: list[Path] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What could not be read, in one line."""
        count = len(self.broken)
        return [f"{_count(count, 'search file')} could not be read, {self.broken[0]} first"] if count else []

    def of(self, record: Record) -> Budget:
        """What was spent on the setting of a record."""
        methods = tuple(map(str, record.get("methods") or ()))
        return self.at(methods, record, (record.get("config") or {}).get("scale"))

    def at(self, methods: Iterable[str], parts: Mapping[str, Any], scale: Any) -> Budget:
        """What was spent on methods with the task, data and model in `parts`."""
        setting = ("+".join(methods), *(str(parts.get(key) or "") for key in PARTS))
        return Budget(tuple(self.found.get(setting, ())), str(scale or ""))


def read_searches(*folders: Path) -> Searches:
    """The searches in ``searches`` below folders, or below the folder a folder lies in: each once."""
    made = Searches()
    places = dict.fromkeys(
        p.resolve() for folder in folders for p in (folder / FOLDER, folder.absolute().parent / FOLDER)
    )
    for path in sorted(path for place in places for path in place.glob(f"*/{FILE}")):
        try:
            searches = _read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            made.broken.append(path)
            continue
        for search in searches:
            made.found.setdefault(search.setting, []).append(search)
    return made


def _read(path: Path) -> list[Search]:
    """A search's trials by setting: one, unless it searched over methods, tasks, data or models."""
    values = json.loads(path.read_text(encoding="utf-8"))
    keys = [str(d["key"]) for d in values["space"]]
    base = values["setting"] if "setting" in values else _composed(values["overrides"])
    counts: dict[Setting, int] = {}
    for trial in values["trials"]:
        if trial["state"] not in ("complete", "pruned", "fail"):
            continue
        params = trial["params"]
        methods = [params["method"]] if "method" in params else base["methods"]
        parts = [params.get(key, base[key]) for key in PARTS]
        setting = ("+".join(map(str, methods)), *map(str, parts))
        counts[setting] = counts.get(setting, 0) + 1
    return [
        Search(path.parent.name, setting, str(base.get("scale") or ""), trials, len(values["seeds"]), tuple(keys),
               str(values.get("split") or ""))
        for setting, trials in counts.items()
    ]  # fmt: skip


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The setting of a search that was made before searches noted it. Raises ValueError when it cannot be composed."""
    from filtrun.api import compose
    from filtrun.errors import UserError

    try:
        config, choices, _ = compose(*overrides)
    except UserError as error:
        raise ValueError(str(error)) from error
    parts = {key: choices.get(key, "") for key in PARTS}
    return {"methods": list(config.get("method") or {}), **parts, "scale": config.get("scale")}


def tuning_line(budgets: Mapping[str, Budget]) -> str:
    """``searches on record: full: 24 trials of 1 seed over trainer.lr; lora: no search on record``."""
    rows: dict[str, list[str]] = {}
    for row, budget in budgets.items():
        rows.setdefault(budget.text, []).append(row)
    if set(rows) <= {NOTHING}:
        return f"tuning budget: {NOTHING}" + (" for any row" if len(budgets) > 1 else "")
    ordered = sorted(rows.items(), key=lambda item: item[0] == NOTHING)
    told = [f"{names(each)}: {text}" if any(each) else text for text, each in ordered]
    return f"tuning budget: {'; '.join(told)}"


def by_setting(records: Iterable[Record], searches: Searches) -> dict[str, tuple[Budget, bool]]:
    """For each setting of records, named by its methods and by what else varies: (its budget, whether it trains)."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        parts = {k: str(record.get(k)) for k in PARTS} | {"scale": str((record.get("config") or {}).get("scale"))}
        methods = "+".join(map(str, record.get("methods") or ())) or "none"
        groups.setdefault((methods, *(f"{k}={v}" for k, v in parts.items())), []).append(record)
    varied = [i for i in range(1, len(PARTS) + 2) if len({name[i] for name in groups}) > 1]
    return {
        " ".join([name[0], *(name[i] for i in varied)]): (searches.of(each[0]), trained(each))
        for name, each in groups.items()
    }


def unlike_tuning(budgets: Mapping[str, Budget]) -> list[str]:
    """A warning when rows had different budgets; leave out rows that have nothing to tune."""
    amounts = {row: budget.amount for row, budget in budgets.items()}
    return [f"unlike tuning budgets: {by_value(amounts)}"] if len(set(amounts.values())) > 1 else []


def trained(records: Iterable[Record]) -> bool:
    """Whether something was trained, and so could be tuned."""
    return any((r.get("cost") or {}).get("steps") != 0 for r in records)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
