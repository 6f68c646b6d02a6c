"""How a search follows a cell that runs in another process: the cell asks after each evaluation, the search answers.

Plain files in ``.watch`` beside the cells' folders: ``NAME.by`` says who watches, ``NAME.asks`` holds what the cell has
measured, ``NAME.answer`` the word on it. A cell that nobody watches, or whose watcher is gone, goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filtrun.stopping import stop_asked
from filtrun.sweeps.claims import host, started

FOLDER = ".watch"
LOOK = 0.02
"""Seconds between two looks for an answer."""


def watch(folder: Path) -> None:
    """Say that this process watches the cell in `folder`; what an earlier watcher left is forgotten."""
    _path(folder, "by").parent.mkdir(parents=True, exist_ok=True)
    for what in ("asks", "answer"):
        _path(folder, what).unlink(missing_ok=True)
    _write(_path(folder, "by"), {"host": host(), "pid": os.getpid(), "started": started(os.getpid())})


def unwatch(folder: Path) -> None:
    """Watch the cell no longer."""
    for what in ("by", "asks", "answer"):
        _path(folder, what).unlink(missing_ok=True)


def asked(folder: Path) -> tuple[int, dict[str, float]] | None:
    """The evaluation (number from 1, metrics) that the cell waits with for an answer; None when it waits for none."""
    found, answered = _read(_path(folder, "asks")), _read(_path(folder, "answer"))
    if not found or (answered and answered.get("rung") == found["rung"]):
        return None
    return found["rung"], found["values"]


def answer(folder: Path, rung: int, go_on: bool) -> None:
    """Let the cell go on, or end."""
    _write(_path(folder, "answer"), {"rung": rung, "go_on": go_on})


def may_go_on(folder: Path, rung: int, values: Mapping[str, float]) -> bool:
    """The cell's side: tell what was measured and wait for the word of whoever watches; True when nobody does."""
    if not _watched(folder):
        return True
    _write(_path(folder, "asks"), {"rung": rung, "values": dict(values)})
    while _watched(folder) and not stop_asked():  # the training ends at its own place, after a checkpoint
        found = _read(_path(folder, "answer"))
        if found and found.get("rung") == rung:
            return bool(found["go_on"])
        time.sleep(LOOK)
    return True


def _watched(folder: Path) -> bool:
    found = _read(_path(folder, "by"))
    if not found:
        return False
    return bool(found["host"] == host() and started(found["pid"]) == found["started"])


def _path(folder: Path, what: str) -> Path:
    return folder.parent / FOLDER / f"{folder.name}.{what}"


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def _write(path: Path, value: Any) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(json.dumps(value), encoding="utf-8")
    os.replace(work, path)
