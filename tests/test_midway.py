"""Evaluations while a run trains: where they are, that they change nothing, and that a watcher can end the run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import Stopped
from filtrun.launch import execute
from filtrun.midway import rungs
from filtrun.record import Record
from filtrun.stopping import stop_asked, stops_at, training
from filtrun.sweeps import watch
from filtrun.sweeps.jobs import Job, make_jobs

CLASSIFY = ["data=digits", "task=classify", "model=resnet20", "model.width=4", "model.base=scratch", "method=full"]
DENOISE = ["data=digits", "method=lora", "model=unet"]


def job(folder: Path, stages: Path, *words: str) -> Job:
    (made,) = make_jobs(["scale=smoke", "trainer.steps=8", *words], [0], folder,
                        extra=["device=cpu", "logger=none", f"stages.root={stages}"])  # fmt: skip
    return made


def done(job: Job) -> Record:
    return execute(job.config, job.choices, job.folder, list(job.overrides), quiet=True, cell=True)


def logged(folder: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("tuned/")} for line in lines if "lr" not in line
    }


def test_evaluations_are_spread_evenly_and_none_is_at_the_end() -> None:
    assert rungs(300, 4) == {60: 1, 120: 2, 180: 3, 240: 4}
    assert rungs(10, 3) == {2: 1, 5: 2, 8: 3}
    assert sorted(rungs(3, 7)) == [1, 2] and rungs(1, 4) == {} and rungs(100, 0) == {}


@pytest.mark.parametrize("words", [CLASSIFY, [*CLASSIFY, "trainer.ema=0.9"], DENOISE], ids=["bn", "ema", "lora"])
def test_they_change_nothing_and_are_logged(tmp_path: Path, stages_root: Path, words: list[str]) -> None:
    plain, asked = job(tmp_path / "a", stages_root, *words), job(tmp_path / "b", stages_root, *words,
                                                                 "trainer.evaluations=3")  # fmt: skip
    assert plain.folder.name == asked.folder.name  # the same cell
    one, two = done(plain), done(asked)
    assert one.metrics == two.metrics and one.key == two.key
    sums = [{a["path"]: a["sha256"] for a in record.artifacts} for record in (one, two)]
    assert sums[0] == sums[1]
    assert not logged(plain.folder)
    found = logged(asked.folder)
    assert list(found) == [2, 4, 6]
    names = {name.replace("test/", "tuned/") for name in one.metrics if name.startswith("test/")}
    assert all(set(values) == names for values in found.values())


def test_an_evaluation_measures_the_model_as_it_is_then(tmp_path: Path, stages_root: Path) -> None:
    constant = [*CLASSIFY, "trainer.schedule=constant"]
    midway = job(tmp_path, stages_root, *constant, "trainer.evaluations=1")
    done(midway)
    short = job(tmp_path, stages_root, *constant, "trainer.steps=4")
    assert logged(midway.folder)[4]["tuned/accuracy"] == done(short).metrics["tuned/accuracy"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_watcher_ends_the_run_and_the_record_says_so(tmp_path: Path, stages_root: Path, processes: int) -> None:
    words = [*CLASSIFY, "trainer.evaluations=3", "trainer.checkpoint_every=1", f"trainer.devices={processes}"]
    cell = job(tmp_path, stages_root, *words)
    told: list[Any] = []

    def watcher() -> None:
        while len(told) < 2:
            asks = watch.asked(cell.folder)
            if asks is None:
                time.sleep(0.005)
                continue
            told.append(asks)
            watch.answer(cell.folder, asks[0], len(told) < 2)

    watch.watch(cell.folder)
    thread = threading.Thread(target=watcher, daemon=True)
    thread.start()
    with pytest.raises(Stopped, match="stopped early by a search after 4 of 8 steps"):
        done(cell)
    thread.join()
    assert [rung for rung, _ in told] == [1, 2]
    assert told[1][1]["accuracy"] == logged(cell.folder)[4]["tuned/accuracy"]
    record = Record.read(cell.folder)
    assert (
        record.status == "interrupted"
        and record.error == "stopped early by a search after 4 of 8 steps: worse than other trials"
    )
    assert processes > 1 or record.cost["steps"] == 4
    assert not (cell.folder / "checkpoints").exists()
    watch.unwatch(cell.folder)
    assert done(cell).cost["steps"] == 8  # later it can be run to its end


def test_a_run_that_is_told_to_stop_waits_no_longer(tmp_path: Path) -> None:
    watch.watch(tmp_path / "cell")
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(KeyboardInterrupt), stops_at([signal.SIGTERM]), training():
            timer.start()
            assert watch.may_go_on(tmp_path / "cell", 1, {}) and stop_asked()
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)


def test_nobody_waits_for_a_watcher_that_is_gone(tmp_path: Path) -> None:
    assert watch.may_go_on(tmp_path / "cell", 1, {})
    watch.watch(tmp_path / "cell")
    path = tmp_path / watch.FOLDER / "cell.by"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "long ago"}))
    assert watch.may_go_on(tmp_path / "cell", 1, {})
    watch.unwatch(tmp_path / "cell")
    assert not list((tmp_path / watch.FOLDER).iterdir())
