"""The options of each launcher; what they mean is also in ``conf/hydra/launcher``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from filtrun.errors import UserError
from filtrun.options import opt

_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<rest>\d+(?::\d+){0,2})|(?P<plain>\d+(?::\d+){0,2}))")
_TIME_HELP = "minutes a job may take, or D-HH:MM:SS; then another goes on from the checkpoint"


def minutes(text: str) -> int:
    """SLURM's ways to write a time, in whole minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises UserError for anything else, and for no time at all.
    """
    found = _TIME.fullmatch(text.strip())
    seconds = 0
    if found and found["days"] is not None:
        hours, minute, second = [*(int(part) for part in found["rest"].split(":")), 0, 0][:3]
        seconds = ((int(found["days"]) * 24 + hours) * 60 + minute) * 60 + second
    elif found:
        parts = [int(part) for part in found["plain"].split(":")]
        hours, minute, second = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        seconds = (hours * 60 + minute) * 60 + second
    if not seconds:
        raise UserError(f"hydra.launcher.time={text} must be minutes or D-HH:MM:SS, such as 90, 4:00:00 or 1-12:00:00")
    return math.ceil(seconds / 60)


def check_time(time: str | None, grace: int) -> None:
    """Raise UserError when a job would be told to stop as soon as it has begun."""
    if time is not None and 60 * minutes(time) <= grace:
        raise UserError(f"hydra.launcher.grace={grace} seconds must be less than hydra.launcher.time={time}")


@dataclass
class LocalOptions:
    """``submitit_local``."""

    time: str | None = opt(None, _TIME_HELP)
    grace: int = opt(30, "seconds before the end at which a job is told to stop", low=1)
    setup: list[str] = opt([], "lines of shell before the worker")

    def __post_init__(self) -> None:
        check_time(self.time, self.grace)


@dataclass
class SlurmOptions:
    """``submitit_slurm``."""

    partition: str | None = opt(None, "partition")
    account: str | None = opt(None, "account")
    qos: str | None = opt(None, "quality of service")
    time: str = opt("60", _TIME_HELP)
    grace: int = opt(120, "seconds before the end at which a job is told to stop", low=1)
    gpus_per_node: int | None = opt(None, "GPUs of each worker", low=0)
    gres: str | None = opt(None, "generic resources, such as gpu:a100:1")
    cpus_per_task: int | None = opt(None, "CPU cores of each worker", low=1)
    mem: str | None = opt(None, "memory, such as 16GB")
    constraint: str | None = opt(None, "features of the nodes")
    nodelist: str | None = opt(None, "nodes to run on")
    exclude: str | None = opt(None, "nodes not to run on")
    setup: list[str] = opt([], "lines of shell before the worker")
    srun_args: list[str] = opt([], "of the srun that starts the worker")
    use_srun: bool = opt(True, "false: the worker runs in the batch script itself")
    additional_parameters: dict[str, Any] = opt({}, "any option of sbatch")
    detached: bool = opt(True, "jobs go on when the command that started them is gone")
    job_name: str = opt("filtrun", "name of the jobs")

    def __post_init__(self) -> None:
        check_time(self.time, self.grace)


@dataclass
class RayOptions:
    """``ray``."""

    address: str | None = opt(None, "of a cluster that runs; null: start one on this machine")
    num_cpus: float = opt(1.0, "CPU cores of each worker", low=0)
    num_gpus: float | None = opt(None, "GPUs of each worker, fractions allowed", low=0)
    resources: dict[str, float] = opt({}, "custom resources of each worker")
