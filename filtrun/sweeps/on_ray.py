"""Workers as tasks of Ray, each of which starts a process: one that dies hard does not take Ray along."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.sweeps.board import Board
from filtrun.sweeps.jobs import Job
from filtrun.sweeps.launcher import STOPPED, End
from filtrun.sweeps.launcher_options import RayOptions
from filtrun.sweeps.memory import wants_gpu
from filtrun.sweeps.mind import mind
from filtrun.sweeps.processes import importable, read

STORE = 100 * 2**20
"""Bytes of Ray's object store in a cluster of our own; what cells make goes to files."""

PATIENCE = 10.0
"""Seconds to wait for an answer from a cluster's address."""

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Task:
    """A worker that is a task of Ray."""

    def __init__(self, ray: Any, task: Any, log: Path) -> None:
        self.ray, self.task, self.log = ray, task, log

    def poll(self) -> End | None:
        """Its exit code, or what Ray says of the task."""
        ready, _ = self.ray.wait([self.task], timeout=0)
        if not ready:
            return None
        errors = self.ray.exceptions
        try:
            return End(int(self.ray.get(self.task)))
        except errors.TaskCancelledError:
            return End(STOPPED, "its task was cancelled", freed=True)
        except errors.OutOfMemoryError:
            return End(1, "its node was out of memory")
        except (errors.NodeDiedError, errors.ObjectLostError, errors.RaySystemError) as error:
            return End(1, f"its node was lost ({type(error).__name__})", freed=True)
        except errors.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return End(1, f"its task failed: {lines[-1] if lines else type(error).__name__}")

    def told(self) -> str:
        """What the worker printed."""
        return read(self.log)


class Ray:
    """``ray``."""

    detached = False
    sure = True

    def __init__(self, options: RayOptions) -> None:
        self.options = options

    def open(self, board: Board, jobs: Sequence[Job], workers: int) -> int:
        """Start or find the cluster. Raises UserError when it is not there, or has no place for a worker."""
        ray = self.ray = import_ray()
        self.board, self.threads = board.folder, jobs[0].config.get("threads")
        asked = self.options
        self.ours = not ray.is_initialized()
        self.on_sigterm = signal.getsignal(signal.SIGTERM)
        if self.ours:
            check_address(asked.address)
            local: dict[str, Any] = {} if asked.address else {"include_dashboard": False, "object_store_memory": STORE}
            try:
                ray.init(
                    address=asked.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local
                )  # fmt: skip
            except (ConnectionError, ValueError, RuntimeError) as error:
                told = str(error).strip().splitlines() or [type(error).__name__]
                where = f"hydra.launcher.address={asked.address}" if asked.address else "hydra/launcher=ray"
                raise UserError(f"{where}: Ray cannot be reached: {told[0]}") from error
        try:
            self.needs = self._needs(jobs)
        except BaseException:
            self.close()
            raise
        return workers

    def _needs(self, jobs: Sequence[Job]) -> dict[str, Any]:
        asked, there = self.options, self.ray.cluster_resources()
        gpus = asked.num_gpus
        if gpus is None:
            several = max(int((job.config.get("trainer") or {}).get("devices", 1)) for job in jobs)
            gpus = several if wants_gpu(jobs) and there.get("GPU", 0) else 0
        if gpus > 1 and gpus != int(gpus):
            raise UserError(f"hydra.launcher.num_gpus={gpus} must be a whole number, or less than 1")
        for key, wanted, name in (
            ("num_cpus", asked.num_cpus, "CPU"),
            ("num_gpus", gpus, "GPU"),
            *((f"resources.{name}", wanted, name) for name, wanted in asked.resources.items()),
        ):
            if not asked.address and wanted > there.get(name, 0):
                raise UserError(f"hydra.launcher.{key}={wanted:g}: Ray has {there.get(name, 0):g} on this machine")
        return {"num_cpus": asked.num_cpus, "num_gpus": gpus, "resources": asked.resources or None}

    def start(self, places: Mapping[str, int]) -> dict[str, Task]:
        """Begin tasks; they wait until the cluster has a place."""
        threads = self.threads or max(1, int(self.options.num_cpus))
        hidden: dict[str, str | None] = {} if self.needs["num_gpus"] else {"CUDA_VISIBLE_DEVICES": ""}
        remote = self.ray.remote(mind).options(max_retries=0, **self.needs)
        found = {}
        for name in places:
            task = remote.remote(str(self.board), name, os.getcwd(), importable(), hidden, 1, threads)
            found[name] = Task(self.ray, task, self.board / f"worker-{name}.log")
        return found

    def stop(self, workers: Collection[Any]) -> None:
        """Cancel tasks: a worker that runs is told, and has half a minute."""
        for worker in workers:
            self.ray.cancel(worker.task)

    def kill(self, workers: Collection[Any]) -> None:
        """End tasks; their workers end with them."""
        for worker in workers:
            self.ray.cancel(worker.task, force=True)

    def close(self) -> None:
        """Leave the cluster, and end it when it is ours."""
        if self.ours:
            self.ray.shutdown()
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, self.on_sigterm)  # Ray sets a handler of its own


def check_address(address: str | None) -> None:
    """Raise UserError when nobody listens at HOST:PORT: Ray would go on trying for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise UserError(f"hydra.launcher.address={address}: nobody answers there: {error.strerror or error}") from error


def import_ray() -> Any:
    """The library. Raises UserError when it is not installed."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        import ray
    except ImportError as error:
        raise UserError("hydra/launcher=ray needs Ray: pip install 'filtrun[ray]'") from error
    return ray
