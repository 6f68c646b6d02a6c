"""``filtrun table --run``: the missing cells of tables, one after the other or several at a time, a line for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import Interrupted
from filtrun.report import units
from filtrun.report.grid import Grid, Slot, find_records
from filtrun.report.units import plain
from filtrun.sweeps.jobs import Job, Outcome, run_jobs
from filtrun.sweeps.view import counted, style, told


def run_missing(
    grids: Sequence[Grid],
    sweep_dir: Path,
    *,
    force: bool = False,
    workers: int | None = None,
    launcher: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Run what has no finished record and read the records again; returns the number of failures.

    Cells that several tables share are run once; with `force` finished ones run too, their old files are kept aside.
    `workers`, `launcher` and `options` are those of `filtrun.sweeps.jobs.run_jobs`.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    slots = [slot for grid in grids for slot in grid.slots if force or slot.record is None]
    jobs = list({slot.job.folder: slot.job for slot in slots}.values())
    if force:
        jobs = [dataclasses.replace(job, config=job.config | {"force": True}) for job in jobs]
    expected = {slot.job.folder: grid.seconds(slot.row) for grid in grids for slot in grid.slots}
    papers = {slot.job.folder: grid.card.slug for grid in grids for slot in grid.slots}
    width, several = len(str(len(jobs))), len(set(papers.values())) > 1

    def name(job: Job) -> str:
        return plain(f"{papers[job.folder]}: {job.label}" if several else job.label)

    ended_cells: list[Outcome] = []

    with console.status("") as status:

        def starts(done: int, job: Job) -> None:
            about = f", about {units.duration(expected[job.folder])}" if expected.get(job.folder) else ""
            status.update(Text(f"{done + 1:>{width}}/{len(jobs)} {name(job)}: running{about}"))

        def ended(done: int, outcome: Outcome) -> None:
            ended_cells.append(outcome)
            line = f"{done:>{width}}/{len(jobs)} {name(outcome.job)}: {plain(told(outcome))}"
            console.print(line, style=style(outcome), markup=False, soft_wrap=True)

        try:
            outcomes = run_jobs(jobs, starts, ended, workers=workers, launcher=launcher, options=options)
        except KeyboardInterrupt:
            done = f"{len(ended_cells)} of {len(jobs)} cells"
            raise KeyboardInterrupt from Interrupted(f"interrupted after {done}; the same command goes on")
    find_records(slots, sweep_dir)
    _note_failures(slots, outcomes)
    _sum_up(console, outcomes)
    return sum(outcome.failed for outcome in outcomes) + sum(len(grid.problems) for grid in grids)


def _note_failures(slots: Sequence[Slot], outcomes: Sequence[Outcome]) -> None:
    """A cell that was refused before it had a record is failed too."""
    left = {o.job.folder: o for o in outcomes if o.record is None}
    for slot in slots:
        outcome = left.get(slot.job.folder)
        if outcome is not None:
            slot.state, slot.error = "skipped" if outcome.skipped else "failed", outcome.error.splitlines()[0]


def _sum_up(console: Any, outcomes: Sequence[Outcome]) -> None:
    if not outcomes:
        return
    took = units.duration(sum(o.seconds for o in outcomes))
    console.print(f"{counted(outcomes)}, in {took}")
