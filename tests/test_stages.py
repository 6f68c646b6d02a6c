"""The stage cache: whole or absent, built once, keyed by content, checked by hash."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import UserError
from filtrun.stages import MANIFEST, Stages, digest, file_sha256, is_whole

PARTS = {"model": {"depth": 20, "width": 16}, "seed": 0}

BUILDER = """
import os, sys, time
from pathlib import Path
from filtrun.stages import Stages
root, log, wait = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def build(folder):
    with log.open("a") as stream:
        stream.write(f"{os.getpid()}\\n")
    (folder / "part").write_text("half")
    time.sleep(wait)
    (folder / "result").write_text("whole")
print(Stages(root).get("work", {"n": 1}, build), flush=True)
"""


def writes(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "result").write_text(text)
        if calls is not None:
            calls.append(text)

    return build


def builder(root: Path, log: Path, wait: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root), str(log), str(wait)], stdout=subprocess.PIPE, text=True
    )


def test_built_once_then_taken_from_the_cache(tmp_path: Path) -> None:
    calls: list[str] = []
    lines: list[str] = []
    stages = Stages(tmp_path / "a" / "b", lines.append)
    assert not stages.cached("base", PARTS)
    first = stages.get("base", PARTS, writes("x", calls))
    assert stages.cached("base", PARTS)
    second = stages.get("base", PARTS, writes("y", calls))
    assert first == second == stages.folder("base", PARTS) and calls == ["x"]
    assert (first / "sub" / "result").read_text() == "x"
    key = first.name.removeprefix("base-")
    assert stages.used == [{"name": "base", "key": key, "cached": False}, {"name": "base", "key": key, "cached": True}]
    assert lines == ["stage base: working", f"stage base: from the cache ({first.name})"]
    manifest = json.loads((first / MANIFEST).read_text())
    assert manifest["parts"] == PARTS
    assert manifest["files"] == {"sub/result": file_sha256(first / "sub" / "result")}


def test_the_key_is_the_content_whatever_the_order(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    turned = {"seed": 0, "model": {"width": 16, "depth": 20}}
    assert stages.folder("base", PARTS) == stages.folder("base", turned)
    others: list[dict[str, Any]] = [
        {**PARTS, "seed": 1},
        {**PARTS, "model": {"depth": 20, "width": 17}},
        {**PARTS, "seed": "0"},
        {**PARTS, "more": None},
        {"model": PARTS["model"]},
    ]
    folders = {stages.folder("base", parts) for parts in [PARTS, *others]} | {stages.folder("judge", PARTS)}
    assert len(folders) == 7
    assert len(digest(PARTS)) == 16 and digest([1, 2]) != digest([2, 1])


def test_several_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = [builder(tmp_path / "cache", log, 0.3) for _ in range(4)]
    folders = {process.communicate(timeout=120)[0].strip() for process in running}
    assert len(folders) == 1 and len(log.read_text().split()) == 1
    folder = Path(folders.pop())
    assert is_whole(folder) and (folder / "result").read_text() == "whole"


def test_a_builder_that_is_killed_leaves_nothing_to_be_taken_for_a_stage(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    process = builder(root, log, 600)
    while not list(root.glob(".work-*/part")):
        assert process.poll() is None
        time.sleep(0.01)
    stages = Stages(root)
    assert not stages.cached("work", {"n": 1}) and not stages.folder("work", {"n": 1}).exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not stages.cached("work", {"n": 1})
    folder = stages.get("work", {"n": 1}, lambda f: (f / "result").write_text("whole") and None)
    assert is_whole(folder) and sorted(p.name for p in folder.iterdir()) == ["result", MANIFEST]
    assert list(root.glob(".work-*")) == []  # what the killed one left is cleared


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path)

    def fails(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        stages.get("base", PARTS, fails)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [] and stages.used == []
    assert stages.get("base", PARTS, writes("x")).exists()


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no manifest", "half manifest", "other manifest"])
def test_a_damaged_stage_is_kept_aside_and_built_again(tmp_path: Path, damage: str) -> None:
    lines: list[str] = []
    stages = Stages(tmp_path, lines.append)
    folder = stages.get("base", PARTS, writes("good"))
    file, manifest = folder / "sub" / "result", folder / MANIFEST
    if damage == "changed":
        file.write_text("goof")
    elif damage == "cut":
        file.write_text("go")
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text('{"files": {' if damage == "half manifest" else "null")
    again = stages.get("base", PARTS, writes("good"))
    assert again == folder and file.read_text() == "good" and is_whole(folder)
    aside = [p for p in tmp_path.iterdir() if ".damaged-" in p.name]
    assert len(aside) == 1 and (aside[0] / folder.name).is_dir()
    assert any("is damaged; moved to" in line for line in lines)
    assert [entry["cached"] for entry in stages.used] == [False, False]


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"stages.root=.*/file/cache cannot be written: Not a directory"):
        Stages(tmp_path / "file" / "cache").get("base", PARTS, writes("x"))


def _build_in_child(root: str, queue: Any) -> None:
    queue.put(str(Stages(Path(root)).get("base", PARTS, writes("x"))))


def test_relative_and_absolute_roots_are_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=_build_in_child, args=("cache", queue))
    child.start()
    child.join()
    assert Path(queue.get()) == Stages(tmp_path / "cache").folder("base", PARTS)
    assert Stages(tmp_path / "cache").cached("base", PARTS)
