"""The space, the ask-and-tell loop with a known optimum, going on, pruning, and the command at smoke scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from filtrun.errors import UserError
from filtrun.search.loop import TrialFailed, search
from filtrun.search.space import Dimension, grid, overrides, parse_space

pytest.importorskip("optuna")
from filtrun.search.study import Study  # noqa: E402

X = [Dimension("x", "range", (0.0, 1.0))]


def test_space_is_read() -> None:
    space, plain = parse_space(["method=full", "lr=log(1e-4,1e-1)", "k=int(1,3)", "r=choice(2,4)"])
    assert plain == ["method=full"]
    assert [(d.kind, d.values) for d in space] == [("log", (1e-4, 0.1)), ("int", (1, 3)), ("choice", ("2", "4"))]
    points = grid(space[1:])
    assert len(points) == 6 and points[1] == {"k": 1, "r": "4"}
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


def run(folder: Path, trials: int, score: Any, **more: Any) -> tuple[int, dict[str, Any]]:
    study = Study(folder, X, {"metric": "m"}, "minimize")
    return search(study, score, [0, 1], trials, **more), study.result()


def bowl(params: dict[str, Any], seeds: Any) -> list[float]:
    return [(params["x"] - 0.3) ** 2 + 0.01 * (s - 0.5) for s in seeds]


def test_the_optimum_is_found_and_going_on_is_one_go(tmp_path: Path) -> None:
    failed, whole = run(tmp_path / "a", 40, bowl)
    assert failed == 0 and whole["tried"] == 40 and abs(whole["best"]["params"]["x"] - 0.3) < 0.03
    run(tmp_path / "b", 15, bowl)
    assert run(tmp_path / "b", 40, bowl)[1]["trials"] == whole["trials"]
    assert json.loads((tmp_path / "b" / "search.json").read_text())["best"] == whole["best"]
    with pytest.raises(UserError, match="holds another search"):
        Study(tmp_path / "b", [Dimension("x", "range", (0.0, 2.0))], {"metric": "m"}, "minimize")


def test_bad_trials_are_pruned_and_failures_counted(tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(params: dict[str, Any], seeds: Any) -> list[float]:
        asked.extend(seeds)
        return bowl(params, seeds)

    _, found = run(tmp_path / "p", 20, counting, prune=True)
    pruned = sum(t["state"] == "pruned" for t in found["trials"])
    assert pruned > 0 and len(asked) == 40 - pruned

    def fails(params: dict[str, Any], seeds: Any) -> list[float]:
        raise TrialFailed("nan")

    assert run(tmp_path / "f", 2, fails)[0] == 2


def test_a_dead_process_trial_is_taken_over(tmp_path: Path) -> None:
    study = Study(tmp_path, X, {"metric": "m"}, "minimize")
    asked = study.ask(3)
    assert asked is not None
    study.held.pop(0).release()
    _, found = run(tmp_path, 3, bowl)
    assert found["tried"] == 3 and found["trials"][0]["params"] == asked[1]


def test_the_command(cli: Any, stages_root: Path) -> None:
    words = ["search", "scale=smoke", "device=cpu", "logger=none", f"stages.root={stages_root}", "method=full",
             "data=digits", "model=resnet20", "model.width=4", "--study", "s"]  # fmt: skip
    told = cli(*words, "trainer.lr=log(1e-3,1e-2)", "--metric", "test/acuracy")
    assert told.code == 2 and "test/accuracy" in told.err and not Path("outputs/sweeps").exists()
    done = cli(*words, "trainer.lr=log(1e-3,1e-2)", "--metric", "test/accuracy", "--trials", "2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["tried"] == 2 and found["split"] == "val" and "task.split=val" in found["command"]
    assert found["direction"] == "maximize" and len(list(Path("outputs/sweeps").glob("*/record.json"))) == 2
    again = cli(
        *words, "threads=1", "trainer.lr=log(1e-3,1e-2)", "--metric", "test/accuracy", "--trials", "2", "--json"
    )
    assert again.code == 0 and json.loads(again.out)["trials"] == found["trials"]
