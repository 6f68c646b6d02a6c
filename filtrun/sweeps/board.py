"""What the processes of one sweep share: the list of cells, who is at which, and how each ended. Plain files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filtrun.sweeps.claims import Holder, me
from filtrun.sweeps.jobs import Job

FOLDER = ".sweeps"
LIST = "cells.json"
OPEN = "open"
PARENT = "parent.json"


class Board:
    """A folder below the sweep's, each of its files written in one piece.

    ``cells.json`` is the list, ``parent.json`` the process that started the sweep, ``alive/WORKER`` each worker's,
    ``at/WORKER`` the cell it is at, ``ended/NUMBER`` how a cell ended; ``stop`` tells the workers to end. Who lives
    touches his file. While it is `open`, cells may be added: each lot is a file ``cells-N.json``, N the number of its
    first cell.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, folder: Path, jobs: Sequence[Job], detached: bool = False) -> Board:
        """Write the list of cells. `detached`: the workers go on when this process is gone."""
        for name in ("at", "ended", "alive"):
            (folder / name).mkdir(parents=True)
        _write(folder / PARENT, {**asdict(me(folder.name)), "detached": detached})
        _write(folder / LIST, _cells(jobs))
        return cls(folder)

    def jobs(self) -> list[Job]:
        """The cells in the order they are to be begun: those the sweep began with."""
        return _jobs(self.folder / LIST)

    def keep_open(self) -> None:
        """Cells may be added: workers stay when all have ended. For good: who made the board ends them."""
        (self.folder / OPEN).touch()

    def is_open(self) -> bool:
        """Whether cells may be added."""
        return (self.folder / OPEN).exists()

    def add(self, first: int, jobs: Sequence[Job]) -> None:
        """More cells, numbered from `first`: how many there are already."""
        _write(self._lot(first), _cells(jobs))

    def has(self, first: int) -> bool:
        """Whether cells were added since there were `first`."""
        return self._lot(first).exists()

    def added(self, first: int) -> list[Job]:
        """The cells that were added since there were `first`."""
        found: list[Job] = []
        while (lot := self._lot(first + len(found))).exists():
            found += _jobs(lot)
        return found

    def _lot(self, first: int) -> Path:
        return self.folder / f"cells-{first}.json"

    def since(self) -> float:
        """When the sweep began, by the clock of the file system."""
        return (self.folder / LIST).stat().st_mtime

    def parent(self) -> tuple[Holder, bool] | None:
        """(who started the sweep, whether its workers go on without it); None when that cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            told = json.loads((self.folder / PARENT).read_text(encoding="utf-8"))
            detached = bool(told.pop("detached"))
            return Holder(**told), detached
        return None

    def join(self, worker: str) -> None:
        """This process is the worker."""
        _write(self.folder / "alive" / worker, asdict(me(self.folder.name)))

    def who(self, worker: str) -> Holder | None:
        """The process that is or was the worker."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Holder(**json.loads((self.folder / "alive" / worker).read_text(encoding="utf-8")))
        return None

    def begin(self, worker: str, number: int) -> None:
        """A worker is at a cell."""
        _write(self.folder / "at" / worker, number)

    def at(self, worker: str) -> int | None:
        """The cell a worker began last."""
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((self.folder / "at" / worker).read_text(encoding="utf-8")))
        return None

    def end(self, number: int, **how: Any) -> None:
        """A cell ended: ``error`` (empty when it finished) and the other facts of `Outcome`."""
        _write(self.folder / "ended" / str(number), how)

    def ended(self, number: int) -> bool:
        """Whether a cell ended in this sweep."""
        return (self.folder / "ended" / str(number)).exists()

    def news(self, known: set[int]) -> list[tuple[int, dict[str, Any]]]:
        """The cells that ended beside the `known` ones, with how."""
        names = [entry.name for entry in os.scandir(self.folder / "ended") if entry.name.isdigit()]
        return [
            (number, json.loads((self.folder / "ended" / str(number)).read_text(encoding="utf-8")))
            for number in sorted(set(map(int, names)) - known)
        ]

    def stop(self) -> None:
        """Tell the workers to end."""
        with contextlib.suppress(OSError):
            (self.folder / "stop").touch()

    def stopped(self) -> bool:
        """Whether the workers are to end: they were told, or the board is gone."""
        return (self.folder / "stop").exists() or not (self.folder / LIST).exists()

    def remove(self) -> None:
        """Take the board away; records and checkpoints lie elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _cells(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    return [
        {
            "label": job.label,
            "overrides": list(job.overrides),
            "config": job.config,
            "choices": job.choices,
            "folder": str(job.folder.absolute()),
        }
        for job in jobs
    ]


def _jobs(path: Path) -> list[Job]:
    cells = json.loads(path.read_text(encoding="utf-8"))
    return [Job(c["label"], tuple(c["overrides"]), c["config"], c["choices"], Path(c["folder"])) for c in cells]


def _write(path: Path, value: Any) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(json.dumps(value), encoding="utf-8")
    os.replace(work, path)
