"""`filtrun search` with real cells at smoke scale: pruning within runs, dead workers, Ctrl-C, what it prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from filtrun.record import Record
from filtrun.sweeps.claims import holder

WORDS = ["scale=smoke", "device=cpu", "logger=none", "method=full", "data=digits", "model=resnet20", "model.width=4",
         "model.base=scratch"]  # fmt: skip
LR = "trainer.lr=log(1e-3,1e-2)"
ACCURACY = ["--metric", "test/accuracy", "--study", "s"]


@pytest.fixture
def search(cli: Any, stages_root: Path) -> Any:
    pytest.importorskip("optuna")

    def run(*words: str) -> Any:
        return cli("search", *WORDS, f"stages.root={stages_root}", *words)

    return run


def records() -> list[Record]:
    return [Record.read(path.parent) for path in sorted(Path("outputs/sweeps").glob("*/record.json"))]


def found() -> dict[str, Any]:
    return json.loads(Path("outputs/searches/s/search.json").read_text())


def test_without_optuna_one_line_says_what_to_install(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    told = cli("search", *WORDS, LR, *ACCURACY)
    assert told.code == 2 and told.out == ""
    assert told.err == "filtrun: filtrun search needs Optuna: pip install '.[search]'\n"
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([LR, *ACCURACY, "--sampler", "tpee"], "unknown sampler 'tpee'; did you mean 'tpe'?"),
        ([LR, *ACCURACY, "--pruner", "medain"], "unknown pruner 'medain'; did you mean 'median'?"),
        ([LR, *ACCURACY, "--sampler", "grid"], "trainer.lr=log(...): --sampler grid takes choice(...) and int(...)"),
        ([LR, *ACCURACY, "--rungs", "3"], "--rungs 3 goes with --pruner median or hyperband"),
        ([LR, *ACCURACY, "--prune", "--rungs", "0"], "--rungs 0 and one seed has nothing to prune by"),
        ([LR, *ACCURACY, "--prune", "--pruner", "hyperband"], "--prune means --pruner median, and --pruner hyperband"),
        ([LR, *ACCURACY, "--workers", "0"], "--trials and --workers must be at least 1"),
        ([LR, *ACCURACY, "seed=3"], "seed=3: a search takes the runs' seeds from --seeds N,N"),
        (["seed=int(0,3)", *ACCURACY], "seed=: a search takes the runs' seeds from --seeds N,N"),
        ([LR, "--metric", "test/acuracy", "--study", "s"], "--metric test/acuracy: no run has it; did you mean"),
        (["trainer.lrr=log(1e-3,1e-2)", *ACCURACY], "trainer.lr"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(search: Any, words: list[str], told: str) -> None:
    done = search(*words)
    assert done.code == 2 and told in done.err and not Path("outputs/sweeps").exists()


def test_a_small_search(search: Any) -> None:
    done = search(LR, *ACCURACY, "--trials", "2", "--seeds", "0,1", "--workers", "2", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["tried"] == 2 and told["split"] == "val" and told["direction"] == "maximize"
    assert told["setting"] == {
        "methods": ["full"], "task": "classify", "data": "digits", "model": "resnet20", "scale": "smoke",
    }  # fmt: skip
    for trial in told["trials"]:
        mine = [r for r in records() if r.config["trainer"]["lr"] == trial["params"]["trainer.lr"]]
        assert sorted(r.seed for r in mine) == [0, 1] and {r.config["task"]["split"] for r in mine} == {"val"}
        assert trial["value"] == pytest.approx(sum(r.metrics["test/accuracy"] for r in mine) / 2, abs=1e-12)
    best = told["best"]["params"]["trainer.lr"]
    assert shlex.split(told["command"])[:3] == ["filtrun", "-m", "scale=smoke"]
    assert shlex.split(told["command"])[-2:] == [f"trainer.lr={best!r}", "seed=0,1"]
    assert "task.split" not in told["command"] and told["importance_note"] == "only one key is searched"

    changed = {path: path.stat().st_mtime_ns for path in Path("outputs/sweeps").glob("*/record.json")}
    again = search("threads=1", LR, *ACCURACY, "--trials", "2", "--seeds", "0,1", "--json")
    assert again.code == 0 and json.loads(again.out)["trials"] == told["trials"]
    assert {path: path.stat().st_mtime_ns for path in changed} == changed
    other = search(LR, *ACCURACY, "--trials", "3")
    assert other.code == 2 and "seeds is 0, 1 there, not 0; choose another --study" in other.err
    late = search(LR, *ACCURACY, "--trials", "9", "--seeds", "0,1", "--timeout", "0")
    assert late.code == 0 and "2 trials tried: 2 complete; measured on the val split" in late.out


@pytest.mark.slow
def test_a_bad_trial_is_ended_in_the_middle_of_its_run(search: Any) -> None:
    rates = ["0.01", "0.012", "0.014", "0.016", "0.018", "1e-9"]
    done = search(
        f"trainer.lr=choice({','.join(rates)})", "trainer.steps=50", "data.few_shot=20", *ACCURACY, "--sampler",
        "grid", "--pruner", "median", "--trials", "20", "--workers", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    trials = found()["trials"]
    assert [t["params"]["trainer.lr"] for t in trials] == rates
    assert [t["state"] for t in trials] == ["complete"] * 5 + ["pruned"]
    steps = {r.config["trainer"]["lr"]: (r.status, r.cost["steps"]) for r in records()}
    assert {steps[float(rate)] for rate in rates[:5]} == {("finished", 50)}
    status, trained = steps[1e-9]
    assert status == "interrupted" and trained == 10 * trials[5]["evaluations"] < 50
    assert "6 trials tried: 5 complete, 1 pruned" in done.out and "trial 5 pruned" in done.err
    assert not list(Path("outputs/sweeps/.watch").iterdir())


@pytest.mark.slow
def test_a_worker_that_dies_takes_one_trial_along(search: Any) -> None:
    killed: list[int] = []

    def killer() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            for claim in Path("outputs/sweeps/.claims").glob("[0-9a-f]*"):
                log, who = claim.parent.parent / claim.name / "metrics.jsonl", holder(claim)
                if who is not None and who.pid and log.exists() and log.stat().st_size:
                    os.kill(who.pid, signal.SIGKILL)
                    killed.append(who.pid)
                    return
            time.sleep(0.002)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    done = search(LR, "trainer.steps=40", "trainer.log_every=1", *ACCURACY, "--trials", "4", "--workers", "2")
    thread.join()
    assert done.code == 1 and killed
    states = [(t["state"], t.get("error")) for t in found()["trials"]]
    assert sorted(states, key=str) == [("complete", None)] * 3 + [("fail", "worker died: signal 9 (SIGKILL)")]
    assert "4 trials tried: 3 complete, 1 failed" in done.out
    assert "fail: worker died: signal 9 (SIGKILL)" in done.err


@pytest.mark.slow
def test_ctrl_c_leaves_a_search_that_can_be_gone_on_with(search: Any, stages_root: Path, tmp_path: Path) -> None:
    words = [*WORDS, f"stages.root={stages_root}", LR, "trainer.steps=30", *ACCURACY, "--trials", "40"]
    log = tmp_path / "log"
    with log.open("w") as stream:
        part = subprocess.Popen(
            [sys.executable, "-m", "filtrun", "search", *words, "--workers", "2"], stderr=stream,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while "trial 1 complete" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        part.send_signal(signal.SIGINT)
        out, _ = part.communicate(timeout=120)
    told = log.read_text()
    left = found()
    assert part.returncode == 1, told  # as documented for all commands that are interrupted
    assert f"filtrun: interrupted after {left['tried']} of 40 trials; the same command goes on" in told
    assert "Traceback" not in told and {t["state"] for t in left["trials"]} == {"complete"}
    best = max(left["trials"], key=lambda t: t["value"])
    assert f"trainer.lr={best['params']['trainer.lr']!r}" in out.splitlines()[-1]
    assert not [r for r in records() if r.status == "running"]
    done = search(LR, "trainer.steps=30", *ACCURACY, "--trials", str(left["tried"] + 2), "--workers", "2")
    assert done.code == 0, done.err
    whole = found()
    assert whole["tried"] == left["tried"] + 2 and {t["state"] for t in whole["trials"]} == {"complete"}
    assert whole["trials"][: left["tried"]] == left["trials"]
    assert all(r.status == "finished" for r in records())  # those that were interrupted were gone on with


@pytest.mark.slow
def test_two_commands_share_a_search_and_one_may_be_killed(search: Any, stages_root: Path, tmp_path: Path) -> None:
    words = [*WORDS, f"stages.root={stages_root}", LR, "trainer.steps=30", "trainer.log_every=1", *ACCURACY,
             "--trials", "7", "--json"]  # fmt: skip
    command = [sys.executable, "-m", "filtrun", "search", *words]
    more: Any = {"text": True, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
    parts = []
    for name in ("one", "two"):
        with (tmp_path / name).open("w") as log:
            parts.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **more))
    deadline = time.monotonic() + 120
    while not all("trial" in (tmp_path / n).read_text() for n in ("one", "two")) and time.monotonic() < deadline:
        time.sleep(0.01)  # each has done its first
    parts[0].kill()
    out, _ = parts[1].communicate(timeout=120)
    parts[0].communicate()
    assert parts[1].returncode == 0, (tmp_path / "two").read_text()
    told = json.loads(out)
    assert (
        told["tried"] == 7
        and {t["state"] for t in told["trials"]} == {"complete"}
        and told == found() | {"command": told["command"]}
    )
    ends = [
        line.split()[1] for n in ("one", "two") for line in (tmp_path / n).read_text().splitlines() if "trial" in line
    ]
    assert len(ends) == len(set(ends)) == 7 and set(map(int, ends)) == {t["number"] for t in told["trials"]}
    rates = sorted(t["params"]["trainer.lr"] for t in told["trials"])
    assert sorted(r.config["trainer"]["lr"] for r in records() if r.status == "finished") == rates
