"""The space, the ask-and-tell loop with a known optimum, going on, pruning, several processes, what is printed."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import UserError
from filtrun.search import shown
from filtrun.search.space import Dimension, grid, overrides, parse_space

pytest.importorskip("optuna")
from filtrun.search.loop import News, TrialFailed, search  # noqa: E402
from filtrun.search.study import Study  # noqa: E402

X = [Dimension("x", "range", (0.0, 1.0))]


def test_space_is_read() -> None:
    space, plain = parse_space(["method=full", "lr=log(1e-4,1e-1)", "k=int(1,3)", "r=choice(2,4)"])
    assert plain == ["method=full"]
    assert [(d.kind, d.values) for d in space] == [("log", (1e-4, 0.1)), ("int", (1, 3)), ("choice", ("2", "4"))]
    points = grid(space[1:])
    assert len(points) == 6 and points[1] == {"k": 1, "r": "4"}
    lists, _ = parse_space(["t=choice([7,8], 9, 'a,b', {c: 1, d: 2})"])
    assert lists[0].values == ("[7,8]", "9", "'a,b'", "{c: 1, d: 2}")
    assert overrides({"a": 1e-05, "k": 2, "r": "x"}) == ["a=1e-05", "k=2", "r=x"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("lr=lg(1,2)", "did you mean 'log'"), ("lr=log(0,1)", "above 0"), ("k=int(1,2.5)", "two whole numbers"),
        ("r=choice(1,1)", "must differ"), ("lr=1", "nothing to search"), ("lr=range(2,1)", "less than"),
    ],
)  # fmt: skip
def test_a_bad_space_is_told(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_space([word])


class Function:
    """Cells that are a function of the values and the seed, and of the evaluation within a run: no processes."""

    def __init__(self, function: Any, rungs: int = 0) -> None:
        self.function, self.rungs = function, rungs
        self.waiting: list[News] = []
        self.jobs: dict[int, tuple[dict[str, Any], int]] = {}
        self.asked: list[tuple[int, int]] = []  # seed, evaluation (from 1; 0: the run's end)
        self.most = 0
        self.count = 0

    def make(self, params: dict[str, Any], seeds: Any) -> list[Any]:
        if params["x"] > 0.95 and self.function is picky:
            raise TrialFailed("no run can have this")
        return [(params, seed) for seed in seeds]

    def start(self, job: Any) -> int:
        number, self.count = self.count, self.count + 1
        self.jobs[number] = job
        self.most = max(self.most, len(self.jobs))
        self._turn(number, 1 if self.rungs else 0)
        return number

    def _turn(self, cell: int, rung: int) -> None:
        params, seed = self.jobs[cell]
        self.asked.append((seed, rung))
        try:
            self.waiting.append(News(cell, self.function(params, seed), rung=rung))
        except TrialFailed as error:
            self.waiting.append(News(cell, failed=str(error)))

    def news(self) -> list[News]:
        found, self.waiting = self.waiting, []
        for each in found:
            if not each.rung:
                del self.jobs[each.cell]
        return found

    def answer(self, cell: int, rung: int, go_on: bool) -> None:
        if go_on:
            self._turn(cell, (rung + 1) % (self.rungs + 1))
        else:
            del self.jobs[cell]

    def busy(self) -> int:
        return len(self.jobs)


def bowl(params: dict[str, Any], seed: int) -> float:
    return (params["x"] - 0.3) ** 2 + 0.01 * (seed - 0.5)


def picky(params: dict[str, Any], seed: int) -> float:
    if params["x"] < 0.2:
        raise TrialFailed("nan")
    return bowl(params, seed)


def run(folder: Path, trials: int, function: Any = bowl, rungs: int = 0, study: Any = None, **more: Any) -> Any:
    """(failed, result, cells) of a search over x with two seeds."""
    made = Study(folder, X, {"metric": "m"}, "minimize", evaluations=2 * (rungs + 1), **(study or {}))
    cells = Function(function, rungs)
    return search(made, cells, [0, 1], trials, rungs=rungs, **more), made.result(), cells


def test_the_optimum_of_the_mean_over_seeds_is_found_and_going_on_is_one_go(tmp_path: Path) -> None:
    failed, whole, _ = run(tmp_path / "a", 40)
    assert failed == 0 and whole["tried"] == 40 and abs(whole["best"]["params"]["x"] - 0.3) < 0.03
    for trial in whole["trials"]:
        values = [bowl(trial["params"], seed) for seed in (0, 1)]
        assert trial["value"] == pytest.approx(sum(values) / 2, abs=1e-15)
    run(tmp_path / "b", 15)
    assert run(tmp_path / "b", 40)[1]["trials"] == whole["trials"]
    assert json.loads((tmp_path / "b" / "search.json").read_text())["best"] == whole["best"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"space": [Dimension("x", "range", (0.0, 2.0))]}, r"space is x=range\(0.0,1.0\) there, not x=range\(0.0,2."),
        ({"sampler": "random"}, "sampler is tpe there, not random"),
        ({"pruner": "median"}, "pruner is none there, not median"),
        ({"seed": 4}, "sampler seed is 0 there, not 4"),
        ({"about": {"metric": "n"}}, "metric is m there, not n"),
        ({"direction": "maximize"}, "direction is minimize there, not maximize"),
    ],
)  # fmt: skip
def test_a_search_is_not_gone_on_with_otherwise(tmp_path: Path, more: dict[str, Any], told: str) -> None:
    def made(space: Any = X, about: Any = None, direction: str = "minimize", **rest: Any) -> Study:
        return Study(tmp_path, space, about or {"metric": "m"}, direction, **rest)

    made()
    made()
    with pytest.raises(UserError, match=told) as error:
        made(**more)
    assert len(str(error.value).splitlines()) == 1


def test_after_each_seed_bad_trials_are_pruned(tmp_path: Path) -> None:
    _, found, cells = run(tmp_path, 20, study={"pruner": "median"})
    pruned = sum(t["state"] == "pruned" for t in found["trials"])
    assert pruned > 0 and len(cells.asked) == 40 - pruned
    values = {t["state"]: [] for t in found["trials"]}
    for trial in found["trials"]:
        values[trial["state"]].append(bowl(trial["params"], 0))
    assert min(values["pruned"]) > min(values["complete"])


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_within_a_run_too(tmp_path: Path, pruner: str) -> None:
    _, found, cells = run(tmp_path, 30, rungs=3, study={"pruner": pruner, "sampler": "random"})
    pruned = [t for t in found["trials"] if t["state"] == "pruned"]
    assert any(t["evaluations"] < 4 for t in pruned)  # in the run of the first seed
    assert sum(t["state"] == "complete" for t in found["trials"]) + len(pruned) == 30
    assert len(cells.asked) < 30 * 2 * 4
    # a seed's end is no evaluation that is waited with, and the last one's is the trial's value
    evaluations = sum(t["evaluations"] for t in found["trials"])
    assert evaluations == len(cells.asked) - sum(t["state"] == "complete" for t in found["trials"])


def test_failures_count_and_say_why(tmp_path: Path) -> None:
    ends: list[Any] = []
    failed, found, _ = run(tmp_path, 20, picky, study={"sampler": "random"}, ended=lambda *told: ends.append(told))
    bad = [t for t in found["trials"] if t["state"] == "fail"]
    assert found["tried"] == 20 and failed == len(bad) > 0
    for trial in found["trials"]:
        x = trial["params"]["x"]
        assert trial.get("error") == ("nan" if x < 0.2 else "no run can have this" if x > 0.95 else None)
    assert {e[0]: e[4] for e in ends} == {t["number"]: t.get("error", "") for t in found["trials"]}


def test_several_at_a_time_share_the_budget(tmp_path: Path) -> None:
    _, found, cells = run(tmp_path, 21, workers=6)
    assert found["tried"] == 21 and cells.most == 6 and cells.count == 42
    assert len({t["params"]["x"] for t in found["trials"]}) == 21
    assert not list(tmp_path.glob(".trial-*"))


def test_a_grid_is_tried_once_also_by_several(tmp_path: Path) -> None:
    space = [Dimension("x", "int", (0, 3)), Dimension("r", "choice", ("a", "b"))]
    made = Study(tmp_path, space, {}, "minimize", sampler="grid")
    search(made, Function(bowl), [0], 100, workers=3)
    assert sorted((t["params"]["x"], t["params"]["r"]) for t in made.result()["trials"]) == [
        (x, r) for x in range(4) for r in "ab"
    ]


def test_no_trial_begins_after_the_timeout(tmp_path: Path) -> None:
    _, found, _ = run(tmp_path, 20, timeout=0)
    assert found["tried"] == 0 and found["best"] is None

    def slow(params: dict[str, Any], seed: int) -> float:
        time.sleep(0.05)
        return bowl(params, seed)

    _, found, _ = run(tmp_path, 1000, slow, timeout=0.3)
    assert 1 <= found["tried"] <= 6 and {t["state"] for t in found["trials"]} == {"complete"}


def test_a_trial_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    study = Study(tmp_path, X, {"metric": "m"}, "minimize")
    asked = study.ask(3)
    assert asked is not None
    study.held.pop(0).release()  # as when a process dies
    _, found, _ = run(tmp_path, 3)
    assert found["tried"] == 3 and found["trials"][0]["params"] == asked[1]


def test_whatever_ends_a_search_its_trials_are_left_to_the_next(tmp_path: Path) -> None:
    def stops(params: dict[str, Any], seed: int) -> float:
        if seed:
            raise KeyboardInterrupt
        return bowl(params, seed)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 5, stops)
    assert not list(tmp_path.glob(".trial-*"))
    _, found, _ = run(tmp_path, 5)
    assert found["tried"] == 5 and {t["state"] for t in found["trials"]} == {"complete"}


def test_processes_share_one_study(tmp_path: Path) -> None:
    """Three processes, one of which dies hard in the middle of a trial: each point once, the budget met exactly."""
    script = tmp_path / "part.py"
    script.write_text(PART.format(here=str(Path(__file__).parent)))
    parts = [
        subprocess.Popen([sys.executable, script, tmp_path / "study", kind], stdout=subprocess.PIPE, text=True)
        for kind in ("dies", "works", "works")
    ]
    outs = [part.communicate(timeout=120)[0] for part in parts]
    assert [part.returncode for part in parts] == [-signal.SIGKILL, 0, 0]
    found = json.loads((tmp_path / "study" / "search.json").read_text())
    numbers = [t["number"] for t in found["trials"]]
    assert found["tried"] == 16 and {t["state"] for t in found["trials"]} == {"complete"}
    assert len({t["params"]["x"] for t in found["trials"]}) == 16
    ran = [int(n) for out in outs for n in out.split()]
    assert sorted(ran) == sorted(numbers)


def test_a_process_killed_while_it_writes_leaves_a_study_that_works(tmp_path: Path) -> None:
    script = tmp_path / "part.py"
    script.write_text(KILLED.format(here=str(Path(__file__).parent)))
    process = subprocess.run([sys.executable, script, tmp_path / "study"])
    assert process.returncode == -signal.SIGKILL
    journal = tmp_path / "study" / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "wor')  # half a line, as a loss of power may leave it
    _, found, _ = run(tmp_path / "study", 5)
    assert found["tried"] == 5 and {t["state"] for t in found["trials"]} == {"complete"}
    assert journal.read_bytes().startswith(whole) and all(map(json.loads, journal.read_text().splitlines()))


KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("shared", {here!r} + "/test_search.py")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
writes, fsync = [], os.fsync

def dies(number):
    writes.append(number)
    if len(writes) == 12:
        os.kill(os.getpid(), signal.SIGKILL)  # the journal is locked now
    fsync(number)

os.fsync = dies
shared.run(Path(sys.argv[1]), 16)
"""

