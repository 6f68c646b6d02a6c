"""Cells that differ in their seed only, in one process: each runs by the ordinary path, and they train at once.

Every cell has a thread, but only one works at a time: a cell goes on until it is about to train, then the next one
does; when all have come that far they train together (`filtrun.lockstep`), and each goes on to its end in turn.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from filtrun.cells import cell_digest
from filtrun.sweeps.alone import alone
from filtrun.sweeps.jobs import Job, Outcome, attempt

log = logging.getLogger("filtrun")


def groups(jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs that differ in their seed only and ask for it (``vectorize``) side by side, at most so many as they say."""
    found: dict[str, list[list[Job]]] = {}
    order: list[list[Job]] = []
    for job in jobs:
        most = _most(job.config)
        parts = found.setdefault(cell_digest({**job.config, "seed": 0}), []) if most > 1 else []
        if not parts or len(parts[-1]) >= most:
            parts.append([])
            order.append(parts[-1])
        parts[-1].append(job)
    return order


def _most(config: dict[str, Any]) -> int:
    """How many cells at once: ``vectorize`` as a number; true: all."""
    wanted = config.get("vectorize", False)
    return 10**6 if wanted is True else int(wanted)


class Meeting:
    """Where cells wait for each other before they train."""

    def __init__(self, jobs: Sequence[Job], quiet: bool) -> None:
        self.jobs, self.quiet = jobs, quiet
        self.turns = [threading.Semaphore(0) for _ in jobs]
        self.back: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.waiting: dict[int, Any] = {}
        self.ends: dict[int, BaseException | None] = {}
        self.outcomes: dict[int, Outcome | BaseException] = {}
        self.apart = ""

    def hold(self) -> list[Outcome | None]:
        """Run all cells; None for one that another process is at.

        Raises KeyboardInterrupt when stopped, after every cell has written that down.
        """
        threads = [threading.Thread(target=self._cell, args=(i,), daemon=True) for i in range(len(self.jobs))]
        stopped: BaseException | None = None
        for thread in threads:
            if stopped is None:
                thread.start()
                stopped = self._wait()
        if stopped is None:
            try:
                self._train()
            except KeyboardInterrupt as stop:
                stopped = stop
        for i in sorted(self.waiting):
            if stopped is not None:
                self.ends[i] = KeyboardInterrupt()
            self.turns[i].release()
            stopped = self._wait() or stopped
        if stopped is not None:
            raise stopped
        failure = next((end for end in self.outcomes.values() if isinstance(end, BaseException)), None)
        if failure is not None:
            raise failure
        made = (self.outcomes.get(i) for i in range(len(self.jobs)))
        return [outcome if isinstance(outcome, Outcome) else None for outcome in made]

    def _wait(self) -> BaseException | None:
        """Until the cell whose turn it is has ended or waits; Ctrl-C meanwhile is kept until it has."""
        stopped = None
        while True:
            try:
                self.back.get()
                return stopped
            except KeyboardInterrupt as stop:
                stopped = stop

    def _train(self) -> None:
        """Train those that wait: at once where that can be, else each by itself when it has its turn."""
        from filtrun import lockstep

        runs = [self.waiting[i] for i in sorted(self.waiting)]
        if len(runs) < 2:
            return
        try:
            ends = lockstep.fit(runs)
        except lockstep.Apart as reason:
            self.apart = f"trained one after the other: {reason}"
            return
        self.ends = dict(zip(sorted(self.waiting), ends, strict=True))

    def _cell(self, i: int) -> None:
        try:
            outcome = attempt(self.jobs[i], quiet=self.quiet, fit=lambda run: self._fit(i, run))
            if outcome is not None:
                self.outcomes[i] = outcome
        except BaseException as error:  # told by `hold`, in the main thread
            self.outcomes[i] = error
        finally:
            self.back.put(i)

    def _fit(self, i: int, run: Any) -> None:
        """Wait for the others, then be trained; or train, where there is nobody to train with."""
        from filtrun import runner

        self.waiting[i] = run
        self.back.put(i)
        self.turns[i].acquire()
        if i in self.ends:
            end = self.ends[i]
            if end is not None:
                raise end
            run.shared["together"] = len(self.ends)
            return
        if self.apart:
            log.info(self.apart)
        runner.fit(run)


def run_together(jobs: Sequence[Job], *, quiet: bool = True) -> list[Outcome | None]:
    """Cells that differ in their seed only, by the launch path of the command line; None for one in other hands.

    Raises KeyboardInterrupt (from Interrupted) when stopped.
    """
    import signal

    from filtrun.stopping import stops_at
    from filtrun.sweeps.claims import claimed

    with contextlib.ExitStack() as held, alone(), stops_at([signal.SIGTERM]):
        ours = [i for i, job in enumerate(jobs) if held.enter_context(claimed(job.folder))]
        made = dict(zip(ours, Meeting([jobs[i] for i in ours], quiet).hold(), strict=True))
    return [made.get(i) for i in range(len(jobs))]
