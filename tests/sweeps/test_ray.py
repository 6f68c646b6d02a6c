"""Tasks of a real Ray on this machine: results as of a local sweep, a worker that dies takes one cell along."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import UserError
from filtrun.record import Record
from filtrun.sweeps.jobs import run_jobs
from filtrun.sweeps.launcher_options import RayOptions
from filtrun.sweeps.on_ray import QUIET, Ray

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'filtrun[ray]'")


@pytest.fixture
def cluster() -> Any:
    """A Ray that says it has two cores and two GPUs, for the launcher to find."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_cells_are_those_of_a_local_sweep_when_a_worker_dies(cells: Any) -> None:
    whole, jobs = cells.make("whole"), cells.make("cells")
    assert [o.error for o in run_jobs(whole)] == ["", "", ""]
    killer, before = cells.then(jobs[0], 20, cells.kill), signal.getsignal(signal.SIGTERM)
    outcomes = {
        o.job.folder: o for o in run_jobs(jobs, workers=2, launcher="ray", options={"num_cpus": 0.5})
    }  # fmt: skip
    killer.join()
    assert not ray.is_initialized()  # the cluster was ours
    assert signal.getsignal(signal.SIGTERM) is before
    assert outcomes[jobs[0].folder].error == "worker died: signal 9 (SIGKILL)"
    assert [outcomes[job.folder].error for job in jobs[1:]] == ["", ""]
    assert Record.read(jobs[0].folder).status == "failed"
    assert [cells.result(job) for job in jobs[1:]] == [cells.result(job) for job in whole[1:]]
    assert cells.left("cells") == []


@pytest.mark.slow
def test_fractions_of_gpus_and_tasks_that_are_lost(cells: Any, cluster: Any) -> None:
    jobs = cells.make("cells", (0, 1))
    seen: dict[str, list[str]] = {}

    def look(pid: int) -> None:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        seen["worker"] = [w for w in words if w.startswith(("CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS="))]
        minder = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        cells.kill(minder)

    looks = cells.then(jobs[0], 10, look)
    outcomes = run_jobs(jobs, workers=1, launcher="ray", options={"num_gpus": 0.25})
    looks.join()
    assert ray.is_initialized()  # somebody else's
    first, second = sorted(outcomes, key=lambda o: o.job.config["seed"])
    assert seen["worker"] in (["CUDA_VISIBLE_DEVICES=0", "OMP_NUM_THREADS=1"],
                              ["OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=0"])  # fmt: skip
    assert first.error.startswith("worker died: its task failed: ") and second.error == ""
    assert json.loads((jobs[1].folder / "record.json").read_text())["status"] == "finished"


def test_what_each_worker_needs(cells: Any) -> None:
    class Two:
        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return {"CPU": 4.0, "GPU": 2.0}

    def needs(*words: str, **options: Any) -> Any:
        launcher = Ray(RayOptions(**options))
        launcher.ray = Two
        return launcher._needs(cells.make("cells", (0,), *words))

    assert needs("device=auto") == {"num_cpus": 1.0, "num_gpus": 1, "resources": None}
    assert needs("device=auto", "trainer.devices=2")["num_gpus"] == 2
    assert needs("device=cpu")["num_gpus"] == 0 and needs("device=cpu", num_gpus=0.25)["num_gpus"] == 0.25
    with pytest.raises(UserError, match="hydra.launcher.num_cpus=8: Ray has 4 on this machine"):
        needs(num_cpus=8.0)
    with pytest.raises(UserError, match="hydra.launcher.resources.big=1: Ray has 0 on this machine"):
        needs(resources={"big": 1.0})
    with pytest.raises(UserError, match="hydra.launcher.num_gpus=1.5 must be a whole number, or less than 1"):
        needs(num_gpus=1.5)
    assert needs(resources={"big": 1.0}, address="auto")["resources"] == {"big": 1.0}  # it may be added there


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told(cells: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="hydra.launcher.address=auto: Ray cannot be reached: Could not find any"):
        run_jobs(cells.make("cells", (0,)), launcher="ray", options={"address": "auto"})
    with pytest.raises(UserError, match=f"hydra.launcher.address={address}: nobody answers there: Connection refused"):
        run_jobs(cells.make("cells", (0,)), launcher="ray", options={"address": address})
    assert cells.left("cells") == [] and not ray.is_initialized()
