"""The loop of a search: ask, run the seeds' cells, tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from filtrun.search.study import Study

Score = Callable[[dict[str, Any], Sequence[int]], list[float]]
"""Values of the searched keys and seeds -> the metric of each seed. Raises TrialFailed."""

Ended = Callable[[int, str, float | None, dict[str, Any], str], None]
"""Told a trial's number, state, mean, values and why it failed."""


class TrialFailed(Exception):
    """A cell of a trial has no usable result."""


def search(
    study: Study, score: Score, seeds: Sequence[int], trials: int, *, prune: bool = False,
    timeout: float | None = None, ended: Ended = lambda *_: None,
) -> int:  # fmt: skip
    """Try until `trials` exist or `timeout` seconds are over; returns how many trials failed here.

    With `prune` the seeds run one after the other, and a trial whose running mean is worse than the median stops.
    """
    started, failed = time.monotonic(), 0
    while timeout is None or time.monotonic() - started < timeout:
        asked = study.ask(trials)
        if asked is None:
            break
        trial, params = asked
        values: list[float] = []
        state, why = "COMPLETE", ""
        try:
            for part in [[s] for s in seeds] if prune else [list(seeds)]:
                values += score(params, part)
                if not all(math.isfinite(v) for v in values):
                    raise TrialFailed("the metric is not finite")
                if prune and len(values) < len(seeds):
                    trial.report(sum(values) / len(values), len(values))
                    if trial.should_prune():
                        state = "PRUNED"
                        break
        except TrialFailed as error:
            state, why = "FAIL", str(error)
            failed += 1
        mean = sum(values) / len(values) if values and state != "FAIL" else None
        study.tell(trial, mean, state)
        ended(trial.number, state, mean, params, why)
    return failed
