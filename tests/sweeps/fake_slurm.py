#!/usr/bin/env python3
"""A SLURM of one machine for tests: this file plays sbatch, srun, sacct and scancel, and runs jobs at once.

What is known of jobs lies in the folder FAKE_SLURM: ``N.sh`` as submitted, ``JOB.state``, and ``calls``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("FAKE_SLURM", "."))


def processes(job: str, home: Path = HOME) -> list[int]:
    """All processes of a job, in whatever session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FAKE_JOB={home}/{job}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def tell(job: str, number: int, home: Path = HOME) -> None:
    """Send a signal to all processes of a job, as slurmd does."""
    for pid in processes(job, home):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def state(job: str, value: str, home: Path = HOME) -> None:
    """Set what sacct says, unless the job has ended already."""
    path = home / f"{job}.state"
    if not path.exists() or path.read_text() in ("RUNNING", "PENDING"):
        work = home / f"{job}.{os.getpid()}"
        work.write_text(value)
        os.replace(work, path)


def lose(job: str, value: str, home: Path) -> None:
    """The job is gone, and this is why."""
    state(job, value, home)
    tell(job, signal.SIGKILL, home)


def sbatch(file: str) -> int:
    text = Path(file).read_text()
    if "--partition=closed" in text:
        print("sbatch: error: invalid partition specified: closed", file=sys.stderr)
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    number = 100 + len(list(HOME.glob("*.sh")))
    (HOME / f"{number}.sh").write_text(text)
    array = re.search(r"--array=0-(\d+)%", text)
    for task in range(int(array.group(1)) + 1) if array else [None]:
        job = str(number) if task is None else f"{number}_{task}"
        state(job, "PENDING")
        more = {} if task is None else {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
        environment = {
            **os.environ, **more, "FAKE_JOB": f"{HOME}/{job}", "SLURM_JOB_ID": str(number), "SLURM_PROCID": "0",
            "SLURM_NTASKS": "4", "SLURM_CPUS_ON_NODE": "3",
        }  # fmt: skip
        nothing = subprocess.DEVNULL
        subprocess.Popen(
            [sys.executable, __file__, "run", job, str(HOME / f"{number}.sh")],
            env=environment, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True,
        )  # fmt: skip
    print(f"Submitted batch job {number}")
    return 0


def run(job: str, file: str) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    state(job, "RUNNING") if (HOME / f"{job}.state").read_text() == "PENDING" else sys.exit(0)
    code = subprocess.Popen(["bash", file], start_new_session=True, restore_signals=True).wait()
    state(job, "FAILED" if code else "COMPLETED")
    return 0


def srun(*words: str) -> int:
    left, files = list(words), {}
    while left[0].startswith("--"):
        flag = left.pop(0)
        if flag in ("--output", "--error"):
            path = left.pop(0).replace("%A", os.environ.get("SLURM_ARRAY_JOB_ID", ""))
            path = path.replace("%a", os.environ.get("SLURM_ARRAY_TASK_ID", "")).replace("%t", "0")
            files[flag] = path.replace("%j", os.environ["SLURM_JOB_ID"])
    with open(files["--output"], "a") as out, open(files["--error"], "a") as error:
        os.dup2(out.fileno(), 1)
        os.dup2(error.fileno(), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    os.execvp(left[0], left)


def sacct(*words: str) -> int:
    print("JobID|State|NodeList")
    for number in words[-1].split(","):
        for path in sorted([*HOME.glob(f"{number}.state"), *HOME.glob(f"{number}_*.state")]):
            print(f"{path.stem}|{path.read_text()}|node1\n{path.stem}.batch|{path.read_text()}|node1")
    return 0


def scancel(*jobs: str) -> int:
    for job in jobs:
        state(job, "CANCELLED by 1000")
        tell(job, signal.SIGTERM)
    if os.fork() == 0:  # the time between SIGTERM and SIGKILL
        os.setsid()
        for number in (0, 1, 2):
            os.close(number)
        time.sleep(10)
        for job in jobs:
            tell(job, signal.SIGKILL)
        os._exit(0)
    return 0


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    with (HOME / "calls").open("a") as stream:
        stream.write(" ".join([name, *words]) + "\n")
    sys.exit({"sbatch": sbatch, "run": run, "srun": srun, "sacct": sacct, "scancel": scancel}[name](*words))
