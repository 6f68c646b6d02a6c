"""Who may run a cell: one process at a time, and the next one when it is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from filtrun.sweeps.claims import STALE, Holder, claim_path, claimed, holder, host, release, seize, started


def claim(folder: Path, who: Holder, age: float = 0.0) -> Path:
    path = claim_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(who)))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return path


def gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    with claimed(tmp_path / "cell") as mine:
        found = holder(claim_path(tmp_path / "cell"))
        assert mine and found is not None and (found.pid, found.host) == (os.getpid(), host())
        with claimed(tmp_path / "cell") as second:
            assert not second
        assert holder(claim_path(tmp_path / "cell")) == found
    assert list((tmp_path / ".claims").iterdir()) == [] and not (tmp_path / "cell").exists()


@pytest.mark.parametrize("before", [False, True])
def test_of_many_who_want_it_one_gets_it(tmp_path: Path, before: bool) -> None:
    if before:  # left by a process that is gone: all see that at once
        claim(tmp_path / "cell", Holder(host(), gone(), "1", "dead"))
    got: list[int] = []
    start, leave = threading.Barrier(16), threading.Event()

    def take() -> None:
        start.wait()
        with claimed(tmp_path / "cell") as mine:
            if mine:
                got.append(threading.get_ident())
                leave.wait(20)

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    while sum(t.is_alive() for t in threads) > 1:
        time.sleep(0.01)
    leave.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and list((tmp_path / ".claims").iterdir()) == []


def test_a_dead_process_of_this_machine_loses_its_claim_at_once(tmp_path: Path) -> None:
    claim(tmp_path / "a", Holder(host(), gone(), "1", "x"))
    claim(tmp_path / "b", Holder(host(), os.getpid(), "another process had this number", "x"))
    claim(tmp_path / "c", Holder(host(), os.getpid(), started(os.getpid()), "x"))
    claim(tmp_path / "d", Holder(host(), gone(), "1", "x", sweep="own"))
    for name, sweep, taken in (
        ("a", "", True),
        ("b", "", True),
        ("c", "", False),
        ("d", "own", False),
        ("d", "", True),
    ):
        with claimed(tmp_path / name, sweep) as mine:
            assert mine == taken, name


def test_another_machine_loses_its_claim_after_a_minute_of_silence(tmp_path: Path) -> None:
    other = Holder("elsewhere", os.getpid(), "1", "x")
    for age, taken in ((0.0, False), (STALE - 5, False), (STALE + 5, True)):
        claim(tmp_path / "cell", other, age)
        with claimed(tmp_path / "cell") as mine:
            assert mine == taken
    claim_path(tmp_path / "cell").write_text("half a cla")  # as a machine that lost its power may leave it
    with claimed(tmp_path / "cell") as mine:
        assert not mine


def test_a_holder_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filtrun.sweeps.claims.HEARTBEAT", 0.02)
    path = claim_path(tmp_path / "cell")
    with claimed(tmp_path / "cell"):
        os.utime(path, (0, 0))
        for _ in range(200):
            if path.stat().st_mtime > 0:
                break
            threading.Event().wait(0.02)
        assert path.stat().st_mtime > 0


def test_a_parent_seizes_what_its_dead_worker_held_and_nothing_else(tmp_path: Path) -> None:
    dead = Holder(host(), gone(), "1", "x", "own")
    path = claim(tmp_path / "cell", dead)
    mine = seize(tmp_path / "cell", dead, "own")
    assert mine is not None and holder(path) == mine
    assert seize(tmp_path / "cell", dead, "own") is None and holder(path) == mine
    release(path, dead)
    assert holder(path) == mine
    release(path, mine)
    assert holder(path) is None
