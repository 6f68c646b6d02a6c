"""The cells of a search's trials: ordinary runs in outputs/sweeps, on worker processes that stay for all trials."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.search.loop import LOOK, News, TrialFailed
from filtrun.search.space import overrides
from filtrun.sweeps import watch
from filtrun.sweeps.crew import Crew
from filtrun.sweeps.jobs import Job, make_jobs

PATIENCE = 30.0
"""Seconds that a cell which was told to end has for its record."""


class SweepCells:
    """Runs the cells of trials on `workers` processes. A context: workers are stopped at its end.

    Args:
        words: overrides of every trial.
        metric: ``split/name``, what a cell is worth.
        rungs: evaluations within each run, at which it waits for whether it is to go on; 0: none.
        folder: where the cells' folders lie.
    """

    def __init__(self, words: Sequence[str], metric: str, workers: int, rungs: int, folder: Path) -> None:
        self.words, self.metric, self.workers, self.rungs = list(words), metric, workers, rungs
        self.folder = folder.absolute()
        self.crew: Crew | None = None
        self.jobs: dict[int, Job] = {}
        self.stopping: set[int] = set()

    def __enter__(self) -> SweepCells:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        until = time.monotonic() + PATIENCE
        while kind is None and self.stopping & set(self.jobs) and time.monotonic() < until:
            self.news()  # a cell that was told to end writes its record
            time.sleep(LOOK)
        if self.crew is not None:
            self.crew.close()
        for job in self.jobs.values():
            watch.unwatch(job.folder)

    def make(self, params: dict[str, Any], seeds: Sequence[int]) -> list[Job]:
        """A job for each seed. Raises TrialFailed for values that no run can have."""
        extra = [f"trainer.evaluations={self.rungs}"] if self.rungs else []
        try:
            return make_jobs([*self.words, *overrides(params)], seeds, self.folder, extra=extra)
        except UserError as error:
            raise TrialFailed(str(error).partition("\n")[0]) from error

    def start(self, job: Job) -> int:
        """Hand a job to the workers."""
        if self.rungs:
            watch.watch(job.folder)
        if self.crew is None:
            self.crew = Crew(job, self.workers)
            number = 0
        else:
            (number,) = self.crew.add([job])
        self.jobs[number] = job
        return number

    def news(self) -> list[News]:
        """Cells that ended, and those that wait after an evaluation."""
        found = []
        for number, outcome in self.crew.ended() if self.crew is not None else ():
            job = self.jobs.pop(number)
            if self.rungs:
                watch.unwatch(job.folder)
            value = outcome.record.metrics.get(self.metric) if outcome.record else None
            error = outcome.error.strip() or f"{job.folder} has no {self.metric}"
            found.append(News(number, float(value)) if value is not None else News(number, failed=error))
        for number, job in self.jobs.items() if self.rungs else ():
            asks = watch.asked(job.folder)
            if asks is None:
                continue
            rung, values = asks
            value = values.get(self.metric.partition("/")[2])
            if value is None:  # it is measured at the end of a run only
                watch.answer(job.folder, rung, True)
            else:
                found.append(News(number, float(value), rung=rung))
        return found

    def answer(self, cell: int, rung: int, go_on: bool) -> None:
        """Let a cell go on, or end."""
        watch.answer(self.jobs[cell].folder, rung, go_on)
        if not go_on:
            self.stopping.add(cell)

    def busy(self) -> int:
        """Cells that have not ended."""
        return len(self.jobs)
