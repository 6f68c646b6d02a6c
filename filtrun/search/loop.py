"""The loop of a search: ask for trials, hand their cells to workers, prune by what these measure, tell."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from filtrun.search.study import Study

LOOK = 0.05
"""Seconds between two looks at the cells; for other processes' trials it is `ELSEWHERE`."""
ELSEWHERE = 0.5

Ended = Callable[[int, str, float | None, dict[str, Any], str], None]
"""Told a trial's number, state, mean, values and why it failed."""


class TrialFailed(Exception):
    """A trial's cells cannot be made, or one has no usable result."""


@dataclass(frozen=True)
class News:
    """Of a cell: its final `value`, why it `failed`, or its value at evaluation `rung`, after which it waits."""

    cell: int
    value: float | None = None
    failed: str = ""
    rung: int = 0


class Cells(Protocol):
    """Who runs the cells of trials."""

    def make(self, params: dict[str, Any], seeds: Sequence[int]) -> list[Any]:
        """A job for each seed. Raises TrialFailed."""

    def start(self, job: Any) -> int:
        """Hand a job over; returns the number that `news` names it by."""

    def news(self) -> list[News]:
        """What has happened since the last call; does not wait."""

    def answer(self, cell: int, rung: int, go_on: bool) -> None:
        """Let a cell that waits go on, or end: then it has no further news."""

    def busy(self) -> int:
        """Cells that have not ended."""


@dataclass
class _Trying:
    trial: Any
    params: dict[str, Any]
    jobs: list[Any]
    cells: dict[int, int] = field(default_factory=dict)  # cell -> place of its seed
    values: dict[int, float] = field(default_factory=dict)


class _Search:
    """One process's part of a search."""

    def __init__(self, study: Study, cells: Cells, seeds: Sequence[int], rungs: int, ended: Ended) -> None:
        self.study, self.cells, self.seeds, self.rungs, self.ended = study, cells, list(seeds), rungs, ended
        self.trying: list[_Trying] = []
        self.failed = 0

    def begin(self, trial: Any, params: dict[str, Any]) -> None:
        mine = _Trying(trial, params, [])
        self.trying.append(mine)
        try:
            mine.jobs = self.cells.make(params, self.seeds)
        except TrialFailed as error:
            self.end(mine, "FAIL", why=str(error))
            return
        for place in range(1 if self.study.prunes else len(mine.jobs)):
            mine.cells[self.cells.start(mine.jobs[place])] = place

    def hear(self, news: News) -> None:
        """What a cell says is the trial's; of trials that are over nobody cares."""
        mine = next((t for t in self.trying if news.cell in t.cells), None)
        if mine is None:
            if news.rung:
                self.cells.answer(news.cell, news.rung, False)
            return
        place = mine.cells[news.cell]
        if news.rung:
            known = [mine.values[p] for p in range(place)]
            assert news.value is not None
            pruned = self.study.worse(mine.trial, self._step(place, news.rung), _mean([*known, news.value]))
            self.cells.answer(news.cell, news.rung, not pruned)
            if pruned:
                self.end(mine, "PRUNED")
        elif news.value is None or not math.isfinite(news.value):
            self.end(mine, "FAIL", why=news.failed or "the metric is not finite")
        else:
            mine.values[place] = news.value
            self._next(mine, place)

    def _next(self, mine: _Trying, place: int) -> None:
        """After a seed: the trial's end, or with pruning its next seed."""
        mean = _mean(list(mine.values.values()))
        if len(mine.values) == len(self.seeds):
            self.end(mine, "COMPLETE", mean)
        elif self.study.prunes:
            if self.study.worse(mine.trial, self._step(place + 1, 0), mean):
                self.end(mine, "PRUNED")
            else:
                mine.cells[self.cells.start(mine.jobs[place + 1])] = place + 1

    def _step(self, seeds: int, rung: int) -> int:
        """Evaluations that a trial has had with `seeds` seeds done and `rung` evaluations of the next."""
        return seeds * (self.rungs + 1) + rung

    def end(self, mine: _Trying, state: str, mean: float | None = None, why: str = "") -> None:
        self.trying.remove(mine)
        self.failed += state == "FAIL"
        self.study.tell(mine.trial, mean, state, why)
        self.ended(mine.trial.number, state, mean, mine.params, why)


def search(
    study: Study, cells: Cells, seeds: Sequence[int], trials: int, *, workers: int = 1, rungs: int = 0,
    timeout: float | None = None, ended: Ended = lambda *_: None,
) -> int:  # fmt: skip
    """Try until `trials` exist or `timeout` seconds are over; returns how many trials failed here.

    New trials are asked for as long as fewer than `workers` cells are in hand. Where the study prunes, the seeds of a
    trial run one after the other, and after each as after each of the `rungs` evaluations within a run the mean so far
    decides whether the trial goes on. Trials other processes are at are waited for: one whose process dies is taken
    over. Whatever ends this loop, trials that have not ended are left to the next process.
    """
    begun, mine = time.monotonic(), _Search(study, cells, seeds, rungs, ended)
    with _between_turns() as check, _left_to_the_next(study, mine):
        while True:
            check()
            late = timeout is not None and time.monotonic() - begun >= timeout
            while not late and cells.busy() < workers and (asked := study.ask(trials)) is not None:
                mine.begin(*asked)
                late = timeout is not None and time.monotonic() - begun >= timeout
            if not mine.trying:
                if late or not study.elsewhere():
                    return mine.failed
                time.sleep(ELSEWHERE)
                continue
            news = cells.news()
            for each in news:
                mine.hear(each)
            if not news:
                time.sleep(LOOK)


@contextmanager
def _left_to_the_next(study: Study, mine: _Search) -> Iterator[None]:
    try:
        yield
    finally:
        for left in list(mine.trying):
            study.let_go(left.trial, left.params)


@contextmanager
def _between_turns() -> Iterator[Callable[[], None]]:
    """Ctrl-C, and SIGTERM alike, stop the loop where it calls what is yielded, not amid a change of the study.

    A second one stops it where it is.
    """
    came: list[int] = []
    before = {}

    def note(number: int, _frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        pass
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
