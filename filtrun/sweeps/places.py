"""How workers share a machine: threads, and which GPU each sees. Neither torch nor a driver is needed to decide."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
CONTEXT = 600 * 2**20
"""Bytes a process takes on a GPU beside its tensors."""

USED = 0.9
"""Share of a GPU's memory that cells may plan with."""


@dataclass(frozen=True)
class Device:
    """A GPU: its name for ``CUDA_VISIBLE_DEVICES`` and its bytes."""

    name: str
    memory: int


def gpus(environment: Mapping[str, str] = os.environ) -> list[Device]:
    """The GPUs this process may use, asked of ``nvidia-smi``."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return visible(told, environment.get("CUDA_VISIBLE_DEVICES"))


def visible(told: str, allowed: str | None) -> list[Device]:
    """The devices in what ``nvidia-smi`` printed that ``CUDA_VISIBLE_DEVICES`` lets through, in its order."""
    found = {}
    for line in told.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 3 and words[2].isdigit():
            found[words[0]] = found[words[1]] = Device(words[0], int(words[2]) * 2**20)
    if allowed is None:
        return list(dict.fromkeys(found.values()))
    return [found[name.strip()] for name in allowed.split(",") if name.strip() in found]


def on_devices(workers: int, devices: Sequence[Device], peak: int | None) -> list[str]:
    """The device of each worker, spread evenly; fewer workers than asked for where the memory does not reach.

    Args:
        workers: how many are wanted.
        peak: the most bytes one of the cells took in earlier runs; None: not known, then one a device.
    """
    places = []
    for turn in range(workers):
        for device in devices:
            fits = 1 if peak is None else max(1, int(USED * device.memory) // (peak + CONTEXT))
            if turn < fits:
                places.append(device.name)
    return places[:workers]


def threads_each(workers: int, cores: int | None = None) -> int:
    """CPU threads for each of `workers`, so that together they have as many as there are cores."""
    there = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return max(1, there // max(workers, 1))


def environment(
    workers: int, device: str | None, threads: int | None, before: Mapping[str, str], cores: int | None = None
) -> dict[str, str]:
    """The variables of a worker. A number of threads that is set already is kept if it is smaller."""
    wanted = threads or threads_each(workers, cores)
    limits = {}
    for name in THREADS:
        given = before.get(name, "")
        limits[name] = given if given.isdigit() and 0 < int(given) < wanted and threads is None else str(wanted)
    return {**before, **limits, **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}
