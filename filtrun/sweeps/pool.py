"""Start workers for a sweep and keep them going: one that dies takes its cell with it, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from filtrun.errors import RunFailure
from filtrun.record import FILE, Record
from filtrun.sweeps.board import FOLDER, PARENT, Board
from filtrun.sweeps.claims import Holder, claim_path, holder, release, seize
from filtrun.sweeps.jobs import Job, Outcome
from filtrun.sweeps.launcher import STOPPED, End, Launcher, Worker
from filtrun.sweeps.life import beating, mtime, remove_abandoned
from filtrun.sweeps.processes import PATIENCE, Processes

LOOK, LOOK_FAR = 0.05, 0.5
"""Seconds between two looks at the board, when workers are on this machine and when they are not."""

STILLBORN = 3
"""Workers that may end in a row without having begun a cell."""

STOPS = 10
"""Times a cell may be stopped from outside before it counts as failed."""

SILENT = 600.0
"""Seconds without a sign of life after which a worker counts as dead, whatever its launcher says."""

SETTLE = 30.0
"""Seconds that what a worker wrote on another machine may take to be seen here."""


class Pool:
    """The workers of one sweep.

    Args:
        workers: how many at a time.
        launcher: says where they run; None: as processes on this machine.
        stay: more cells will come, and workers wait for them.
    """

    def __init__(
        self, jobs: Sequence[Job], workers: int, launcher: Launcher | None = None, *, stay: bool = False
    ) -> None:
        self.jobs = list(jobs)
        self.launcher = launcher or Processes()
        boards = self.jobs[0].folder.parent.absolute() / FOLDER
        remove_abandoned(boards)
        self.sweep = f"{os.getpid()}-{secrets.token_hex(6)}"
        self.board = Board.make(boards / self.sweep, self.jobs, self.launcher.detached)
        if stay:
            self.board.keep_open()
        self.until_closed = contextlib.ExitStack()
        self.until_closed.callback(self.board.remove)
        try:
            count = workers if stay else min(workers, len(self.jobs))
            self.free = list(range(self.launcher.open(self.board, self.jobs, count)))
            self.until_closed.enter_context(beating(self.board.folder / PARENT))
        except BaseException:
            self.until_closed.close()
            raise
        self.look = LOOK if self.launcher.sure else LOOK_FAR
        self.running: dict[str, tuple[Worker, int]] = {}
        self.began, self.stillborn, self.rest = 0, 0, 0.0
        self.stops: Counter[int] = Counter()
        self.outcomes: dict[int, Outcome] = {}

    def run(
        self, starts: Callable[[int, Job], None], ended: Callable[[int, Outcome], None], fail_fast: bool
    ) -> list[Outcome]:
        """Until every cell has ended, or with `fail_fast` one has failed."""
        shown: set[int] = set()
        try:
            while True:
                self._bury()
                for number, how in self.board.news(set(self.outcomes)):
                    job = self.jobs[number]
                    record = None if how["error"] else _read(job.folder)
                    self.outcomes[number] = Outcome(job, record, **how)
                    ended(len(self.outcomes), self.outcomes[number])
                    if fail_fast and self.outcomes[number].failed:
                        return list(self.outcomes.values())
                if len(self.outcomes) == len(self.jobs):
                    return list(self.outcomes.values())
                self._hire()
                for name in self.running:
                    number_at = self.board.at(name)
                    if number_at is not None and number_at not in shown:
                        shown.add(number_at)
                        starts(len(self.outcomes), self.jobs[number_at])
                time.sleep(self.look)
        finally:
            self.close()

    def _hire(self) -> None:
        """Start workers in the free places, as long as there are cells for them."""
        wanted = len(self.jobs) - len(self.outcomes) - len(self.running)
        if not self.free and not self.running:
            done = f"{len(self.outcomes)} of {len(self.jobs)} cells have ended"
            raise RunFailure(f"all jobs of the sweep were cancelled; {done}, the same command goes on")
        if not self.free or wanted <= 0 or time.monotonic() < self.rest:
            return
        places = {}
        for place in self.free[:wanted]:
            self.began += 1
            places[f"{self.began}"] = place
        self.free = self.free[wanted:]
        for name, worker in self.launcher.start(places).items():
            self.running[name] = (worker, places[name])

    def _bury(self) -> None:
        """Note what became of the cells that workers were at who have ended."""
        for name, (worker, place) in list(self.running.items()):
            end = worker.poll() or (None if self.launcher.sure else self._silent(name, worker))
            if end is None:
                continue
            del self.running[name]
            if not end.last:
                self.free.append(place)
            number, who = self.board.at(name), self.board.who(name)
            if end.code == 0:  # it saw every cell end; we may see that later
                self.rest = time.monotonic() + SETTLE
            if number is None or who is None:
                self.stillborn = 0 if end.code == 0 or end.last else self.stillborn + 1
                if self.stillborn >= STILLBORN:
                    told = worker.told().strip().splitlines()
                    raise RunFailure(f"workers end before they begin: {told[-1] if told else end}")
                continue
            self.stillborn = 0
            if end.code != 0 and not self.board.ended(number):
                self._left(number, who, end)

    def _silent(self, name: str, worker: Worker) -> End | None:
        """A worker nothing is heard of, although its launcher still takes it for alive."""
        heard, now = mtime(self.board.folder / "alive" / name), mtime(self.board.folder / PARENT)
        if heard is None or now is None or now - heard < SILENT:
            return None
        self.launcher.kill([worker])
        return End(1, f"no sign of life for {SILENT / 60:.0f} minutes")

    def _left(self, number: int, who: Holder, end: End) -> None:
        """A worker ended in the middle of a cell: it is begun again when it was stopped from outside, else failed."""
        if end.code == STOPPED or end.freed:
            self.stops[number] += not end.last
            if self.stops[number] < STOPS:
                dead = holder(claim_path(self.jobs[number].folder))
                if dead is not None and _same(dead, who):
                    release(claim_path(self.jobs[number].folder), dead)
                return
            self._failed(number, who, f"stopped {STOPS} times before it was done (last: {end}); give it more time")
        else:
            self._failed(number, who, f"worker died: {end}")

    def _failed(self, number: int, who: Holder, error: str) -> None:
        """Note a cell as failed, unless another worker or sweep has taken it over: then how it ends there counts."""
        job = self.jobs[number]
        path = claim_path(job.folder)
        dead = holder(path)
        if dead is not None and not _same(dead, who):
            return
        mine = dead and seize(job.folder, dead, self.sweep)
        if dead is not None and mine is None:
            return
        try:
            error = mark(job, "failed", error)
        finally:
            if mine is not None:
                release(path, mine)
        self.board.end(number, error=error, seconds=0.0, code=1 if error else 0)

    def close(self) -> None:
        """Stop the workers, which note what they were at as interrupted, and take the board away."""
        self.board.stop()
        left = [worker for worker, _ in self.running.values()]
        self.running.clear()
        try:
            if left:
                self.launcher.stop(left)
                deadline = time.monotonic() + PATIENCE
                while (left := [w for w in left if w.poll() is None]) and time.monotonic() < deadline:
                    time.sleep(self.look)
                self.launcher.kill(left)
            self.launcher.close()
        finally:
            self.until_closed.close()


def _same(one: Holder, other: Holder) -> bool:
    return (one.host, one.pid, one.started, one.sweep) == (other.host, other.pid, other.started, other.sweep)


def mark(job: Job, status: str, error: str) -> str:
    """Write into a cell's record, and return, why it failed or is skipped; empty when it had finished all the same."""
    path = job.folder / FILE
    if path.exists():
        record = Record.read(job.folder)
        if record.status == "finished":
            return ""
    else:
        job.folder.mkdir(parents=True, exist_ok=True)
        config = job.config
        record = Record(job.folder, overrides=list(job.overrides), config=config, seed=config["seed"])
        record.data, record.task = job.choices.get("data", ""), job.choices.get("task", "")
        record.model, record.methods = job.choices.get("model", ""), list(config.get("method") or {})
    record.status, record.error = status, error
    record.write()
    return error


def _read(folder: Path) -> Record:
    """The record a worker has just checked and written."""
    return Record(folder=folder, **json.loads((folder / FILE).read_text(encoding="utf-8")))
