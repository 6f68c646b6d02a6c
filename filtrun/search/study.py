"""The stored study: Optuna's journal in ``outputs/searches/NAME``, shared by all processes that work on it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from filtrun.errors import UserError
from filtrun.search.space import Dimension, grid

SCHEMA = 1
SAMPLERS = ("tpe", "random", "grid")


def optuna() -> Any:
    """The package, quiet. Raises UserError when the extra is not installed."""
    try:
        import optuna as found
    except ImportError as error:
        raise UserError("filtrun search needs Optuna: pip install '.[search]'") from error
    found.logging.set_verbosity(found.logging.ERROR)
    return found


class Study:
    """Asks for trials up to a number that all processes share, and takes over those whose process died.

    Raises UserError when `folder` holds a search of something else (`about`: what is searched, as JSON values).
    """

    def __init__(
        self, folder: Path, space: Sequence[Dimension], about: dict[str, Any], direction: str, *,
        sampler: str = "tpe", seed: int = 0,
    ) -> None:  # fmt: skip
        self.optuna, self.folder, self.space, self.sampler, self.seed = optuna(), folder, space, sampler, seed
        self.points = grid(space) if sampler == "grid" else None
        self.about = json.loads(json.dumps({**about, "direction": direction, "space": [asdict(d) for d in space]}))
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".lock")
        self.held: dict[int, FileLock] = {}
        with self.lock:
            self._same()
            backend = self.optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
            self.study = self.optuna.create_study(
                storage=self.optuna.storages.JournalStorage(backend), study_name="search", load_if_exists=True,
                direction=direction, pruner=self.optuna.pruners.MedianPruner(),
            )  # fmt: skip

    def _same(self) -> None:
        path = self.folder / "space.json"
        if path.exists():
            before = json.loads(path.read_text())
            changed = [k for k in {**before, **self.about} if before.get(k) != self.about.get(k)]
            if changed:
                raise UserError(
                    f"{self.folder} holds another search ({', '.join(changed)} differs); choose another --study"
                )
        else:
            write_json(path, self.about)

    def counted(self) -> list[Any]:
        """The trials that were tried or are being tried: all but those whose process died."""
        return [t for t in self.study.get_trials(deepcopy=False) if not t.user_attrs.get("abandoned")]

    def ask(self, trials: int) -> tuple[Any, dict[str, Any]] | None:
        """The next trial with its values, or None when `trials` of them exist (or the grid is done)."""
        with self.lock:
            self._take_over()
            counted = self.counted()
            limit = min(trials, len(self.points)) if self.points is not None else trials
            states = self.optuna.trial.TrialState
            if sum(t.state != states.WAITING for t in counted) >= limit:
                return None
            if self.points is not None and not any(t.state == states.WAITING for t in counted):
                tried = [t.params for t in counted]
                self.study.enqueue_trial(next(p for p in self.points if p not in tried))
            kind = self.optuna.samplers.RandomSampler if self.sampler != "tpe" else self.optuna.samplers.TPESampler
            self.study.sampler = kind(seed=self.seed + len(counted))  # a search gone on with draws what one go would
            trial = self.study.ask()
            lock = self.held[trial.number] = FileLock(self.folder / f".trial-{trial.number}.lock")
            lock.acquire()
            return trial, {d.key: d.suggest(trial) for d in self.space}

    def _take_over(self) -> None:
        """Queue again the values of trials that no living process works on."""
        for trial in self.study.get_trials(states=(self.optuna.trial.TrialState.RUNNING,)):
            if trial.number in self.held:
                continue
            lock = FileLock(self.folder / f".trial-{trial.number}.lock", timeout=0)
            try:
                with lock:
                    self._abandon(trial.number, trial.params)
            except Timeout:
                continue

    def _abandon(self, number: int, params: dict[str, Any]) -> None:
        trial = self.optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)
        trial.set_user_attr("abandoned", True)
        self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        if len(params) == len(self.space):
            self.study.enqueue_trial(params)

    def tell(self, trial: Any, value: float | None, state: str = "COMPLETE") -> None:
        """Store how a trial ended: COMPLETE with its value, PRUNED or FAIL."""
        self.study.tell(trial, value if state == "COMPLETE" else None, state=self.optuna.trial.TrialState[state])
        self.held.pop(trial.number).release()
        (self.folder / f".trial-{trial.number}.lock").unlink(missing_ok=True)

    def result(self) -> dict[str, Any]:
        """What is kept in ``search.json``: what was searched, every trial, the best; written here atomically."""
        rows = [
            {"number": t.number, "state": t.state.name.lower(), "value": t.value, "params": t.params}
            for t in self.counted()
        ]
        done = [r for r in rows if r["state"] == "complete"]
        done.sort(key=lambda r: r["value"], reverse=self.about["direction"] == "maximize")
        found = {"schema": SCHEMA, **self.about, "tried": len(rows), "best": done[0] if done else None, "trials": rows}
        with self.lock:
            write_json(self.folder / "search.json", found)
        return found


def write_json(path: Path, value: Any) -> None:
    """Replace a file in one piece."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(json.dumps(value, indent=1))
    os.replace(work, path)