PART = """
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("shared", {here!r} + "/test_search.py")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
done = []

def slow(params, seed):
    time.sleep(0.05)
    if sys.argv[2] == "dies" and len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return shared.bowl(params, seed)

def ended(number, *rest):
    done.append(number)
    print(number, flush=True)

shared.run(Path(sys.argv[1]), 16, slow, ended=ended)
"""


def test_importance_of_keys(tmp_path: Path) -> None:
    space = [Dimension("x", "range", (0.0, 1.0)), Dimension("y", "range", (0.0, 1.0))]
    made = Study(tmp_path, space, {}, "minimize", sampler="random")
    search(made, Function(bowl), [0], 9)
    few = made.result()
    assert few["importance"] is None and few["importance_note"] == "9 of at least 10 complete trials"
    search(made, Function(bowl), [0], 60)
    found = made.result()["importance"]
    assert list(found) == ["x", "y"] and found["x"] > 0.9 and sum(found.values()) == pytest.approx(1)
    assert run(tmp_path / "one", 12)[1]["importance_note"] == "only one key is searched"


def test_the_line_to_paste_is_for_a_shell_and_reports_the_test_split() -> None:
    words = ["method=full", "data.root=/my data/x", "task.split=val", "data.target=[0, 1]", "+task.split=val"]
    line = shown.command(words, {"trainer.lr": 1e-05, "r": "it's"}, [0])
    assert shlex.split(line) == [
        "filtrun", "method=full", "data.root=/my data/x", "data.target=[0, 1]", "trainer.lr=1e-05", "r=it's",
    ]  # fmt: skip
    assert shlex.split(shown.command(["method=full"], {}, [0, 3])) == ["filtrun", "-m", "method=full", "seed=0,3"]
    assert shlex.split(shown.command(["method=full"], {}, [2])) == ["filtrun", "method=full", "seed=2"]
