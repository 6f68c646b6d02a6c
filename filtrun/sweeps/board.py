"""What the processes of one sweep share: the list of cells, who is at which, and how each ended. Plain files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.sweep import Job

FOLDER = ".sweeps"
LIST = "cells.json"


class Board:
    """A folder below the sweep's: ``cells.json``, ``at/WORKER`` and ``ended/NUMBER``, each written in one piece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, folder: Path, jobs: Sequence[Job]) -> Board:
        """Write the list of cells."""
        for name in ("at", "ended"):
            (folder / name).mkdir(parents=True)
        cells = [
            {
                "label": job.label,
                "overrides": list(job.overrides),
                "config": job.config,
                "choices": job.choices,
                "folder": str(job.folder.absolute()),
            }
            for job in jobs
        ]
        _write(folder / LIST, cells)
        return cls(folder)

    def jobs(self) -> list[Job]:
        """The cells in the order they are to be begun."""
        cells = json.loads((self.folder / LIST).read_text(encoding="utf-8"))
        return [Job(c["label"], tuple(c["overrides"]), c["config"], c["choices"], Path(c["folder"])) for c in cells]

    def since(self) -> float:
        """When the sweep began, by the clock of the file system."""
        return (self.folder / LIST).stat().st_mtime

    def begin(self, worker: str, number: int) -> None:
        """A worker is at a cell."""
        _write(self.folder / "at" / worker, number)

    def at(self, worker: str) -> int | None:
        """The cell a worker began last."""
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads((self.folder / "at" / worker).read_text(encoding="utf-8")))
        return None

    def end(self, number: int, **how: Any) -> None:
        """A cell ended: ``error`` (empty when it finished), ``seconds`` and ``cached``."""
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

    def remove(self) -> None:
        """Take the board away; records and checkpoints lie elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(path: Path, value: Any) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(json.dumps(value), encoding="utf-8")
    os.replace(work, path)
