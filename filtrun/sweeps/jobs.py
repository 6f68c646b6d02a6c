"""Run many cells, one after the other in this process or on several workers, each as if it had a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filtrun.cells import cell_digest
from filtrun.composed import kept, stamp
from filtrun.errors import Busy, Interrupted, RunFailure, Unfit, UserError
from filtrun.record import FILE
from filtrun.shared_base import composed_on_base
from filtrun.sweeps.alone import alone

POLL = 1.0
"""Seconds between two looks at a cell that another process is running."""


@dataclass(frozen=True)
class Job:
    """A composed cell: what `filtrun.launch.execute` needs, and the folder named by what it computes."""

    label: str
    overrides: tuple[str, ...]
    config: dict[str, Any]
    choices: dict[str, str]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: its record, or why there is none; `cached`: it had been there already.

    `code` is what the command would exit with for this cell alone: 0, 1 for a failure, 2 for a user's mistake. A cell
    whose parts do not go together is `skipped`, which is neither.
    """

    job: Job
    record: Any = None
    error: str = ""
    seconds: float = 0.0
    cached: bool = False
    code: int = 0
    skipped: bool = False

    @property
    def failed(self) -> bool:
        """Whether there should be a record of it and is none."""
        return self.record is None and not self.skipped


def make_jobs(
    overrides: Sequence[str],
    seeds: Sequence[int],
    sweep_dir: Path,
    *,
    label: str = "",
    extra: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
) -> list[Job]:
    """The cells of one row of a table, a job for each seed; composed once, as only the seed differs.

    Args:
        overrides: of all the row's cells, without the seed.
        sweep_dir: where the folders of cells lie.
        extra: overrides that say where to run (device, stages.root, ...).

    Raises:
        UserError: an override names what does not exist.
    """
    if not seeds:
        return []
    words = [o for o in overrides if not o.startswith("seed=")]

    def compose() -> list[Any]:
        from filtrun.api import resolved

        composed, choices = composed_on_base([*words, f"seed={seeds[0]}", *extra], config_dirs, stamp(config_dirs))
        found = []
        for seed in seeds:
            composed.seed = seed
            found.append((resolved(composed), choices))
        return found

    key = [*words, *extra, f"seeds={list(seeds)}"]
    found = kept(sweep_dir, key, config_dirs, lambda: [list(pair) for pair in compose()])
    return [
        Job(
            f"{label} seed={seed}".strip(), (*words, f"seed={seed}", *extra), config, choices,
            sweep_dir / cell_digest(config),
        )
        for seed, (config, choices) in zip(seeds, found, strict=True)
    ]  # fmt: skip


def run_jobs(
    jobs: Sequence[Job],
    starts: Callable[[int, Job], None] = lambda done, job: None,
    ended: Callable[[int, Outcome], None] = lambda done, outcome: None,
    *,
    workers: int | None = None,
    fail_fast: bool = False,
    quiet: bool = True,
    launcher: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """Do the jobs; one that fails does not stop the others. A cell another process is at is waited for, last.

    `starts` and `ended` are called with the number of jobs that have ended and the one at hand. Raises
    KeyboardInterrupt (from Interrupted) when the sweep is stopped.

    Args:
        workers: so many processes at a time, each of which may die hard; None: one after the other in this process.
        fail_fast: stop at the first failure; cells that were not run have no outcome.
        quiet: show no progress bars for cells of this process.
        launcher, options: where the workers run, by `filtrun.sweeps.launchers`; None: on this machine.

    Raises:
        UserError: the launcher or one of its options does not exist, or it cannot start anything here.
        RunFailure: workers end before they begin a cell.
    """
    if (workers is not None or launcher is not None) and jobs:
        from filtrun.sweeps.launchers import make_launcher
        from filtrun.sweeps.pool import Pool

        return Pool(jobs, workers or 1, make_launcher(launcher, options or {})).run(starts, ended, fail_fast)
    from filtrun.sweeps.together import groups, run_together

    waiting, outcomes = list(jobs), list[Outcome]()
    while waiting:
        busy = []
        for group in groups(waiting):
            for job in group:
                starts(len(outcomes), job)
            found = run_together(group, quiet=quiet) if len(group) > 1 else [run_job(group[0], quiet=quiet)]
            busy += [job for job, outcome in zip(group, found, strict=True) if outcome is None]
            for outcome in filter(None, found):
                outcomes.append(outcome)
                ended(len(outcomes), outcome)
            if fail_fast and any(outcome is not None and outcome.failed for outcome in found):
                return outcomes
        if len(busy) == len(waiting):
            time.sleep(POLL)
        waiting = busy
    return outcomes


def run_job(
    job: Job, sweep: str = "", begins: Callable[[], bool] = lambda: True, *, quiet: bool = True
) -> Outcome | None:
    """One cell in its folder, by the launch path of the command line; None when another process is running it.

    Args:
        sweep: name of the sweep the cell's claim is held for.
        begins: called when the claim is ours; the cell is left alone when it says no.
        quiet: show no progress bar.
    """
    from filtrun.sweeps.claims import claimed

    with claimed(job.folder, sweep) as ours:
        if not ours or not begins():
            return None
        with alone():  # takes time to end, which a look at a cell in other hands should not
            return attempt(job, quiet=quiet)


def attempt(job: Job, *, quiet: bool = True, fit: Callable[[Any], None] | None = None) -> Outcome | None:
    """Run a cell whose claim is held; None when another process has its folder.

    Raises KeyboardInterrupt (from Interrupted) when stopped. `fit` as in `filtrun.launch.execute`.
    """
    from filtrun.launch import execute

    started = time.perf_counter()
    before = changed(job)
    record, error, code, skipped = None, "", 0, False
    try:
        record = execute(job.config, job.choices, job.folder, list(job.overrides), quiet=quiet, cell=True, fit=fit)
    except Busy:
        return None
    except Interrupted as stop:
        raise KeyboardInterrupt from stop
    except (UserError, RunFailure) as failure:
        error = str(failure).strip() or type(failure).__name__
        code, skipped = failure.exit_code, isinstance(failure, Unfit)
    cached = record is not None and before is not None and before == changed(job)
    return Outcome(job, record, error, time.perf_counter() - started, cached, 0 if skipped else code, skipped)


def changed(job: Job) -> int | None:
    """When a cell's record was written last; None when there is none."""
    try:
        return (job.folder / FILE).stat().st_mtime_ns
    except OSError:
        return None
