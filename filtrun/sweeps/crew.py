"""Workers that stay: cells are handed to them one by one, by whoever decides on the next when one has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from filtrun.record import Record
from filtrun.sweeps.jobs import Job, Outcome
from filtrun.sweeps.pool import Pool


class Crew(Pool):
    """Worker processes on this machine for cells that are not known from the start.

    Args:
        first: a cell, as those to come are: it says where their folders lie, and on which device they run. It is run.
        workers: how many processes at a time, each of which may die hard.
    """

    def __init__(self, first: Job, workers: int) -> None:
        super().__init__([first], workers, stay=True)
        self._hire()

    def add(self, jobs: Sequence[Job]) -> list[int]:
        """Hand cells over; returns their numbers, by which `ended` names them."""
        jobs = [dataclasses.replace(job, folder=job.folder.absolute()) for job in jobs]
        numbers = list(range(len(self.jobs), len(self.jobs) + len(jobs)))
        self.board.add(len(self.jobs), jobs)
        self.jobs += jobs
        self._hire()
        return numbers

    def ended(self) -> list[tuple[int, Outcome]]:
        """The cells that have ended since the last call. Raises RunFailure when workers cannot be started."""
        self._bury()
        found = []
        for number, how in self.board.news(set(self.outcomes)):
            job = self.jobs[number]
            record = None if how["error"] else Record.read(job.folder)
            self.outcomes[number] = Outcome(job, record, **how)
            found.append((number, self.outcomes[number]))
        self._hire()
        return found
