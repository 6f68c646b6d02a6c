"""What a person sees of a sweep: a line for every cell that ends, and on a terminal one that says how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from filtrun.report import units
from filtrun.sweep import Job, Outcome, run_jobs


def run_shown(jobs: Sequence[Job], workers: int, *, fail_fast: bool = False) -> list[Outcome]:
    """Run a sweep on `workers` processes and tell on stderr how it goes. Raises KeyboardInterrupt when stopped."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    ended_cells: list[Outcome] = []
    began = time.perf_counter()
    width = len(str(len(jobs)))
    workers = min(workers, len(jobs))
    with console.status("starting workers") as status:

        def starts(done: int, job: Job) -> None:
            status.update(summary(ended_cells, len(jobs), workers, time.perf_counter() - began))

        def ended(done: int, outcome: Outcome) -> None:
            ended_cells.append(outcome)
            line = f"{done:>{width}}/{len(jobs)} {outcome.job.label}: {told(outcome)}"
            console.print(line, style="" if outcome.record else "red", markup=False, soft_wrap=True)
            starts(done, outcome.job)

        return run_jobs(jobs, starts, ended, workers=workers, fail_fast=fail_fast)


def told(outcome: Outcome) -> str:
    """How a cell ended, in one line: its first metric, or why it failed."""
    if outcome.record is None:
        return f"failed: {outcome.error.strip().splitlines()[0]}"
    metrics: dict[str, Any] = outcome.record.metrics
    first = next((f", {n.partition('/')[2]} {v:.4g}" for n, v in metrics.items() if n.startswith("test/") and v), "")
    return ("there already" if outcome.cached else f"finished in {units.duration(outcome.seconds)}") + first


def summary(ended: Sequence[Outcome], cells: int, workers: int, seconds: float) -> str:
    """Done, running, failed, cached and the time left."""
    failed, cached = sum(o.record is None for o in ended), sum(o.cached for o in ended)
    parts = [f"{len(ended)}/{cells} done", f"{min(workers, cells - len(ended))} running"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{cached} there already"] if cached else []
    worked = len(ended) - cached
    if worked and len(ended) < cells:
        parts.append(f"about {units.duration(seconds / worked * (cells - len(ended)))} left")
    return ", ".join(parts)
