"""Workers as jobs of submitit on this machine, and what they share with SLURM's. Imported when a sweep starts."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.sweeps.board import Board
from filtrun.sweeps.jobs import Job
from filtrun.sweeps.launcher import End
from filtrun.sweeps.launcher_options import LocalOptions, minutes
from filtrun.sweeps.memory import devices_for
from filtrun.sweeps.mind import mind
from filtrun.sweeps.processes import importable, read

FOLDER = "jobs"
"""Where submitit keeps its files, below the board."""

NO_LIMIT = "3650-0"

RETRIES, RETRY = 3, 20.0
"""Submissions of later jobs before the sweep gives up, and seconds between them."""


class Submitted:
    """A worker that is a job of submitit."""

    def __init__(self, job: Any, log: Path) -> None:
        self.job, self.log = job, log

    def poll(self) -> End | None:
        """The worker's exit code when the job has brought it back, else what became of the job."""
        if not self.job.done():
            return None
        if not self.job.paths.result_pickle.exists():
            return End(1, "its job ended without a result")
        return self.result()

    def result(self) -> End:
        """What the job brought back."""
        error = self.job.exception()
        if error is not None:
            lines = [line for line in str(error).splitlines() if line.strip(" -") and "full logs" not in line]
            return End(1, f"its job failed: {lines[-1].strip() if lines else error}")
        return End(int(self.job.result()))

    def told(self) -> str:
        """What the worker printed, else what its job did."""
        return read(self.log) or read(self.job.paths.stderr)


class Submitit:
    """What both have in common."""

    name = ""
    detached = False
    sure = True
    executor: Any

    def ready(self, board: Board, jobs: Sequence[Job]) -> None:
        self.board = board.folder
        self.cell_threads = jobs[0].config.get("threads")
        self.begun = False

    def submit(self, calls: Sequence[Any]) -> list[Any]:
        """Jobs for calls. Raises UserError with what the cluster says of them."""
        for attempt in range(RETRIES):
            try:
                with _ctrl_c_is_not_theirs():
                    jobs = self.executor.submit_array(calls)
                self.begun = True
                return list(jobs)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                if not self.begun or attempt == RETRIES - 1:
                    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                    told = next((line for line in lines if "error:" in line), lines[-1] if lines else repr(error))
                    raise UserError(f"hydra/launcher={self.name} could not submit: {told}") from error
                time.sleep(RETRY)
        raise AssertionError

    def call(self, name: str, variables: Mapping[str, str | None], share: int, threads: int | None) -> Any:
        return functools.partial(mind, str(self.board), name, os.getcwd(), importable(), variables, share, threads)

    def close(self) -> None:
        """Nothing is kept."""


class Local(Submitit):
    """``submitit_local``."""

    name = "submitit_local"

    def __init__(self, options: LocalOptions) -> None:
        self.options = options

    def open(self, board: Board, jobs: Sequence[Job], workers: int) -> int:
        """Choose the devices."""
        self.ready(board, jobs)
        self.devices = devices_for(jobs, workers)
        self.executor = import_submitit(self.name).LocalExecutor(board.folder / FOLDER)
        self.executor.update_parameters(
            timeout_min=minutes(self.options.time or NO_LIMIT), signal_delay_s=self.options.grace,
            setup=self.options.setup,
        )  # fmt: skip
        return len(self.devices)

    def start(self, places: Mapping[str, int]) -> dict[str, Submitted]:
        """Submit jobs."""
        variables = {
            name: {"CUDA_VISIBLE_DEVICES": self.devices[place] or os.environ.get("CUDA_VISIBLE_DEVICES")}
            for name, place in places.items()
        }
        calls = [self.call(name, variables[name], len(self.devices), self.cell_threads) for name in places]
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = importable()  # the jobs' own processes are started with this environment
        try:
            jobs = self.submit(calls)
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        return {n: Submitted(job, self.board / f"worker-{n}.log") for n, job in zip(places, jobs, strict=True)}

    def stop(self, workers: Collection[Any]) -> None:
        """The board tells them."""

    def kill(self, workers: Collection[Any]) -> None:
        """End the jobs; their workers end with them."""
        for worker in workers:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(worker.job.job_id), signal.SIGTERM)


@contextlib.contextmanager
def _ctrl_c_is_not_theirs() -> Iterator[None]:
    """Processes started meanwhile do not hear Ctrl-C on this terminal: this process tells them to stop."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def import_submitit(name: str) -> Any:
    """The library. Raises UserError when it is not installed."""
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "CRITICAL")
    try:
        import submitit
    except ImportError as error:
        raise UserError(f"hydra/launcher={name} needs submitit: pip install 'filtrun[slurm]'") from error
    return submitit
