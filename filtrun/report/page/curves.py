"""Learning curves of runs, thinned out: what a chart cannot show a page need not hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

POINTS = 300
"""The most points of one curve."""
TOTAL = 180_000
"""Points of all curves of a page together; with very many curves each still has `LEAST`."""
LEAST = 12
FILE = "metrics.jsonl"
_NONE = ("step", "time")
Curve = list[list[float]]


def curves_of(folders: Sequence[Path]) -> list[dict[str, Curve]]:
    """For each run folder its curves: name -> [steps, values], thinned so that all together fit a page."""
    counts = [_length(folder / FILE) for folder in folders]
    each = max(LEAST, min(POINTS, TOTAL // max(1, sum(counts))))
    return [
        {name: [_short(x), _short(y)] for name, (x, y) in ((n, thinned(*c, each)) for n, c in read(f / FILE).items())}
        for f in folders
    ]


def read(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Every number logged, by name: (steps, values). Lines that are none, such as a torn last one, are left out."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    if path.is_symlink() or not path.is_file():
        return found
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                step = values.get("step") if isinstance(values, dict) else None
                if not _number(step):
                    continue
                for name, value in values.items():
                    if name not in _NONE and _number(value):
                        steps, numbers = found.setdefault(str(name), ([], []))
                        steps.append(step)
                        numbers.append(value)
    except OSError:
        return found
    return found


def thinned(steps: list[float], values: list[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points of a curve: first and last, and of each stretch between the lowest and the highest."""
    if len(steps) <= most:
        return steps, values
    stretches = max(1, (most - 2) // 2)
    last = len(steps) - 1
    chosen = {0, last}
    for i in range(stretches):
        begin, end = 1 + i * (last - 1) // stretches, 1 + (i + 1) * (last - 1) // stretches
        if begin < end:
            chosen |= {min(range(begin, end), key=values.__getitem__), max(range(begin, end), key=values.__getitem__)}
    kept = sorted(chosen)
    return [steps[i] for i in kept], [values[i] for i in kept]


def _length(path: Path) -> int:
    """How many curves a file holds, by its first line that is one; files hold alike lines."""
    if path.is_symlink() or not path.is_file():
        return 0
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            values = json.loads(stream.readline())
            return len([name for name in values if name not in _NONE]) if isinstance(values, dict) else 0
    except (OSError, ValueError, RecursionError):
        return 0


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(values: list[float]) -> list[float]:
    """Five figures are more than a chart can show."""
    return [v if isinstance(v, int) else int(v) if v.is_integer() and abs(v) < 1e6 else float(f"{v:.5g}")
            for v in values]  # fmt: skip
