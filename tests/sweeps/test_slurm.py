"""Jobs of SLURM, played by scripts that run them here: what is submitted, and what becomes of cells whose job ends."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import RunFailure, UserError
from filtrun.record import Record
from filtrun.sweeps import on_slurm
from filtrun.sweeps.claims import claim_path, holder, host
from filtrun.sweeps.jobs import run_jobs

pytest.importorskip("submitit", reason="needs submitit: pip install 'filtrun[slurm]'")

SOURCE = Path(__file__).with_name("fake_slurm.py")
_spec = importlib.util.spec_from_file_location("fake_slurm", SOURCE)
assert _spec is not None and _spec.loader is not None
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


class Cluster:
    """The scripts' folder."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def scripts(self) -> list[str]:
        """What was submitted."""
        return [path.read_text() for path in sorted(self.home.glob("*.sh"))]

    def calls(self, name: str) -> list[str]:
        """What a command was called with."""
        return [line for line in (self.home / "calls").read_text().splitlines() if line.split()[0] == name]

    def states(self) -> dict[str, str]:
        """Job -> state."""
        return {path.stem: path.read_text() for path in sorted(self.home.glob("*.state"))}

    def job_of(self, pid: int) -> str:
        """The job a process belongs to."""
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return Path(next(w for w in words if w.startswith(b"FAKE_JOB=")).decode()).name

    def lose(self, pid: int, state: str) -> None:
        """The job of a worker is gone."""
        fake.lose(self.job_of(pid), state, self.home)

    def tell(self, pid: int, number: int) -> None:
        """A signal to everything in the job of a worker."""
        fake.tell(self.job_of(pid), number, self.home)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder, home = tmp_path / "bin", tmp_path / "slurm"
    folder.mkdir()
    home.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {SOURCE} {name} "$@"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setattr(on_slurm, "ASK", 0.3)
    monkeypatch.setattr(on_slurm, "CHECK", 0.1)
    yield Cluster(home)
    for path in home.glob("*.state"):
        fake.tell(path.stem, signal.SIGKILL, home)


@pytest.mark.slow
def test_cells_are_those_of_a_local_sweep_whatever_happens_to_jobs(cells: Any, slurm: Cluster) -> None:
    whole, jobs = cells.make("whole"), cells.make("cells")
    assert [o.error for o in run_jobs(whole)] == ["", "", ""]

    killer = cells.then(jobs[0], 20, cells.kill)
    limit = cells.then(jobs[1], 20, lambda pid: slurm.tell(pid, signal.SIGUSR2))
    options = {
        "partition": "gpu", "time": "1:30:00", "gres": "gpu:a100:1", "gpus_per_node": 2, "cpus_per_task": 3,
        "mem": "16GB", "account": "vision", "qos": "high", "constraint": "a100|h100", "setup": ["export MARK='a b'"],
        "additional_parameters": {"nice": 5, "exclusive": True},
    }  # fmt: skip
    outcomes = {
        o.job.folder: o for o in run_jobs(jobs, workers=2, launcher="submitit_slurm", options=options)
    }  # fmt: skip
    killer.join()
    limit.join()
    assert outcomes[jobs[0].folder].error == "worker died: signal 9 (SIGKILL)"
    assert [outcomes[job.folder].error for job in jobs[1:]] == ["", ""]
    first, *later = slurm.scripts()
    lines = first.splitlines()
    for word in (
        "partition=gpu", "time=90", "gres=gpu:a100:1", "gpus-per-node=2", "cpus-per-task=3", "mem=16GB",
        "account=vision", "qos=high", "constraint='a100|h100'", "array=0-1%2", "signal=USR2@120", "no-requeue",
        "job-name=filtrun", "nice=5", "exclusive",
    ):  # fmt: skip
        assert f"#SBATCH --{word}" in lines, word
    assert lines.index("export MARK='a b'") > [x.startswith("export PYTHONPATH=") for x in lines].index(True)
    assert 1 <= len(later) <= 2 and "nodelist" not in first  # in place of the two that ended

    again = run_jobs(jobs, workers=1, launcher="submitit_slurm")
    assert sorted((o.error, o.cached) for o in again) == [("", False), ("", True), ("", True)]
    assert "--array" not in slurm.scripts()[-1] and "#SBATCH --time=60" in slurm.scripts()[-1]
    assert [cells.result(job) for job in jobs] == [cells.result(job) for job in whole]
    assert cells.left("cells") == []


@pytest.mark.slow
def test_a_lost_node_costs_no_cell_and_memory_that_is_short_costs_its_own(cells: Any, slurm: Cluster) -> None:
    jobs = cells.make("cells", (0, 1))
    lost = cells.then(jobs[0], 20, lambda pid: slurm.lose(pid, "NODE_FAIL"))
    short = cells.then(jobs[1], 20, lambda pid: slurm.lose(pid, "OUT_OF_MEMORY"))
    first, second = sorted(
        run_jobs(jobs, workers=1, launcher="submitit_slurm"), key=lambda o: o.job.config["seed"]
    )  # fmt: skip
    lost.join()
    short.join()
    assert first.error == "" and cells.result(jobs[0])[0]
    assert second.error == "worker died: its job ended as OUT_OF_MEMORY; raise hydra.launcher.mem"
    assert Record.read(jobs[1].folder).status == "failed" and cells.left("cells") == []
    assert slurm.states()["100"] == "NODE_FAIL" and slurm.states()["101"] == "OUT_OF_MEMORY"


