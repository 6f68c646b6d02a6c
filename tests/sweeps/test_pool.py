"""Sweeps on several processes: who dies takes one cell along, and the same command again makes it as if undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import RunFailure
from filtrun.record import Record
from filtrun.sweeps import pool
from filtrun.sweeps.claims import claim_path, holder
from filtrun.sweeps.jobs import Job, Outcome, make_jobs, run_jobs
from filtrun.sweeps.view import summary, told

WORDS = [
    "scale=smoke", "data=digits", "task=classify", "model=resnet20", "model.width=4", "model.base=scratch",
    "method=full", "device=cpu", "logger=none", "trainer.steps=60", "trainer.checkpoint_every=5",
    "trainer.log_every=1",
]  # fmt: skip


def jobs(sweep: Path, seeds: Any = (0, 1, 2), *words: str) -> list[Job]:
    return make_jobs([*WORDS, *words], seeds, sweep, extra=[f"stages.root={sweep.parent / 'stages'}"])


def steps(job: Job) -> int:
    with contextlib.suppress(OSError):
        return len((job.folder / "metrics.jsonl").read_text().splitlines())
    return 0


def when_at(job: Job, step: int, process: Any = None) -> int:
    """The process that runs the cell, once it has made `step` steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        who = holder(claim_path(job.folder))
        if who is not None and steps(job) >= step:
            return who.pid
        assert process is None or process.poll() is None
        time.sleep(0.002)
    raise AssertionError("the cell was not begun")


def kill_when_at(job: Job, step: int) -> threading.Thread:
    thread = threading.Thread(target=lambda: os.kill(when_at(job, step), signal.SIGKILL), daemon=True)
    thread.start()
    return thread


def result(job: Job) -> Any:
    record = Record.read(job.folder)
    assert record.status == "finished"
    logged = [json.loads(x)["step"] for x in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, len(logged) + 1))
    return record.metrics, record.key, record.report, [a["sha256"] for a in record.artifacts]


@pytest.mark.slow
def test_killed_workers_and_parents_change_no_result(tmp_path: Path) -> None:
    whole, cells = jobs(tmp_path / "whole"), jobs(tmp_path / "cells")
    assert [o.error for o in run_jobs(whole)] == ["", "", ""]

    killer = kill_when_at(cells[0], 20)  # a worker: its cell failed, another takes the rest
    outcomes = {o.job.folder: o for o in run_jobs(cells[:2], workers=1)}
    killer.join()
    assert outcomes[cells[0].folder].error == "worker died: signal 9 (SIGKILL)"
    assert outcomes[cells[1].folder].record.status == "finished"
    record = Record.read(cells[0].folder)
    assert (record.status, record.error) == ("failed", "worker died: signal 9 (SIGKILL)")
    assert list((cells[0].folder / "checkpoints").iterdir())

    stages = f"stages.root={tmp_path / 'stages'}"
    script = tmp_path / "parent.py"  # the parent: its workers say that they were stopped
    script.write_text(
        "from pathlib import Path\nfrom filtrun.sweeps.jobs import make_jobs, run_jobs\n"
        f"jobs = make_jobs({WORDS!r}, [0, 1, 2], Path({str(tmp_path / 'cells')!r}), extra=[{stages!r}])\n"
        "print([o.error for o in run_jobs(jobs, workers=2)])\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = when_at(cells[2], 10, parent)
    parent.kill()
    parent.wait()
    while Path(f"/proc/{worker}").exists():
        time.sleep(0.02)
    assert Record.read(cells[2].folder).status == "interrupted"

    assert len(list((tmp_path / "cells" / ".sweeps").iterdir())) == 1
    again = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert again.stdout == "['', '', '']\n", again.stderr
    assert [result(job) for job in cells] == [result(job) for job in whole]
    assert list((tmp_path / "cells" / ".claims").iterdir()) == []
    assert list((tmp_path / "cells" / ".sweeps").iterdir()) == []  # also that of the parent that was killed


@pytest.mark.slow
def test_two_parents_at_once_run_each_cell_once(tmp_path: Path) -> None:
    cells = jobs(tmp_path / "cells", (0, 1, 2, 3), "trainer.steps=10")
    found: list[list[Outcome]] = []
    parents = [threading.Thread(target=lambda: found.append(run_jobs(cells, workers=1))) for _ in range(2)]
    for parent in parents:
        parent.start()
    for parent in parents:
        parent.join()
    assert [o.error for each in found for o in each] == [""] * 8
    assert sum(o.cached for each in found for o in each) == 4  # of each cell, one parent found it done
    for job in cells:
        result(job)


def test_workers_that_cannot_begin_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'no such library' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RunFailure, match="workers end before they begin: no such library"):
        run_jobs(jobs(tmp_path / "cells", (0,)), workers=1)
    assert list((tmp_path / "cells" / ".sweeps").iterdir()) == []


def test_a_dead_worker_s_cell_has_a_record_even_when_it_had_none(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path / "cells", (3,))
    assert pool.mark(job, "failed", "worker died: exit code 3") == "worker died: exit code 3"
    record = Record.read(job.folder)
    assert (record.status, record.seed, record.data, record.key) == ("failed", 3, "digits", "")
    record.status, record.error = "finished", None
    record.write()
    assert pool.mark(job, "failed", "x") == "" and Record.read(job.folder).status == "finished"


def test_what_is_told_of_a_sweep(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path / "cells", (0,))
    record = Record(tmp_path, metrics={"base/accuracy": 0.1, "test/accuracy": 0.51234})
    done, failed = Outcome(job, record, seconds=2.0), Outcome(job, error="no memory\nmore")
    assert told(done).startswith("finished in 2") and told(done).endswith(", accuracy 0.5123")
    assert told(Outcome(job, record, cached=True)) == "there already, accuracy 0.5123"
    assert told(failed) == "failed: no memory"
    text = summary([done, failed], 6, 2, 10.0)
    assert text.startswith("2/6 done, 2 running, 1 failed, about 20") and text.endswith("left")
    assert "left" not in summary([done], 1, 2, 10.0) and "0 running" in summary([done], 1, 2, 10.0)


@pytest.mark.slow
def test_the_command_stops_at_the_first_failure_when_told_to(tmp_path: Path, cli: Any) -> None:
    words = [*WORDS, "trainer.steps=3", "trainer.lr=1e30,0.01", "workers=1", "-m", "hydra.sweep.dir=sweep"]
    stopped = cli(*words, "--fail-fast")
    assert stopped.code == 1 and "1 cells: 0 finished, 1 failed" in stopped.out
    assert "1/2 trainer.lr=1e+30: failed: the loss became nan" in stopped.err and "1 cells were not run" in stopped.err
    assert "--fail-fast goes with -m" in cli(*WORDS, "--fail-fast").err
    whole = cli(*words[:-3], "workers=2", *words[-2:])  # the same cells on two workers: both are tried now
    assert whole.code == 1 and "2 cells: 1 finished, 1 failed" in whole.out
    assert "trainer.lr=0.01: finished in" in whole.err
    assert len(list((tmp_path / "sweep").glob("*/record.json"))) == 2
