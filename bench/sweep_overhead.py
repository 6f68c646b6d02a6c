"""What a cell of a sweep costs beside its own work, on a warm worker: ``python -m bench.sweep_overhead [CELLS]``.

The cells evaluate nothing and train nothing. Their own work is what their records say (``cost.total_seconds``); the
rest of the time between two ends is overhead: claim, checks, reading the data, record, telling the parent.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from filtrun.sweeps.jobs import Outcome, make_jobs, run_jobs

WORDS = [
    "scale=smoke", "data=digits", "task=classify", "model=resnet20", "model.width=4", "model.base=scratch",
    "method=none", "device=cpu", "logger=none", "trainer.evaluate=false",
]  # fmt: skip


def main(cells: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        jobs = make_jobs(WORDS, range(cells), Path(folder) / "sweeps", extra=[f"stages.root={folder}/stages"])
        composed = time.perf_counter() - began
        ends: list[float] = []
        own: list[float] = []

        def ended(done: int, outcome: Outcome) -> None:
            ends.append(time.perf_counter())
            own.append(outcome.record.cost["total_seconds"])

        run_jobs(jobs, ended=ended, workers=1)
    each = (ends[-1] - ends[0]) / (cells - 1) * 1000
    work = sum(own[1:]) / (cells - 1) * 1000
    print(f"{cells} cells, one warm worker: {each:.1f} ms a cell, {work:.1f} ms of it own work")
    print(f"overhead {each - work:.1f} ms a cell, and {composed / cells * 1000:.1f} ms to compose it")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
