"""The cells of a paper's table at one scale, with the records there are of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.cells import cell_digest
from filtrun.errors import UserError, closest
from filtrun.report.estimate import Estimate, estimate, like
from filtrun.report.evidence import measured
from filtrun.report.index import read_records
from filtrun.report.select import check_keys, matches

if TYPE_CHECKING:
    from filtrun.report.card import Card, Table
    from filtrun.report.select import Condition
    from filtrun.sweeps.jobs import Job

DONE, MISSING = "finished", "not run"


@dataclass
class Slot:
    """One cell: `state` is finished, not run, or what became of its last run (failed, interrupted, running)."""

    row: str
    seed: int
    job: Job
    record: dict[str, Any] | None = None
    state: str = MISSING
    error: str = ""


@dataclass
class Grid:
    """A table at one scale. `problems` says of a row why it cannot be composed."""

    card: Card
    table: Table
    scale: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    slots: list[Slot] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[Slot]:
        """The cells without a finished record."""
        return [slot for slot in self.slots if slot.record is None]

    def records(self, row: str | None = None) -> list[dict[str, Any]]:
        """The finished records of a row, or of all, in the order of the seeds."""
        return [s.record for s in self.slots if s.record is not None and row in (None, s.row)]

    def values(self, row: str, metric: str) -> dict[int, float]:
        """A metric of a row by seed; seeds whose run has not measured it are left out."""
        found = {s.seed: measured(s.record, metric) for s in self.slots if s.row == row and s.record is not None}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, row: str) -> Estimate | None:
        """What a cell of the row takes by earlier records: of its row, of other rows, of cells like it anywhere."""
        found = estimate(row, {name: self.records(name) for name in self.rows})
        slot = next((s for s in self.slots if s.row == row), None)
        if found is not None or slot is None:
            return found
        return like(slot.job.config, slot.job.choices, slot.job.folder.parent)

    def seconds(self, row: str) -> float | None:
        """What a cell of the row took or is likely to take; None when no earlier record tells."""
        found = self.estimate(row)
        return found.seconds if found else None


def read_grid(
    card: Card,
    table: Table,
    scale: str,
    sweep_dir: Path,
    *,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    extra: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
) -> Grid:
    """Compose a table's cells and find their records: below `sweep_dir`, else among the single runs beside it.

    Args:
        rows: only these rows of the table (those it does not have are passed over).
        seeds: instead of the card's.
        extra: overrides that say where cells run.
    """
    from filtrun.sweeps.jobs import make_jobs

    how = table.scales.get(scale)
    chosen = tuple(row for row in table.rows if how is not None and (rows is None or row in rows))
    grid = Grid(card, table, scale, chosen, tuple(seeds) if seeds else how.seeds if how else ())
    for row in chosen:
        overrides = table.overrides(row, scale)
        try:
            jobs = make_jobs(overrides, grid.seeds, sweep_dir, label=row, extra=extra, config_dirs=config_dirs)
        except UserError as error:
            grid.problems[row] = str(error).partition("\n")[0]
            continue
        grid.slots += [Slot(row, seed, job) for seed, job in zip(grid.seeds, jobs, strict=True)]
    find_records(grid.slots, sweep_dir)
    return grid


def find_records(slots: Sequence[Slot], sweep_dir: Path) -> None:
    """Fill in the records of cells: from a cell's own folder, else a finished single run that computed the same."""
    singles: dict[str, dict[str, Any]] | None = None
    for slot in slots:
        found = _read(slot.job.folder)
        state = str(found.get("status")) if found else MISSING
        if found and state == DONE and cell_digest(found.get("config") or {}) == slot.job.folder.name:
            slot.record, slot.state, slot.error = found, DONE, ""
            continue
        if singles is None:
            singles = _singles(sweep_dir.parent / "runs")
        slot.record = singles.get(slot.job.folder.name)
        slot.state = DONE if slot.record else MISSING if state == DONE else state
        slot.error = "" if slot.record or not found else str(found.get("error") or "").partition("\n")[0]


def choose_cells(grids: Sequence[Grid], conditions: Sequence[Condition]) -> list[Grid]:
    """Grids with the cells only that meet conditions; those that are not run by what their configuration says.

    Raises UserError for a key that no cell has, or when no cell is left.
    """
    held = [[slot.record or _to_be(slot) for slot in grid.slots] for grid in grids]
    check_keys("--where", [c.key for c in conditions], [record for each in held for record in each])
    found = []
    for grid, records in zip(grids, held, strict=True):
        slots = [s for s, record in zip(grid.slots, records, strict=True) if matches(record, conditions)]
        rows, seeds = {s.row for s in slots}, {s.seed for s in slots}
        if slots:
            kept = (tuple(r for r in grid.rows if r in rows), tuple(s for s in grid.seeds if s in seeds))
            found.append(Grid(grid.card, grid.table, grid.scale, *kept, slots, grid.problems))
    if not found:
        raise UserError(f"no cell of the table has {', '.join(map(str, conditions))}")
    return found


def _to_be(slot: Slot) -> dict[str, Any]:
    """A cell that is not run, as far as its record is known already."""
    config, choices = slot.job.config, slot.job.choices
    names = {key: choices.get(key, "") for key in ("task", "data", "model")}
    return {
        "config": config,
        "seed": slot.seed,
        "methods": list(config.get("method") or ()),
        "status": slot.state,
        **names,
    }


def choose_rows(card: Card, names: Sequence[str]) -> None:
    """Raise UserError for a row that no table of the card has."""
    known = [row for table in card.tables for row in table.rows]
    for name in names:
        if name not in known:
            raise UserError(
                f"--rows {name}: the paper {card.slug} has no such row{closest(name, known)}; it has {', '.join(known)}"
            )


def _singles(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished runs in a folder by what they computed; of several the latest by name."""
    return {record["cell"]: record for record in read_records(folder, finished=True)}


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record | {"folder": str(folder)} if isinstance(record, dict) else None
