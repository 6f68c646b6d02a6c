"""Start workers for a sweep and keep them going: one that dies takes its cell with it, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from filtrun.errors import RunFailure
from filtrun.record import FILE, Record
from filtrun.sweep import Job, Outcome
from filtrun.sweeps.board import FOLDER, Board
from filtrun.sweeps.claims import claim_path, holder, release, seize
from filtrun.sweeps.places import environment, gpus, on_devices

LOOK = 0.05
"""Seconds between two looks at the board."""

STOPPED = 130
"""Exit code of a worker that was stopped and has said so in the record: its cell is begun again."""

STILLBORN = 3
"""Workers that may die in a row without having begun a cell."""


class Pool:
    """Worker processes on this machine for one sweep."""

    def __init__(self, jobs: Sequence[Job], workers: int) -> None:
        self.jobs = list(jobs)
        root = self.jobs[0].folder.parent
        self.sweep = f"{os.getpid()}-{secrets.token_hex(6)}"
        self.board = Board.make(root.absolute() / FOLDER / self.sweep, self.jobs)
        count = min(workers, len(self.jobs))
        self.places: list[str | None] = [None] * count
        if all(job.config.get("device") in ("auto", "cuda") for job in self.jobs) and (found := gpus()):
            if all((job.config.get("trainer") or {}).get("devices", 1) == 1 for job in self.jobs):
                self.places = list(on_devices(count, found, earlier_peak(self.jobs)))
        self.running: dict[str, tuple[subprocess.Popen[bytes], int, IO[bytes]]] = {}
        self.began, self.stillborn = 0, 0
        self.outcomes: dict[int, Outcome] = {}

    def run(
        self, starts: Callable[[int, Job], None], ended: Callable[[int, Outcome], None], fail_fast: bool
    ) -> list[Outcome]:
        """Until every cell has ended, or with `fail_fast` one has failed."""
        shown: set[int] = set()
        try:
            while True:
                self._bury()
                for number, how in self.board.news(set(self.outcomes)):
                    job = self.jobs[number]
                    record = None if how["error"] else _read(job.folder)
                    self.outcomes[number] = Outcome(job, record, how["error"], how["seconds"], how["cached"])
                    ended(len(self.outcomes), self.outcomes[number])
                    if fail_fast and how["error"]:
                        return list(self.outcomes.values())
                if len(self.outcomes) == len(self.jobs):
                    return list(self.outcomes.values())
                self._hire()
                for name in self.running:
                    number_at = self.board.at(name)
                    if number_at is not None and number_at not in shown:
                        shown.add(number_at)
                        starts(len(self.outcomes), self.jobs[number_at])
                time.sleep(LOOK)
        finally:
            self.close()

    def _hire(self) -> None:
        """Start workers in the free places, as long as there are cells for them."""
        taken = {place for _, place, _ in self.running.values()}
        wanted = min(len(self.places), len(self.jobs) - len(self.outcomes))
        for place in range(len(self.places)):
            if place in taken or len(self.running) >= wanted:
                continue
            self.began += 1
            name = f"{self.began}"
            threads = self.jobs[0].config.get("threads")
            variables = environment(len(self.places), self.places[place], threads, os.environ)
            variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # what this process can import
            log = (self.board.folder / f"worker-{name}.log").open("wb")
            process = subprocess.Popen(
                [sys.executable, "-m", "filtrun.sweeps.worker", str(self.board.folder), name],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables, start_new_session=True,
            )  # fmt: skip
            self.running[name] = (process, place, log)

    def _bury(self) -> None:
        """Note the cells that dead workers were at as failed."""
        for name, (process, _, log) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            log.close()
            number = self.board.at(name)
            if number is None:
                self.stillborn = 0 if code == 0 else self.stillborn + 1
                if self.stillborn >= STILLBORN:
                    told = (self.board.folder / f"worker-{name}.log").read_text(errors="replace").strip().splitlines()
                    raise RunFailure(f"workers end before they begin: {told[-1] if told else _how(code)}")
                continue
            self.stillborn = 0
            if code not in (0, STOPPED) and not self.board.ended(number):
                self._failed(number, process.pid, f"worker died: {_how(code)}")

    def _failed(self, number: int, pid: int, error: str) -> None:
        """Note a cell as failed, unless another sweep has taken it over: then how it ends there counts."""
        job = self.jobs[number]
        path = claim_path(job.folder)
        dead = holder(path)
        if dead is not None and (dead.sweep, dead.pid) != (self.sweep, pid):
            return
        mine = dead and seize(job.folder, dead, self.sweep)
        if dead is not None and mine is None:
            return
        try:
            error = mark_failed(job, error)
        finally:
            if mine is not None:
                release(path, mine)
        self.board.end(number, error=error, seconds=0.0, cached=False)

    def close(self) -> None:
        """Stop the workers, which note what they were at as interrupted, and take the board away."""
        for process, _, _ in self.running.values():
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        for process, _, log in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
        self.running.clear()
        self.board.remove()


def mark_failed(job: Job, error: str) -> str:
    """Write into a cell's record that it failed, and return why; empty when it had finished all the same."""
    path = job.folder / FILE
    if path.exists():
        record = Record.read(job.folder)
        if record.status == "finished":
            return ""
    else:
        job.folder.mkdir(parents=True, exist_ok=True)
        config = job.config
        record = Record(job.folder, overrides=list(job.overrides), config=config, seed=config["seed"])
        record.data, record.task = job.choices.get("data", ""), job.choices.get("task", "")
        record.model, record.methods = job.choices.get("model", ""), list(config.get("method") or {})
    record.status, record.error = "failed", error
    record.write()
    return error


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


def _read(folder: Path) -> Record:
    """The record a worker has just checked and written."""
    return Record(folder=folder, **json.loads((folder / FILE).read_text(encoding="utf-8")))


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"
