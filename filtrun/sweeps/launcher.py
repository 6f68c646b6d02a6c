"""What a pool asks of whoever starts workers: processes here, jobs of a cluster, tasks of Ray."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from filtrun.sweeps.board import Board
from filtrun.sweeps.jobs import Job

STOPPED = 130
"""Exit code of a worker that was stopped and has said so in the record: its cell is begun again."""


@dataclass(frozen=True)
class End:
    """How a worker ended: its exit code, and what is known beside it.

    `why` replaces the code in messages; `freed`: its cell is not to blame and is begun again; `last`: nothing is to be
    started in its place.
    """

    code: int
    why: str = ""
    freed: bool = False
    last: bool = False

    def __str__(self) -> str:
        return self.why or how(self.code)


class Worker(Protocol):
    """A worker that was started."""

    def poll(self) -> End | None:
        """How it ended; None while it runs or waits to."""

    def told(self) -> str:
        """What it printed, as far as it can be read."""


class Launcher(Protocol):
    """Starts workers for one sweep."""

    detached: bool
    """Its workers go on when this process is gone."""
    sure: bool
    """`Worker.poll` never takes a dead worker for a live one."""

    def open(self, board: Board, jobs: Sequence[Job], workers: int) -> int:
        """Be ready to start `workers`; returns how many there can be. Raises UserError when none can."""

    def start(self, places: Mapping[str, int]) -> Mapping[str, Worker]:
        """Start workers: name -> place, a number below what `open` returned."""

    def stop(self, workers: Collection[Worker]) -> None:
        """Ask workers to end; the board says so too."""

    def kill(self, workers: Collection[Worker]) -> None:
        """End workers that did not."""

    def close(self) -> None:
        """Nothing is started any more."""


def how(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"
