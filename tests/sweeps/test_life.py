"""Boards of sweeps that nobody is at are removed at the next one's start; a live one's never is. Who must end, ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from filtrun.sweeps import life
from filtrun.sweeps.board import PARENT, Board
from filtrun.sweeps.claims import STALE, Holder, me
from filtrun.sweeps.life import FORGOTTEN, FORGOTTEN_DETACHED, LOST, Life, remove_abandoned


def gone() -> Holder:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(me(), pid=process.pid, started="1")


DEAD, LIVES, ELSEWHERE = gone(), me(), replace(me(), host="elsewhere", pid=1)


def board(root: Path, name: str, parent: Holder, *, detached: bool = False, silent: float = 0.0,
          worker: Holder | None = None, heard: float = 0.0) -> Path:  # fmt: skip
    made = Board.make(root / name, [])
    (made.folder / PARENT).write_text(json.dumps({**asdict(parent), "detached": detached}))
    for path in [made.folder, *made.folder.glob("*.json")]:
        aged(path, silent)
    if worker is not None:
        (made.folder / "alive" / "1").write_text(json.dumps(asdict(worker)))
        aged(made.folder / "alive" / "1", heard)
    return made.folder


def aged(path: Path, seconds: float) -> None:
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


@pytest.mark.parametrize(
    ("kept", "parent", "more"),
    [
        (True, LIVES, {"silent": 10 * FORGOTTEN_DETACHED}),
        (False, DEAD, {}),
        (True, DEAD, {"worker": LIVES, "silent": FORGOTTEN, "heard": FORGOTTEN}),
        (False, DEAD, {"worker": DEAD}),
        (True, DEAD, {"worker": ELSEWHERE, "heard": STALE - 10}),
        (False, DEAD, {"worker": ELSEWHERE, "heard": STALE + 10}),
        (True, ELSEWHERE, {"silent": FORGOTTEN - 100}),
        (False, ELSEWHERE, {"silent": FORGOTTEN + 100}),
        (True, ELSEWHERE, {"silent": FORGOTTEN + 100, "worker": ELSEWHERE, "heard": 5.0}),
        (True, DEAD, {"detached": True, "silent": FORGOTTEN_DETACHED - 100}),
        (False, DEAD, {"detached": True, "silent": FORGOTTEN_DETACHED + 100}),
        (True, DEAD, {"detached": True, "silent": FORGOTTEN_DETACHED + 100, "worker": ELSEWHERE, "heard": FORGOTTEN}),
    ],
)
def test_boards_nobody_is_at_are_removed(tmp_path: Path, kept: bool, parent: Holder, more: dict[str, float]) -> None:
    folder = board(tmp_path, "a", parent, **more)  # type: ignore[arg-type]
    remove_abandoned(tmp_path)
    assert folder.exists() == kept
    assert [p for p in tmp_path.iterdir() if p != folder] == []


def test_a_board_that_is_being_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "new" / "at").mkdir(parents=True)
    (tmp_path / "old" / "at").mkdir(parents=True)
    aged(tmp_path / "old", FORGOTTEN + 100)
    (tmp_path / "a file").touch()
    remove_abandoned(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a file", "new"]
    remove_abandoned(tmp_path / "none")


@pytest.mark.parametrize(
    ("parent", "detached", "silent", "stops", "orphan"),
    [
        (LIVES, False, 0.0, False, False),
        (DEAD, False, 0.0, True, False),
        (DEAD, True, 0.0, False, False),
        (ELSEWHERE, False, LOST - 20, False, False),
        (ELSEWHERE, False, LOST + 20, False, True),
        (ELSEWHERE, True, LOST + 20, False, False),
    ],
)
def test_a_worker_sees_that_its_parent_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: Holder, detached: bool, silent: float, stops: bool,
    orphan: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(life, "LOOK", 0.01)
    monkeypatch.setattr(life, "HEARTBEAT", 0.05)
    made = Board(board(tmp_path, "a", parent, detached=detached, silent=silent))
    made.join("1")
    sign = made.folder / "alive" / "1"
    aged(sign, 1000.0)
    before = sign.stat().st_mtime
    stopped = threading.Event()
    found = Life(made, "1", stopped.set)
    found.start()
    while sign.stat().st_mtime < before + 500:
        stopped.wait(0.01)
    stopped.wait(0.3)
    assert (stopped.is_set(), found.orphan) == (stops, orphan)
    made.stop()
    assert stopped.wait(20)


def test_a_worker_whose_board_is_gone_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "LOOK", 0.01)
    made = Board(board(tmp_path, "a", LIVES))
    made.join("1")
    stopped = threading.Event()
    Life(made, "1", stopped.set).start()
    assert not stopped.wait(0.1)
    made.remove()
    assert stopped.wait(20)
