"""What a search tells at its end: the best trials, what matters, and the line that runs the best."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from filtrun.search.space import overrides

SHOWN = 10
"""Trials that are listed."""
STATES = ("complete", "pruned", "fail", "running")


def command(words: Sequence[str], params: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """A line for a shell that runs what was found, with the search's seeds, and reports it on the test split."""
    kept = [w for w in words if not w.lstrip("+").startswith("task.split=")]
    several = ["-m"] if len(seeds) > 1 else []
    seed = [f"seed={','.join(map(str, seeds))}"] if list(seeds) != [0] else []
    return shlex.join(["filtrun", *several, *kept, *overrides(dict(params)), *seed])


def counts(result: Mapping[str, Any]) -> str:
    """``20 trials tried: 14 complete, 5 pruned, 1 failed``."""
    states = [t["state"] for t in result["trials"]]
    found = [f"{states.count(s)} {'failed' if s == 'fail' else s}" for s in STATES if s in states]
    return f"{result['tried']} trials tried" + (f": {', '.join(found)}" if found else "")


def show(result: Mapping[str, Any], line: str | None) -> None:
    """Print the best trials, the importance of keys and the line to paste."""
    from rich.table import Table

    from filtrun.verbs import terminal

    done = [t for t in result["trials"] if t["state"] == "complete"]
    done.sort(key=lambda t: t["value"], reverse=result["direction"] == "maximize")
    keys = [d["key"] for d in result["space"]]
    table = Table("trial", result["metric"], *keys)
    for trial in done[:SHOWN]:
        table.add_row(str(trial["number"]), f"{trial['value']:.6g}", *(f"{trial['params'][k]}" for k in keys))
    terminal().print(table)
    print(f"{counts(result)}; measured on the {result['split']} split, mean of seeds {_seeds(result['seeds'])}")
    if result["importance"] is not None:
        told = ", ".join(f"{key} {share:.0%}" for key, share in result["importance"].items())
        print(f"importance of keys (PED-ANOVA): {told}")
    else:
        print(f"importance of keys: not computed, {result['importance_note']}")
    if line:
        print(line)


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
