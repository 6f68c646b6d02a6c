"""Small cells for sweeps whose workers are started, stopped and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from filtrun.record import Record
from filtrun.sweeps.claims import claim_path, holder
from filtrun.sweeps.jobs import Job, make_jobs

WORDS = [
    "scale=smoke", "data=digits", "task=classify", "model=resnet20", "model.width=4", "model.base=scratch",
    "method=full", "device=cpu", "logger=none", "trainer.steps=60", "trainer.checkpoint_every=5",
    "trainer.log_every=1",
]  # fmt: skip


class Cells:
    """Cells of three seeds, and what happens to them."""

    words = WORDS

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, name: str, seeds: Any = (0, 1, 2), *words: str) -> list[Job]:
        """The cells below a folder of their own."""
        return make_jobs([*WORDS, *words], seeds, self.root / name, extra=[f"stages.root={self.root / 'stages'}"])

    def when_at(self, job: Job, step: int) -> int:
        """The process that runs the cell, once it has logged `step`."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            who = holder(claim_path(job.folder))
            if who is not None and self.steps(job) >= step:
                return who.pid
            time.sleep(0.002)
        raise AssertionError("the cell was not begun")

    def then(self, job: Job, step: int, do: Callable[[int], Any]) -> threading.Thread:
        """Do something to the process that runs the cell, when it has made `step` steps."""
        thread = threading.Thread(target=lambda: do(self.when_at(job, step)), daemon=True)
        thread.start()
        return thread

    @staticmethod
    def kill(pid: int) -> None:
        """As the kernel does when memory is short."""
        os.kill(pid, signal.SIGKILL)

    @staticmethod
    def steps(job: Job) -> int:
        """Steps the cell has logged."""
        with contextlib.suppress(OSError):
            return len((job.folder / "metrics.jsonl").read_text().splitlines())
        return 0

    @staticmethod
    def result(job: Job) -> Any:
        """What must be the same however a cell was run; every step is logged once."""
        record = Record.read(job.folder)
        assert record.status == "finished"
        logged = [json.loads(x)["step"] for x in (job.folder / "metrics.jsonl").read_text().splitlines()]
        assert logged == list(range(1, len(logged) + 1))
        return record.metrics, record.key, record.report, [a["sha256"] for a in record.artifacts]

    def left(self, name: str) -> list[Path]:
        """Claims and boards that are still there."""
        return [path for each in (".claims", ".sweeps") for path in (self.root / name / each).glob("*")]


@pytest.fixture
def cells(tmp_path: Path) -> Cells:
    """Cells in this test's folder."""
    return Cells(tmp_path)
