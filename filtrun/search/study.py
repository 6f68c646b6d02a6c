"""The stored study: Optuna's journal in ``outputs/searches/NAME``, shared by all processes that work on it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from filtrun.errors import UserError
from filtrun.search.importance import importance
from filtrun.search.journal import storage
from filtrun.search.space import Dimension, grid, written

SCHEMA = 1
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "hyperband")


def optuna() -> Any:
    """The package, quiet. Raises UserError when the extra is not installed."""
    try:
        import optuna as found
    except ImportError as error:
        raise UserError("filtrun search needs Optuna: pip install '.[search]'") from error
    found.logging.set_verbosity(found.logging.ERROR)
    warnings.filterwarnings("ignore", category=found.exceptions.ExperimentalWarning)
    return found


class Study:
    """Asks for trials up to a number that all processes share, and takes over those whose process died.

    `about` says what is searched, as JSON values. `evaluations` is the most a trial can have (for hyperband).

    Raises UserError when `folder` holds a search of something else, or one that is made otherwise.
    """

    def __init__(
        self, folder: Path, space: Sequence[Dimension], about: dict[str, Any], direction: str, *,
        sampler: str = "tpe", pruner: str = "none", seed: int = 0, evaluations: int = 1,
    ) -> None:  # fmt: skip
        self.optuna, self.folder, self.space, self.sampler, self.seed = optuna(), folder, space, sampler, seed
        self.prunes = pruner != "none"
        self.points = grid(space) if sampler == "grid" else None
        how = {"direction": direction, "sampler": sampler, "pruner": pruner, "sampler_seed": seed}
        self.about = json.loads(json.dumps({**about, **how, "space": [asdict(d) for d in space]}))
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".lock")
        self.held: dict[int, FileLock] = {}
        with self.lock:
            self._same()
            self.study = self.optuna.create_study(
                storage=storage(self.optuna, folder), study_name="search", load_if_exists=True,
                direction=direction, pruner=_pruner(self.optuna, pruner, evaluations),
            )  # fmt: skip

    def _same(self) -> None:
        path = self.folder / "space.json"
        if not path.exists():
            write_json(path, self.about)
            return
        before = json.loads(path.read_text())
        for key, now in self.about.items():
            if key in before and before[key] != now:
                raise UserError(
                    f"{self.folder} holds another search: {key.replace('_', ' ')} is {_told(key, before[key])} there, "
                    f"not {_told(key, now)}; choose another --study, or give what it was begun with"
                )

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
            seed = self.seed + len(counted)  # a search gone on with draws what one go would
            samplers = self.optuna.samplers
            self.study.sampler = (
                samplers.TPESampler(seed=seed, constant_liar=True) if self.sampler == "tpe"
                else samplers.RandomSampler(seed=seed)
            )  # fmt: skip
            trial = self.study.ask()
            lock = self.held[trial.number] = FileLock(self._lock_of(trial.number))
            lock.acquire()
            return trial, {d.key: d.suggest(trial) for d in self.space}

    def elsewhere(self) -> int:
        """Trials that other living processes are at."""
        running = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,))
        return sum(t.number not in self.held for t in running)

    def worse(self, trial: Any, step: int, value: float) -> bool:
        """Note an intermediate value and say whether the trial is to be pruned."""
        trial.report(value, step)
        return bool(trial.should_prune())

    def _lock_of(self, number: int) -> Path:
        return self.folder / f".trial-{number}.lock"

    def _take_over(self) -> None:
        """Queue again the values of trials that no living process works on."""
        running = self.optuna.trial.TrialState.RUNNING
        for trial in self.study.get_trials(states=(running,)):
            if trial.number in self.held:
                continue
            try:
                with FileLock(self._lock_of(trial.number), timeout=0):
                    if self.study.get_trials(deepcopy=False)[trial.number].state == running:  # it may just have ended
                        self._abandon(trial.number, trial.params)
            except Timeout:
                continue
            self._lock_of(trial.number).unlink(missing_ok=True)

    def _abandon(self, number: int, params: dict[str, Any]) -> None:
        trial = self.optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)
        trial.set_user_attr("abandoned", True)
        self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        if len(params) == len(self.space):
            self.study.enqueue_trial(params)

    def let_go(self, trial: Any, params: dict[str, Any]) -> None:
        """Leave a trial that was begun to whoever goes on: it does not count, and its values are queued again."""
        with self.lock:
            self._abandon(trial.number, params)
        self._release(trial.number)

    def tell(self, trial: Any, value: float | None, state: str = "COMPLETE", why: str = "") -> None:
        """Store how a trial ended: COMPLETE with its value, PRUNED, or FAIL and why."""
        if why:
            trial.set_user_attr("error", why)
        self.study.tell(trial, value if state == "COMPLETE" else None, state=self.optuna.trial.TrialState[state])
        self._release(trial.number)

    def _release(self, number: int) -> None:
        self.held.pop(number).release()
        self._lock_of(number).unlink(missing_ok=True)

    def result(self) -> dict[str, Any]:
        """What is kept in ``search.json``: what was searched, every trial, the best; written here atomically."""
        states = self.optuna.trial.TrialState
        rows = [
            {
                "number": t.number, "state": t.state.name.lower(), "value": t.value, "params": t.params,
                "evaluations": len(t.intermediate_values),
            } | ({"error": t.user_attrs["error"]} if "error" in t.user_attrs else {})
            for t in self.counted() if t.state != states.WAITING
        ]  # fmt: skip
        done = [r for r in rows if r["state"] == "complete"]
        done.sort(key=lambda r: r["value"], reverse=self.about["direction"] == "maximize")
        weights, note = importance(self.optuna, self.study, [d.key for d in self.space])
        found = {
            "schema": SCHEMA, **self.about, "tried": len(rows), "best": done[0] if done else None,
            "importance": weights, "importance_note": note, "trials": rows,
        }  # fmt: skip
        with self.lock:
            write_json(self.folder / "search.json", found)
        return found


def _pruner(optuna: Any, name: str, evaluations: int) -> Any:
    if name == "median":
        return optuna.pruners.MedianPruner()
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(1, evaluations))
    return optuna.pruners.NopPruner()


def _told(key: str, value: Any) -> str:
    if key == "space":
        return ", ".join(written(d["key"], d["kind"], d["values"]) for d in value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_json(path: Path, value: Any) -> None:
    """Replace a file in one piece."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    work.write_text(json.dumps(value, indent=1))
    os.replace(work, path)
