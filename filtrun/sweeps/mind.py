"""What runs where a job of a cluster or a task of Ray does: it starts the worker as a process, and says how it ended.

The worker may die hard; this process, of the cluster's own making, lives on to tell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filtrun.sweeps.places import environment
from filtrun.sweeps.processes import begin, end

LOOK = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID")
"""What SLURM says of the job's tasks: a cell is none of them, and must not take itself for one."""


def mind(
    board: str, name: str, cwd: str, path: str, variables: Mapping[str, str | None], share: int, threads: int | None
) -> int:
    """Run a worker to its end and return its exit code; signals that end jobs are passed on to it.

    Args:
        cwd: where the sweep was started; relative paths in the cells' configurations begin there.
        path: ``PYTHONPATH`` of the worker.
        variables: of the worker's environment; None takes one away.
        share: workers that have this job's CPU cores to themselves.
        threads: CPU threads of the worker; None: as many as it has cores.
    """
    before = {key: value for key, value in os.environ.items() if key not in TASK and key not in variables}
    before |= {key: value for key, value in variables.items() if value is not None}
    before["PYTHONPATH"] = path
    started: list[subprocess.Popen[bytes]] = []
    with _passing_on(started) as asked:
        process = begin(Path(board), name, environment(share, None, threads, before, allotted()), cwd)
        started.append(process)
        if asked:
            process.terminate()
        try:
            while (code := process.poll()) is None:
                time.sleep(LOOK)
            return code
        finally:
            if process.poll() is None:
                end(process)


def allotted() -> int | None:
    """CPU cores that SLURM gave to this job; None outside of SLURM."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name]) or None
    return None


@contextlib.contextmanager
def _passing_on(to: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass signals on to processes, unseen by the cluster's own code; yields those that came."""
    asked: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        for process in to:
            process.send_signal(signal.SIGTERM)

    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            before[number] = signal.signal(number, pass_on)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
