"""What a person sees of a sweep: a line for every cell that ends, and on a terminal one that says how far it is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from filtrun.errors import Interrupted
from filtrun.report import units
from filtrun.report.sheet import metric_facts
from filtrun.sweeps.jobs import Job, Outcome, run_jobs


def run_shown(
    jobs: Sequence[Job],
    workers: int,
    *,
    fail_fast: bool = False,
    launcher: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """Run a sweep and tell on stderr how it goes: with one worker in this process, each cell with its progress bar.

    Arguments as for `filtrun.sweeps.jobs.run_jobs`. Raises KeyboardInterrupt (from Interrupted) when stopped.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    ended_cells: list[Outcome] = []
    began = time.perf_counter()
    width = len(str(len(jobs)))
    workers = min(workers, len(jobs))
    status = console.status("starting workers") if workers > 1 or launcher else None

    def starts(done: int, job: Job) -> None:
        if status is not None:
            status.update(summary(ended_cells, len(jobs), workers, time.perf_counter() - began))

    def ended(done: int, outcome: Outcome) -> None:
        ended_cells.append(outcome)
        line = f"{done:>{width}}/{len(jobs)} {outcome.job.label}: {told(outcome)}"
        console.print(line, style=style(outcome), markup=False, soft_wrap=True)
        starts(done, outcome.job)

    try:
        if status is None:
            return run_jobs(jobs, starts, ended, fail_fast=fail_fast, quiet=False)
        with status:
            return run_jobs(
                jobs, starts, ended, workers=workers, fail_fast=fail_fast, launcher=launcher, options=options
            )
    except KeyboardInterrupt as stop:
        done = f"interrupted after {len(ended_cells)} of {len(jobs)} cells; the same command goes on"
        raise KeyboardInterrupt from Interrupted(done).with_traceback(stop.__traceback__)


def told(outcome: Outcome) -> str:
    """How a cell ended, in one line: its first metric, or why there is none."""
    if outcome.record is None:
        return f"{'skipped' if outcome.skipped else 'failed'}: {outcome.error.strip().splitlines()[0]}"
    name, value = first_metric(outcome)
    return ("there already" if outcome.cached else f"finished in {units.duration(outcome.seconds)}") + (
        f", {name} {value:.4g}" if name else ""
    )


def style(outcome: Outcome) -> str:
    """The colour of a cell's line."""
    return "red" if outcome.failed else "yellow" if outcome.skipped else ""


def counted(outcomes: Sequence[Outcome]) -> str:
    """How many cells there are of each kind."""
    failed, skipped = sum(o.failed for o in outcomes), sum(o.skipped for o in outcomes)
    done = f"{len(outcomes)} cells: {len(outcomes) - failed - skipped} finished, {failed} failed"
    return done + (f", {skipped} skipped" if skipped else "")


def first_metric(outcome: Outcome) -> tuple[str, float]:
    """Name and value of the first test metric of a cell that finished; an empty name when there is none."""
    metrics: dict[str, Any] = outcome.record.metrics if outcome.record else {}
    found = ((n.partition("/")[2], v) for n, v in metrics.items() if n.startswith("test/") and v is not None)
    return next(found, ("", 0.0))


def best(ended: Sequence[Outcome]) -> str:
    """The best cell so far by its first metric; empty unless all that finished solve one task on one data set."""
    done = [o for o in ended if o.record is not None and first_metric(o)[0]]
    kinds = {(first_metric(o)[0], o.job.choices.get("data"), o.job.config["task"]["_target_"]) for o in done}
    if len(done) < 2 or len(kinds) != 1:
        return ""
    ((name, _, task),) = kinds
    fact = metric_facts([task]).get(name)
    if fact is None or fact.better not in ("lower", "higher"):
        return ""
    top = (min if fact.better == "lower" else max)(done, key=lambda o: first_metric(o)[1])
    return f"best: {name} {first_metric(top)[1]:.4g} ({top.job.label})"


def summary(ended: Sequence[Outcome], cells: int, workers: int, seconds: float) -> str:
    """Done, running, failed, cached, the time left and the best so far."""
    failed, cached = sum(o.failed for o in ended), sum(o.cached for o in ended)
    skipped = sum(o.skipped for o in ended)
    parts = [f"{len(ended)}/{cells} done", f"{min(workers, cells - len(ended))} running"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{skipped} skipped"] if skipped else []
    parts += [f"{cached} there already"] if cached else []
    worked = len(ended) - cached - skipped
    if worked and len(ended) < cells:
        parts.append(f"about {units.duration(seconds / worked * (cells - len(ended)))} left")
    top = best(ended)
    return ", ".join(parts) + (f"; {top}" if top else "")