@pytest.mark.slow
def test_a_cell_of_a_lost_machine_is_begun_again_on_the_next(cells: Any, slurm: Cluster, tmp_path: Path) -> None:
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]  # process numbers of its own, as another machine has
    if shutil.which(apart[0]) is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("processes cannot be put into a namespace of their own here")
    srun = tmp_path / "bin" / "srun"
    srun.write_text(srun.read_text().replace("exec ", f"exec {' '.join(apart)} "))
    (whole,), (job,) = cells.make("whole", (0,)), cells.make("cells", (0,))
    assert run_jobs([whole])[0].error == ""
    found: list[Any] = []

    def lost(_: int) -> None:
        found.append(holder(claim_path(job.folder)))
        fake.lose("100", "NODE_FAIL", slurm.home)

    loser = cells.then(job, 20, lost)
    outcome = run_jobs([job], workers=1, launcher="submitit_slurm")[0]
    loser.join()
    assert outcome.error == "" and cells.result(job) == cells.result(whole)
    assert found[0].host not in ("", host()) and len(slurm.scripts()) == 2 and cells.left("cells") == []


@pytest.mark.slow
def test_jobs_that_are_cancelled_are_not_replaced(cells: Any, slurm: Cluster) -> None:
    jobs = cells.make("cells", (0, 1))
    cancel = cells.then(jobs[0], 20, lambda pid: subprocess.run(["scancel", slurm.job_of(pid)], check=True))
    with pytest.raises(RunFailure, match="all jobs of the sweep were cancelled; 0 of 2 cells have ended"):
        run_jobs(jobs, workers=1, launcher="submitit_slurm")
    cancel.join()
    record = Record.read(jobs[0].folder)
    assert record.status == "interrupted" and list((jobs[0].folder / "checkpoints").iterdir())
    assert len(slurm.scripts()) == 1 and cells.left("cells") == []


@pytest.mark.slow
@pytest.mark.parametrize("detached", [True, False])
def test_jobs_go_on_without_their_parent_unless_told_otherwise(
    cells: Any, slurm: Cluster, tmp_path: Path, detached: bool
) -> None:
    (job,) = cells.make("cells", (0,))
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\nfrom filtrun.sweeps.jobs import make_jobs, run_jobs\n"
        f"jobs = make_jobs({cells.words!r}, [0], Path({str(tmp_path / 'cells')!r}), "
        f"extra=[{'stages.root=' + str(tmp_path / 'stages')!r}])\n"
        f"run_jobs(jobs, workers=1, launcher='submitit_slurm', options={{'detached': {detached}}})\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    worker = cells.when_at(job, 5)
    if not detached:
        os.kill(worker, signal.SIGSTOP)  # so that it cannot be done before it is told
    parent.kill()
    parent.wait()
    if not detached:
        os.kill(worker, signal.SIGCONT)
    while Path(f"/proc/{worker}").exists():
        time.sleep(0.02)
    assert Record.read(job.folder).status in (("finished",) if detached else ("interrupted", "finished"))
    (board,) = cells.left("cells")
    assert json.loads((board / "parent.json").read_text())["detached"] is detached
    assert slurm.calls("scancel") == []


@pytest.mark.slow
def test_the_first_failure_cancels_the_jobs(cells: Any, slurm: Cluster) -> None:
    bad, good = cells.make("cells", (0,), "trainer.lr=1e30"), cells.make("cells", (0,), "trainer.steps=100000")
    outcomes = run_jobs([*bad, *good], workers=2, launcher="submitit_slurm", fail_fast=True)
    assert [o.error.split(" became")[0] for o in outcomes] == ["the loss"]
    assert slurm.calls("scancel") and "100_1" in slurm.calls("scancel")[0]
    while [job for job in slurm.states() if fake.processes(job, slurm.home)]:
        time.sleep(0.05)
    assert not (good[0].folder / "record.json").exists() or Record.read(good[0].folder).status == "interrupted"


def test_what_the_cluster_refuses_is_told(cells: Any, slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = cells.make("cells", (0,))
    with pytest.raises(UserError, match="could not submit: sbatch: error: invalid partition specified: closed"):
        run_jobs(jobs, workers=1, launcher="submitit_slurm", options={"partition": "closed"})
    assert cells.left("cells") == [] and slurm.scripts() == []
    with pytest.raises(UserError, match="SLURM gives % in paths a meaning of its own"):
        run_jobs(cells.make("100%", (0,)), workers=1, launcher="submitit_slurm")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"there is no SLURM here \(no srun on the PATH\)"):
        run_jobs(jobs, workers=1, launcher="submitit_slurm")
    assert cells.left("cells") == []
