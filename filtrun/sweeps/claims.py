"""Claims on the cells of a sweep: on one shared folder no two processes, on any machines, run the same cell at once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HEARTBEAT = 5.0
"""Seconds between two signs of life of a claim's holder."""

STALE = 60.0
"""Seconds without a sign of life after which a claim may be taken over."""

FOLDER = ".claims"


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: `started` tells a process from a later one with its number, `sweep` the sweep it works for."""

    host: str
    pid: int
    started: str
    token: str
    sweep: str = ""


@functools.cache
def host() -> str:
    """A name for this machine since its start, and for the container: process numbers mean something within it."""
    boot = pids = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {pids}".strip()


def started(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; empty when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:  # no /proc here: only whether it lives
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"


def me(sweep: str = "") -> Holder:
    """This process."""
    return Holder(host(), os.getpid(), started(os.getpid()), secrets.token_hex(8), sweep)


def claim_path(folder: Path) -> Path:
    """The file that says who is at the cell in `folder`."""
    return folder.parent / FOLDER / folder.name


def holder(path: Path) -> Holder | None:
    """Who holds the claim `path`; None when nobody does."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return Holder("", 0, "", "unreadable")


@contextlib.contextmanager
def claimed(folder: Path, sweep: str = "") -> Iterator[bool]:
    """Hold the claim on a cell while the block runs; False when it is in other hands.

    Args:
        folder: the cell's.
        sweep: the sweep this process works for. A claim of a dead process of the same sweep is left to its parent.
    """
    path = claim_path(folder)
    mine = me(sweep)
    if not _take(path, mine, sweep):
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, mine, done), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        release(path, mine)


def seize(folder: Path, dead: Holder, sweep: str) -> Holder | None:
    """Take a claim over from a process known to be dead; None when it is no longer its."""
    path = claim_path(folder)
    mine = me(sweep)
    work = _written(path, mine)
    try:
        return mine if _replace(path, dead, work) else None
    finally:
        work.unlink(missing_ok=True)


def release(path: Path, mine: Holder) -> None:
    """Give a claim back, if it is still ours."""
    if holder(path) == mine:
        with contextlib.suppress(OSError):
            path.unlink()


def _take(path: Path, mine: Holder, sweep: str) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = _written(path, mine)
    try:
        try:
            os.link(work, path)  # with its content from the first moment on, or not at all
            return True
        except FileExistsError:
            pass
        other = holder(path)
        if other is None:
            return False  # given back this moment: the next look will get it
        return _is_stale(path, other, work, sweep) and _replace(path, other, work)
    finally:
        work.unlink(missing_ok=True)


def _written(path: Path, mine: Holder) -> Path:
    work = path.with_name(f".{path.name}.{mine.token}")
    work.write_text(json.dumps(asdict(mine)), encoding="utf-8")
    return work


def _is_stale(path: Path, other: Holder, fresh: Path, sweep: str) -> bool:
    if other.host == host():
        dead = started(other.pid) != other.started
        return dead and not (sweep and other.sweep == sweep)
    try:  # both times are those of the file system's clock, not of two machines'
        return fresh.stat().st_mtime - path.stat().st_mtime > STALE
    except OSError:
        return False


def _replace(path: Path, other: Holder, work: Path) -> bool:
    """Put `work` in the place of the claim of `other`: of several who try, the one who makes the marker does."""
    marker = path.with_name(f".{path.name}.{other.token}.over")
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        with contextlib.suppress(OSError):
            if work.stat().st_mtime - marker.stat().st_mtime > STALE:  # whoever made it died before it was done
                marker.unlink()
        return False
    try:
        if holder(path) != other:
            return False
        os.replace(work, path)
        return True
    finally:
        with contextlib.suppress(OSError):
            marker.unlink()


def _beat(path: Path, mine: Holder, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT):
        if holder(path) != mine:
            return  # taken over while this machine slept; the lock in the cell's folder keeps the other one waiting
        with contextlib.suppress(OSError):
            os.utime(path)
