"""Jobs of submitit on this machine: results as of a local sweep, whatever happens to jobs, workers and parent."""

from __future__ import annotations

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
from filtrun.sweeps.claims import holder
from filtrun.sweeps.jobs import run_jobs
from filtrun.sweeps.processes import read

pytest.importorskip("submitit", reason="needs submitit: pip install 'filtrun[slurm]'")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_cells_are_those_of_a_local_sweep_whatever_dies(cells: Any) -> None:
    whole, jobs = cells.make("whole"), cells.make("cells")
    assert [o.error for o in run_jobs(whole)] == ["", "", ""]

    killer = cells.then(jobs[0], 20, cells.kill)
    outcomes = {o.job.folder: o for o in run_jobs(jobs, workers=2, launcher="submitit_local")}
    killer.join()
    assert outcomes[jobs[0].folder].error == "worker died: signal 9 (SIGKILL)"
    assert [outcomes[job.folder].error for job in jobs[1:]] == ["", ""]
    record = Record.read(jobs[0].folder)
    assert (record.status, record.error) == ("failed", "worker died: signal 9 (SIGKILL)")

    again = {o.job.folder: o for o in run_jobs(jobs, workers=2, launcher="submitit_local")}
    assert [again[job.folder].error for job in jobs] == ["", "", ""]
    assert [again[job.folder].cached for job in jobs] == [False, True, True]
    assert [cells.result(job) for job in jobs] == [cells.result(job) for job in whole]
    assert cells.left("cells") == []


@pytest.mark.slow
def test_a_job_at_its_time_limit_goes_on_in_the_next(cells: Any) -> None:
    (whole,), (job,) = cells.make("whole", (0,)), cells.make("cells", (0,))
    assert run_jobs([whole])[0].error == ""
    seen: list[Any] = []

    def limit(worker: int) -> None:
        os.kill(parent_of(worker), signal.SIGUSR2)  # to the process that submitit started
        while Path(f"/proc/{worker}").exists():
            time.sleep(0.002)
        seen.append((Record.read(job.folder).status, sorted(p.name for p in (job.folder / "checkpoints").iterdir())))

    limited = cells.then(job, 22, limit)
    outcome = run_jobs([job], workers=1, launcher="submitit_local", options={"setup": ["true"]})[0]
    limited.join()
    assert outcome.error == "" and cells.result(job) == cells.result(whole)
    status, checkpoints = seen[0]
    assert status in ("interrupted", "running") and 1 <= len(checkpoints) <= 3  # running: the next was quick


@pytest.mark.slow
def test_a_job_that_is_lost_fails_its_cell_and_a_parent_that_is_lost_ends_the_jobs(cells: Any, tmp_path: Path) -> None:
    jobs = cells.make("cells", (0, 1))
    killer = cells.then(jobs[0], 10, lambda worker: cells.kill(parent_of(worker)))
    outcomes = {o.job.folder: o for o in run_jobs(jobs, workers=1, launcher="submitit_local")}
    killer.join()
    assert outcomes[jobs[0].folder].error == "worker died: its job ended without a result"
    assert outcomes[jobs[1].folder].error == ""

    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\nfrom filtrun.sweeps.jobs import make_jobs, run_jobs\n"
        f"jobs = make_jobs({cells.words!r}, [2], Path({str(tmp_path / 'cells')!r}), "
        f"extra=[{'stages.root=' + str(tmp_path / 'stages')!r}])\n"
        "run_jobs(jobs, workers=1, launcher='submitit_local')\n"
    )
    (job,) = cells.make("cells", (2,))
    parent = subprocess.Popen([sys.executable, str(script)])
    worker = cells.when_at(job, 5)
    parent.kill()
    parent.wait()
    while Path(f"/proc/{worker}").exists():
        time.sleep(0.02)
    assert Record.read(job.folder).status in ("interrupted", "finished")
    assert [p.name.split("-")[0] for p in cells.left("cells")] == [str(parent.pid)]
    assert run_jobs([job], workers=1, launcher="submitit_local")[0].error == "" and cells.left("cells") == []


@pytest.mark.slow
def test_jobs_that_cannot_begin_are_told(cells: Any) -> None:
    jobs = cells.make("cells", (0,))
    with pytest.raises(RunFailure, match="workers end before they begin: its job ended without a result"):
        run_jobs(jobs, workers=1, launcher="submitit_local", options={"setup": ["exit 3"]})
    assert cells.left("cells") == [] and read(jobs[0].folder / "record.json") == ""


@pytest.mark.slow
def test_the_command_runs_a_grid_on_jobs(smoke: Any, tmp_path: Path) -> None:
    words = ["-m", "model=resnet20", "model.width=4", "method=none,bitfit", "seed=0,1", "workers=2",
             "hydra/launcher=submitit_local"]  # fmt: skip
    whole = smoke(*words[:-2], "workers=1", "hydra.sweep.dir=whole")
    done = smoke(*words, "hydra.sweep.dir=jobs")
    assert (done.code, whole.code) == (0, 0) and "4 cells: 4 finished, 0 failed" in done.out
    names = sorted(path.parent.name for path in Path("whole").glob("*/record.json"))
    assert len(names) == 4 and names == sorted(path.parent.name for path in Path("jobs").glob("*/record.json"))
    for name in names:
        one, other = Record.read(Path("whole") / name), Record.read(Path("jobs") / name)
        assert (one.metrics, one.overrides[:-1], one.key) == (other.metrics, other.overrides[:-1], other.key)
    again = smoke(*words, "hydra.sweep.dir=jobs")
    assert again.code == 0 and again.err.count("there already") == 4

    def kill_one() -> None:
        while True:
            for claim in Path("killed/.claims").glob("[!.]*"):
                lines, who = read(Path("killed") / claim.name / "metrics.jsonl"), holder(claim)
                if who is not None and lines.count("\n") >= 5:
                    os.kill(who.pid, signal.SIGKILL)
                    return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    failing = smoke("-m", "model=resnet20", "model.width=4", "method=full", "trainer.steps=40", "trainer.log_every=1",
                    "seed=0,1,2", "workers=1", "hydra/launcher=submitit_local", "hydra.sweep.dir=killed")  # fmt: skip
    killer.join()
    assert failing.code == 1 and "3 cells: 2 finished, 1 failed" in failing.out
    assert "seed=0: failed: worker died: signal 9 (SIGKILL)" in failing.err


@pytest.mark.slow
def test_a_paper_s_table_runs_its_cells_on_jobs(cli: Any, stages_root: Path) -> None:
    words = ["table", "ssf", "--rows", "ssf", "--scale", "smoke", "--seeds", "0", "--run", "device=cpu",
             "--workers", "1", f"stages.root={stages_root}"]  # fmt: skip
    done = cli(*words, "--launcher", "submitit_local", "hydra.launcher.grace=20")
    assert done.code == 0 and "0 failed" in done.err
    assert "no such option" in cli(*words, "--launcher", "submitit_local", "hydra.launcher.mem=1").err
    assert "--launcher goes with --run" in cli("table", "ssf", "--launcher", "ray").err
