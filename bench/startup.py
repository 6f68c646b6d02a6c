"""Start-up: CPU time of ``filtrun --help`` and friends as multiples of ``python -c pass``, measured in turn.

Run with ``python -m bench.startup``. The budget is 60 times for what needs no run, and none of it imports torch. The
first training step on digits (a classifier from scratch) may take 400 times, and 1.3 times what importing the same
third-party modules in the same order takes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.records import record

BUDGET, STEP_BUDGET, IMPORT_BUDGET = 60, 400, 1.3
ROUNDS, STEP_ROUNDS = 7, 5
RECORDS = 300
STEP = [
    "task=classify", "model=resnet20", "model.base=scratch", "method=full", "trainer.steps=1", "device=cpu",
    "trainer.evaluate=false",
]  # fmt: skip

FIRST_STEP = """
import json, os, sys
import filtrun.cli
import filtrun.callbacks as callbacks
after_step = callbacks.Log.after_step

def stop(self, run):
    after_step(self, run)
    if os.environ.get("MODULES"):
        there = [n for n, m in list(sys.modules.items()) if "site-packages" in (getattr(m, "__file__", None) or "")]
        with open(os.environ["MODULES"], "w") as file:
            json.dump([n for n in there if n.split(".")[0] not in ("filtrun", "bench")], file)
    os._exit(0)

callbacks.Log.after_step = stop
sys.exit(filtrun.cli.main(sys.argv[1:]))
"""
IMPORTS = """
import importlib, json, os, sys
for name in json.load(open(sys.argv[1])):
    try:
        importlib.import_module(name)
    except Exception:
        pass
os._exit(0)
"""
NO_TORCH = """
import sys
import filtrun.cli
try:
    filtrun.cli.main(sys.argv[1:])
except SystemExit:
    pass
sys.stderr.write("torch" if "torch" in sys.modules else "none")
"""


def cpu_seconds(command: list[str], cwd: str | None = None, **environment: str) -> float:
    """User and system time of one fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, cwd=cwd,
        env={**os.environ, **environment},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def quick(records: Path) -> dict[str, list[str]]:
    """The commands that need no run."""
    return {
        "--help": ["--help"],
        "list": ["list"],
        "list papers": ["list", "papers"],
        "info sara": ["info", "sara"],
        f"table on {RECORDS} records": ["table", str(records)],
    }


def write_records(root: Path) -> None:
    """Records as runs leave them."""
    for number in range(RECORDS):
        folder = root / "sweeps" / f"{number:016x}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record(number), indent=1))


def main() -> int:
    """Print a line per command; returns 1 when one is over its budget or imports torch without need."""
    python = sys.executable
    filtrun = os.path.join(os.path.dirname(python), "filtrun")
    over = False
    with tempfile.TemporaryDirectory() as place:
        write_records(Path(place) / "records")
        commands = quick(Path(place) / "records")
        times: dict[str, list[float]] = {"pass": [], **{name: [] for name in commands}}
        for _ in range(ROUNDS):
            times["pass"].append(cpu_seconds([python, "-c", "pass"]))
            for name, arguments in commands.items():
                times[name].append(cpu_seconds([filtrun, *arguments]))
        bare = min(times["pass"])
        print(f"python -c pass: {bare * 1e3:.1f} ms CPU, best of {ROUNDS}")
        for name, arguments in commands.items():
            done = subprocess.run([python, "-c", NO_TORCH, *arguments], capture_output=True, text=True)
            torch = done.stderr.rpartition("\n")[2].endswith("torch")
            ratio = min(times[name]) / bare
            over |= ratio > BUDGET or torch
            print(
                f"filtrun {name}: {min(times[name]) * 1e3:.0f} ms CPU, {ratio:.1f} x python -c pass "
                f"(budget {BUDGET} x){', and it imports torch' if torch else ''}"
            )

        modules = os.path.join(place, "modules.json")
        one = {"OMP_NUM_THREADS": "1"}  # threads that wait would count
        step = [python, "-c", FIRST_STEP, *STEP]
        cpu_seconds([*step, f"hydra.run.dir={place}/first"], MODULES=modules, **one)  # compiles what is not yet
        steps, imports, passes = [], [], []
        for i in range(STEP_ROUNDS):
            passes.append(cpu_seconds([python, "-c", "pass"]))
            imports.append(cpu_seconds([python, "-c", IMPORTS, modules], **one))
            steps.append(cpu_seconds([*step, f"hydra.run.dir={place}/run{i}", f"stages.root={place}/s"], **one))
        ratio, to_imports = min(steps) / min(passes), min(steps) / min(imports)
        over |= ratio > STEP_BUDGET or to_imports > IMPORT_BUDGET
        print(
            f"first training step on digits: {min(steps):.2f} s CPU, {ratio:.0f} x python -c pass (budget "
            f"{STEP_BUDGET} x), {to_imports:.2f} x its imports of {min(imports):.2f} s (budget {IMPORT_BUDGET} x)"
        )
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
