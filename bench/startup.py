"""Start-up: CPU time of ``filtrun --help`` and friends as multiples of ``python -c pass``, measured in turn.

Run with ``python -m bench.startup``. The budget is 60 times for what needs no run.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

COMMANDS = {"--help": ["--help"], "list": ["list"], "list papers": ["list", "papers"], "info sara": ["info", "sara"]}
BUDGET = 60
ROUNDS = 7


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Print a line per command; returns 1 when one is over the budget."""
    filtrun = os.path.join(os.path.dirname(sys.executable), "filtrun")
    times: dict[str, list[float]] = {"pass": [], **{name: [] for name in COMMANDS}}
    for _ in range(ROUNDS):
        times["pass"].append(cpu_seconds([sys.executable, "-c", "pass"]))
        for name, arguments in COMMANDS.items():
            times[name].append(cpu_seconds([filtrun, *arguments]))
    bare = min(times["pass"])
    print(f"python -c pass: {bare * 1e3:.1f} ms CPU, best of {ROUNDS}")
    worst = 0.0
    for name in COMMANDS:
        ratio = min(times[name]) / bare
        worst = max(worst, ratio)
        print(f"filtrun {name}: {min(times[name]) * 1e3:.0f} ms CPU, {ratio:.1f} x python -c pass (budget {BUDGET} x)")
    return int(worst > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
