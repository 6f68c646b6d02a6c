"""Workers as processes of this machine, and the processes that every launcher's workers are in the end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.sweeps.board import Board
from filtrun.sweeps.jobs import Job
from filtrun.sweeps.launcher import End
from filtrun.sweeps.memory import devices_for
from filtrun.sweeps.places import environment

PATIENCE = 30.0
"""Seconds a worker has to end after it was asked to."""


def begin(board: Path, name: str, variables: Mapping[str, str], cwd: str | None = None) -> subprocess.Popen[bytes]:
    """Start a worker, which ends when its standard input does; what it prints goes to a file on the board."""
    with (board / f"worker-{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "filtrun.sweeps.worker", str(board), name],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables, cwd=cwd, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """See to it that a worker ends."""
    close_input(process)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def close_input(process: subprocess.Popen[bytes]) -> None:
    """Ask a worker to end."""
    with contextlib.suppress(OSError):
        process.stdin.close()  # type: ignore[union-attr]


def importable() -> str:
    """A ``PYTHONPATH`` by which another process can import what this one can."""
    return os.pathsep.join(path for path in sys.path if path)


class Process:
    """A worker that is a child of this process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def poll(self) -> End | None:
        """Its exit code."""
        code = self.process.poll()
        return None if code is None else End(code)

    def told(self) -> str:
        """What it printed."""
        return read(self.log)


class Processes:
    """The launcher of this machine: a process for each worker, which ends with this one."""

    detached = False
    sure = True

    def open(self, board: Board, jobs: Sequence[Job], workers: int) -> int:
        """Choose the devices."""
        self.board, self.threads = board.folder, jobs[0].config.get("threads")
        self.devices = devices_for(jobs, workers)
        return len(self.devices)

    def start(self, places: Mapping[str, int]) -> dict[str, Process]:
        """Start processes."""
        started = {}
        for name, place in places.items():
            variables = environment(len(self.devices), self.devices[place], self.threads, os.environ)
            variables["PYTHONPATH"] = importable()
            started[name] = Process(begin(self.board, name, variables), self.board / f"worker-{name}.log")
        return started

    def stop(self, workers: Collection[Any]) -> None:
        """Close their standard input."""
        for worker in workers:
            close_input(worker.process)

    def kill(self, workers: Collection[Any]) -> None:
        """End them, and wait until they are gone."""
        for worker in workers:
            worker.process.kill()
            worker.process.wait()

    def close(self) -> None:
        """Nothing is kept."""


def read(path: Path) -> str:
    """A log's text; empty when there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
