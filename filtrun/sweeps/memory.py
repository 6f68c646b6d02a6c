"""Which GPU each worker of a sweep gets, by the memory that cells like its own took before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filtrun.record import FILE
from filtrun.sweeps.jobs import Job
from filtrun.sweeps.places import gpus, on_devices


def devices_for(jobs: Sequence[Job], workers: int) -> list[str | None]:
    """The device of each worker on this machine, None for one that has no say; fewer than asked for if memory is short.

    Cells that are told a device, or want several, choose by themselves.
    """
    if wants_gpu(jobs) and (found := gpus()):
        if all((job.config.get("trainer") or {}).get("devices", 1) == 1 for job in jobs):
            return list(on_devices(workers, found, earlier_peak(jobs)))
    return [None] * workers


def wants_gpu(jobs: Sequence[Job]) -> bool:
    """Whether the cells use a GPU where there is one."""
    return all(job.config.get("device") in ("auto", "cuda") for job in jobs)


def earlier_peak(jobs: Sequence[Job]) -> int | None:
    """The most GPU bytes one of the cells' kinds took before; None when one of them is not known."""
    wanted = {_kind(job.config) for job in jobs}
    found: dict[str, int] = {}
    for values in _records(jobs[0].folder.parent):
        bytes_ = (values.get("cost") or {}).get("peak_memory_bytes")
        if bytes_ and "cuda" in str((values.get("environment") or {}).get("device")):
            kind = _kind(values.get("config") or {})
            found[kind] = max(found.get(kind, 0), int(bytes_))
    return max(found[kind] for kind in wanted) if wanted <= set(found) else None


def _kind(config: dict[str, Any]) -> str:
    """What the memory of a cell depends on: everything but its seeds and how long it trains."""
    from filtrun.cells import content

    kept = {k: v for k, v in content(config).items() if k not in ("seed", "split_seed", "pretrain")}
    trainer = kept.get("trainer")
    if isinstance(trainer, dict):
        kept["trainer"] = {k: v for k, v in trainer.items() if k not in ("lr", "steps", "epochs")}
    return json.dumps(kept, sort_keys=True, default=str)


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for path in folder.glob(f"*/{FILE}"):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads(path.read_text(encoding="utf-8"))
