"""Workers as jobs of SLURM, through submitit."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.sweeps.board import Board
from filtrun.sweeps.jobs import Job
from filtrun.sweeps.launcher import STOPPED, End
from filtrun.sweeps.launcher_options import SlurmOptions, minutes
from filtrun.sweeps.on_submitit import FOLDER, Submitit, Submitted, import_submitit
from filtrun.sweeps.processes import importable

CHECK, ASK = 1.0, 20.0
"""Seconds between two looks for a job's result, and between two calls of ``sacct`` for all jobs together."""

PATIENCE = 60.0
"""Seconds for a job's state, or its result, to follow the other."""

FREED = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "DEADLINE", "REVOKED")
"""States a cell is not to blame for: it is begun again."""

GOING = (
    "UNKNOWN", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "READY",
)  # fmt: skip
"""States after which others come."""


class OnSlurm(Submitted):
    """A worker that is a job of SLURM. `states` tells of all jobs, as far as it was asked."""

    def __init__(self, job: Any, log: Path, states: Callable[[], Mapping[str, str]]) -> None:
        super().__init__(job, log)
        self.states = states
        self.next = 0.0
        self.since: float | None = None

    def poll(self) -> End | None:
        """How it ended; a job that somebody cancelled is not replaced."""
        now = time.monotonic()
        if now < self.next:
            return None
        self.next = now + CHECK
        with contextlib.suppress(OSError):  # makes a network file system look again
            os.utime(self.job.paths.folder)
        state, brought = self.states().get(self.job.job_id, "UNKNOWN"), self.job.paths.result_pickle.exists()
        if state in GOING and not brought:
            return None
        found = self.result() if brought else None
        if found is not None and found.code != STOPPED:
            return found
        self.since = now if self.since is None else self.since
        if now - self.since < PATIENCE and (state in GOING or (state == "COMPLETED" and not brought)):
            return None
        if state == "CANCELLED":
            return End(STOPPED, "its job was cancelled", freed=True, last=True)
        if found is not None:
            return found
        if state in FREED:
            return End(1, f"its job ended as {state}", freed=True)
        more = "; raise hydra.launcher.mem" if state == "OUT_OF_MEMORY" else ""
        return End(1, f"its job ended as {state}{more}")


class Slurm(Submitit):
    """``submitit_slurm``."""

    name = "submitit_slurm"
    sure = False

    def __init__(self, options: SlurmOptions) -> None:
        self.options, self.detached = options, options.detached

    def open(self, board: Board, jobs: Sequence[Job], workers: int) -> int:
        """Put the options together for ``sbatch``."""
        if "%" in str(board.folder):
            raise UserError(f"{board.folder}: SLURM gives % in paths a meaning of its own; choose another folder")
        self.ready(board, jobs)
        submitit = import_submitit(self.name)
        try:
            self.executor = submitit.AutoExecutor(board.folder / FOLDER, cluster="slurm")
        except RuntimeError as error:
            raise UserError(f"hydra/launcher={self.name}: there is no SLURM here (no srun on the PATH)") from error
        asked = self.options
        more = dict(asked.additional_parameters)
        if not more.get("requeue"):
            more = {"no-requeue": True, **more}  # a job that is gone is replaced from here
        named = ("partition", "account", "qos", "gres", "mem", "constraint", "nodelist", "exclude", "job_name")
        self.executor.update_parameters(
            timeout_min=minutes(asked.time),
            gpus_per_node=asked.gpus_per_node,
            cpus_per_task=asked.cpus_per_task,
            slurm_signal_delay_s=asked.grace,
            slurm_array_parallelism=workers,
            slurm_setup=[f"export PYTHONPATH={shlex.quote(importable())}", *asked.setup],
            slurm_srun_args=asked.srun_args,
            slurm_use_srun=asked.use_srun,
            slurm_additional_parameters={k: v for k, v in more.items() if v is not False},
            **{f"slurm_{name}": getattr(asked, name) for name in named},
        )
        self.bases: set[str] = set()
        self.known: dict[str, str] = {}
        self.asked, self.ask = float("-inf"), ASK
        self.read: Callable[[str], Any] = submitit.SlurmJob.watcher.read_info
        return workers

    def start(self, places: Mapping[str, int]) -> dict[str, OnSlurm]:
        """Submit an array of jobs."""
        jobs = self.submit([self.call(name, {}, 1, self.cell_threads) for name in places])
        self.bases |= {job.job_id.partition("_")[0] for job in jobs}
        found = zip(places, jobs, strict=True)
        return {n: OnSlurm(job, self.board / f"worker-{n}.log", self.states) for n, job in found}

    def states(self) -> dict[str, str]:
        """The states of all jobs by their numbers, the first word of each: CANCELLED of ``CANCELLED by 1000``.

        ``sacct`` is asked from time to time; where there is none, or no answer, nothing is known.
        """
        if time.monotonic() - self.asked > self.ask:
            self.asked = time.monotonic()
            command = ["sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", ",".join(sorted(self.bases))]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
                for number, stats in self.read(told).items():
                    words = stats["State"].upper().replace("+", " ").split()
                    self.known[number] = words[0] if words else "UNKNOWN"
        return self.known

    def stop(self, workers: Collection[Any]) -> None:
        """Cancel the jobs: those that run are told, and have half a minute."""
        self.ask = CHECK
        ids = [worker.job.job_id for worker in workers]
        if ids:
            with contextlib.suppress(OSError):
                subprocess.run(["scancel", *ids], capture_output=True, check=False)

    def kill(self, workers: Collection[Any]) -> None:
        """Cancel the jobs, once more."""
        self.stop(workers)
