"""Which runs of a paper's table have been done: finished records under the output folder, matched by what was set."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.listed import PLANNED
from filtrun.report.index import read_records
from filtrun.report.judge import NOT_RUN, REAL_SCALES, Verdict, count_verdicts, judge, judge_card, measured_scale

if TYPE_CHECKING:
    from filtrun.catalogue import Entry
    from filtrun.report.card import Card, Cell

NEUTRAL = ("name", "device", "workers", "stages", "logger", "resume", "force", "trust", "hydra")
"""Keys that do not change what a run computes (nor does data.root)."""


def finished_records(root: Path | str = "outputs") -> list[dict[str, Any]]:
    """The finished records below ``root/runs`` and ``root/sweeps``; what cannot be read is left out."""
    return [record for folder in ("runs", "sweeps") for record in read_records(Path(root, folder), finished=True)]


def measured(record: Mapping[str, Any] | None, metric: str) -> float | None:
    """A number of a record by name: ``test/fid`` of its metrics, ``cost/flops``, or ``report/sparsity`` of a method."""
    if record is None:
        return None
    split, _, name = metric.partition("/")
    if split == "cost":
        value = (record.get("cost") or {}).get(name)
    elif split == "report":
        reports = [r for r in (record.get("report") or {}).values() if isinstance(r, Mapping)]
        value = next((r[name] for r in reports if name in r), None)
    else:
        value = (record.get("metrics") or {}).get(metric)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
        return None
    return float(value)


def is_run_of(record: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a record is a run of the cell: every override of the cell holds, and nothing else was set."""
    wanted = {key: value.replace("${seed}", str(cell.seed)) for key, value in _pairs(cell.overrides).items()}
    extra = {key for key in _pairs(record.get("overrides") or ()) if key not in wanted}
    if any(key.split(".")[0] not in NEUTRAL and key != "data.root" for key in extra):
        return False
    return all(_same(_as_text(_held(record, key)), value) for key, value in wanted.items())


class Claims:
    """The paper cards and how far the runs that test them are; `root` is the output folder.

    Records are read once, and only when a card has runs to look for.
    """

    def __init__(self, config_dirs: Sequence[str | Path] = (), root: Path | str = "outputs") -> None:
        from filtrun.catalogue import entries

        self.root = root
        self.cards = {e.name: e.card for e in entries("papers", config_dirs) if e.card is not None}
        self._by_method = {method: card for card in self.cards.values() for method in card.methods}

    def card(self, entry: Entry) -> Card | None:
        """The card of a paper, or of the paper a method is from."""
        if entry.kind == "papers":
            return self.cards.get(entry.name)
        return self._by_method.get(entry.name) if entry.kind == "methods" else None

    def status(self, entry: Entry) -> str:
        """``implemented`` (no claim to test), ``holds 1/2 (laptop)``, ``not run``, how much of it is run, ``planned``.

        Judged by the numbers in the card, else by the runs below the output folder. Smoke runs do not count: their
        numbers mean nothing.
        """
        if entry.problem:
            return "unreadable"
        if entry.status == PLANNED:
            return PLANNED
        card = self.card(entry)
        if card is None or not card.claims:
            return "implemented"
        scale = measured_scale(card)
        if scale:
            return f"holds {count_verdicts(judge_card(card, scale))} ({scale})"
        counts = {scale: self.runs(card, scale) for scale in REAL_SCALES}
        scale = max(counts, key=lambda s: counts[s][0] / counts[s][1] if counts[s][1] else 0.0)
        done, needed = counts[scale]
        if not done:
            return NOT_RUN
        if done < needed:
            return f"{done} of {needed} runs"
        return f"holds {count_verdicts(self.verdicts(card, scale))} ({scale})"

    def verdicts(self, card: Card, scale: str) -> list[Verdict]:
        """The verdicts of a card's claims by the runs below the output folder."""
        found = []
        for claim in card.claims:
            table = card.table(claim.table)
            values: dict[str, dict[int, float]] = {claim.better: {}, claim.than: {}}
            for cell in table.cells(scale):
                record = next((r for r in self._like(cell) if is_run_of(r, cell)), None) if cell.row in values else None
                value = measured(record, claim.metric)
                if value is not None:
                    values[cell.row][cell.seed] = value
            seeds = table.scales[scale].seeds if scale in table.scales else ()
            better, than = values[claim.better], values[claim.than]
            found.append(judge(claim, table.metrics[claim.metric], better, than, seeds))
        return found

    def runs(self, card: Card, scale: str) -> tuple[int, int]:
        """(runs done, runs needed) of all tables of a card at one scale."""
        cells = [cell for table in card.tables for cell in table.cells(scale)]
        done = sum(any(is_run_of(record, cell) for record in self._like(cell)) for cell in cells)
        return done, len(cells)

    def _like(self, cell: Cell) -> list[dict[str, Any]]:
        """The finished records with the cell's methods."""
        return self._records.get(_pairs(cell.overrides).get("method", ""), [])

    @functools.cached_property
    def _records(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for record in finished_records(self.root):
            found.setdefault(_as_text(_held(record, "method")), []).append(record)
        return found


def _pairs(overrides: Iterable[str]) -> dict[str, str]:
    pairs = (str(item).lstrip("+").partition("=") for item in overrides)
    return {key: value.strip().strip("'\"").replace(" ", "") for key, _, value in pairs}


def _held(record: Mapping[str, Any], key: str) -> Any:
    """What a record holds for an override's key: the chosen option of a group, or a value of the configuration."""
    if key == "method":
        methods = record.get("methods") or []
        return methods[0] if isinstance(methods, list) and len(methods) == 1 else methods
    if key in ("data", "model", "task"):
        return record.get(key)
    value: Any = record.get("config")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _same(held: str, wanted: str) -> bool:
    """Equal as text or as numbers (``1e-3`` and ``0.001``)."""
    try:
        return held == wanted or float(held) == float(wanted)
    except ValueError:
        return False


def _as_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(_as_text, value)) + "]"
    return str(value)
