"""A worker of a sweep, ``python -m filtrun.sweeps.worker BOARD NAME``: imports once, then runs cell after cell.

It ends when no cell is left, when the board says so, or when its standard input ends: whoever started it is gone.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filtrun.errors import UserError
from filtrun.record import FILE, Record
from filtrun.stopping import stops_at
from filtrun.sweeps.board import Board
from filtrun.sweeps.jobs import POLL, Job, run_job
from filtrun.sweeps.launcher import STOPPED
from filtrun.sweeps.life import Life

LOOK = 0.05
"""Seconds between two looks for cells that were added."""

PATIENCE = 20.0
"""Seconds a worker has to write down that it was stopped, before it is ended."""


def work(board: Board, name: str, life: Life) -> bool:
    """Run what no other process is at, until every cell has ended; False when it is left because the parent is silent.

    While the board is open it waits for more cells. Raises KeyboardInterrupt when it is stopped.
    """
    jobs, since, is_open = board.jobs(), board.since(), board.is_open()
    left = list(range(len(jobs)))
    while left or is_open:
        busy = []
        for number in left:
            if life.orphan:
                return False
            if not board.ended(number) and not _cell(board, name, number, jobs[number], since):
                busy.append(number)
        if len(busy) == len(left):
            _wait(functools.partial(board.has, len(jobs)) if is_open else bool)
        left = [number for number in busy if not board.ended(number)]
        if is_open:
            more = board.added(len(jobs))
            left += range(len(jobs), len(jobs) + len(more))
            jobs += more
    return True


def _wait(news: Callable[[], bool]) -> None:
    """Until there may be something to do: `POLL` seconds, or less when there is news."""
    until = time.monotonic() + POLL
    while time.monotonic() < until and not news():
        time.sleep(LOOK)


def _cell(board: Board, name: str, number: int, job: Job, since: float) -> bool:
    """Run one cell and say how it ended; False when it is in other hands."""

    def begins() -> bool:
        if board.ended(number):
            return False
        error = failed_since(job, since)
        if error is not None:  # another sweep has just tried
            board.end(number, error=error, seconds=0.0, code=1)
            return False
        board.begin(name, number)
        return True

    outcome = run_job(job, board.folder.name, begins)
    if outcome is None:
        return board.ended(number)
    board.end(
        number, error=outcome.error, seconds=outcome.seconds, cached=outcome.cached, code=outcome.code,
        skipped=outcome.skipped,
    )  # fmt: skip
    return True


def failed_since(job: Job, since: float) -> str | None:
    """Why the cell failed, if it has since the sweep began: in another sweep, then."""
    try:
        if (job.folder / FILE).stat().st_mtime <= since:
            return None
        record = Record.read(job.folder)
    except (OSError, UserError):
        return None
    return str(record.error) if record.status == "failed" else None


def _ends_with_its_parent() -> None:
    while os.read(0, 1024):
        pass
    _end()


def _end() -> None:
    """Stop this process, from another thread than the one that works."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


def main() -> int:
    """Work on a board; 130 when stopped."""
    board, name = Board(Path(sys.argv[1])), sys.argv[2]
    with stops_at((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)):
        try:
            board.join(name)
            life = Life(board, name, _end)
            life.start()
            threading.Thread(target=_ends_with_its_parent, daemon=True).start()
            return 0 if work(board, name, life) else STOPPED
        except KeyboardInterrupt:
            return STOPPED


if __name__ == "__main__":
    sys.exit(main())
