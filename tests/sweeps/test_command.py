"""Sweeps by the command: kept in files, cells that do not apply skipped, each cell the one Hydra composes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from filtrun.api import compose
from filtrun.catalogue import entries
from filtrun.cells import cell_digest
from filtrun.errors import UserError
from filtrun.record import Record, validate
from filtrun.sweeps.command import note_skipped, read_command
from filtrun.sweeps.jobs import Job, Outcome
from filtrun.sweeps.kept import read_sweep
from filtrun.sweeps.view import best, summary, told

CLASSIFY = ["data=digits", "task=classify", "model=resnet20", "model.width=4", "trainer.steps=3"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of configs with a kept sweep."""
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    (tmp_path / "conf" / "sweep" / "mine.yaml").write_text(
        "# Mine.\n"
        "overrides: [data=digits, 'task=classify,diffuse', 'seed=0,1', trainer.steps=7]\n"
        "rows:\n  a: [method=full, trainer.lr=0.1]\n  b: [method=bitfit, trainer.lr=0.2]\n"
        "skip:\n  - {when: 'method=bitfit,task=diffuse,seed>0', because: once is enough}\n"
    )
    return tmp_path / "conf"


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["method=lora,sara", "seed=0,1", "trainer.lr=1e-3"], 4),
        (["task=classify", "method=[full,none],linear_probe", "scale=smoke"], 2),
        (["model=espcn", "seed=3"], 1),
        (["data=digits", "data.target=[1,2],[3]", "pretrain.steps=10,20", "name='a b'"], 4),
    ],
)
def test_cells_are_those_hydra_composes(words: list[str], count: int) -> None:
    sweep = read_command(["-m"], words)
    for job in sweep.jobs:
        config, choices, _ = compose(*job.overrides)
        assert (job.config, job.choices) == (config, choices)
        assert job.folder == Path("outputs/sweeps").absolute() / cell_digest(config)
    assert len(sweep.jobs) == count


def test_a_kept_sweep(own: Path) -> None:
    sweep = read_command(["--config-dir", str(own)], ["sweep=mine", "hydra.sweep.dir='there'"])
    cells = [
        (*j.config["method"], j.config["trainer"]["lr"], j.choices["task"], j.choices["model"], j.config["seed"])
        for j in sweep.jobs
    ]
    assert cells == [
        ("full", 0.1, "classify", "resnet20", 0), ("full", 0.1, "classify", "resnet20", 1),
        ("full", 0.1, "diffuse", "unet", 0), ("full", 0.1, "diffuse", "unet", 1),
        ("bitfit", 0.2, "classify", "resnet20", 0), ("bitfit", 0.2, "classify", "resnet20", 1),
        ("bitfit", 0.2, "diffuse", "unet", 0),
    ]  # fmt: skip
    ((job, reason),) = sweep.skipped
    assert reason == "once is enough" and job.label == "method=bitfit trainer.lr=0.2 task=diffuse seed=1"
    assert {j.config["trainer"]["steps"] for j in sweep.jobs} == {7}
    assert {j.folder.parent for j in sweep.jobs} == {Path("there").absolute()}
    assert sweep.axes == ("method", "trainer.lr", "task", "seed") and sweep.workers == 1
    # what the command line says takes the place of what the file says, a list included
    given = read_command(["--config-dir", str(own)], ["sweep=mine", "seed=5", "task=classify", "workers=3"])
    assert [j.config["seed"] for j in given.jobs] == [5, 5] and given.workers == 3 and not given.skipped
    merged = read_command(["--config-dir", str(own)], ["sweep=mine", "method=none", "trainer.lr=1", "task=diffuse"])
    assert len(merged.jobs) == 2 and merged.same == 2


def test_a_kept_sweep_says_where_it_runs(own: Path) -> None:
    place = "hydra/launcher=submitit_slurm, hydra.launcher.partition=gpu, hydra.sweep.dir=there, workers=4"
    (own / "sweep" / "mine.yaml").write_text(f"overrides: [{place}, 'seed=0,1']")
    sweep = read_command(["--config-dir", str(own)], ["sweep=mine"])
    assert (sweep.launcher, sweep.options["partition"], sweep.workers) == ("submitit_slurm", "gpu", 4)
    assert {job.folder.parent for job in sweep.jobs} == {Path("there").absolute()} and len(sweep.jobs) == 2
    given = read_command(
        ["--config-dir", str(own)], ["sweep=mine", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=cpu"]
    )
    assert given.options["partition"] == "cpu"


def test_what_is_wrong_with_a_kept_sweep(own: Path) -> None:
    path = own / "sweep" / "mine.yaml"
    for text, says in (
        ("row: {a: [seed=1]}", "sweep/mine.yaml: 'row' is no key|row"),
        ("rows: {a: [seed]}", "rows: 'a' must read KEY=VALUE"),
        ("skip: [{when: seed, because: x}]", "must read KEY SIGN VALUE"),
        ("skip: [{when: seed=1}]", "because is missing"),
        ("skip: [{when: sed=1, because: x}]", "sweep=mine: skip.when sed: no record has such a key; did you mean"),
        ("overrides: [metod=lora]", "unknown key 'metod'"),
        ("overrides: {", "mine.yaml, line 2: did not find"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            read_command(["--config-dir", str(own)], ["sweep=mine"])
    with pytest.raises(UserError, match="unknown sweep 'mini'; did you mean 'mine'"):
        read_sweep("mini", [own])
    path.write_text("rows: {a: [seed=1]}")
    with pytest.raises(UserError, match="both list rows"):
        read_command(["--config-dir", str(own)], ["sweep=mine", "rows='seed=1;seed=2'"])
    with pytest.raises(UserError, match=r"unknown key 'method.sara'(.|\n)*in the cell method=lora seed=0"):
        read_command([], ["method=lora,sara", "seed=0,1", "method.sara.threshold=1"])


def test_the_sweeps_that_come_with_filtrun_compose() -> None:
    found = {entry.name: read_command([], [f"sweep={entry.name}"]) for entry in entries("sweeps")}
    assert {name: (len(sweep.jobs), len(sweep.skipped)) for name, sweep in found.items()} == {
        "lora_ranks": (15, 3),
        "peft": (24, 0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_cells_that_do_not_apply_are_recorded_as_skipped(workers: int, own: Path, tmp_path: Path, smoke: Any) -> None:
    (own / "sweep" / "mine.yaml").write_text("skip: [{when: 'seed=1,method=none', because: not that one}]")
    words = ["-m", "--config-dir", own, "sweep=mine", "hydra.sweep.dir=cells", f"workers={workers}", *CLASSIFY]
    done = smoke(*words, "model.base=scratch", "method=none,full,sara,cfg", "seed=0,1")
    assert done.code == 0, done.err
    assert "8 cells: 5 finished, 0 failed, 3 skipped" in done.out
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*/record.json")]
    for cell in cells:
        validate(cell)
    states = {(*cell["methods"], cell["seed"]): (cell["status"], cell["error"]) for cell in cells}
    assert states.pop(("none", 1)) == ("skipped", "not that one")
    for seed in (0, 1):
        status, error = states.pop(("cfg", seed))
        assert status == "skipped" and error.startswith("method=cfg works with task=diffuse")
        assert f"method=cfg seed={seed}: skipped: method=cfg works with" in done.err
    assert set(states.values()) == {("finished", None)} and len(states) == 5
    assert "methods" in done.out and "accuracy" in done.out  # the table of what finished
    nothing = smoke(*words, "model.base=scratch", "method=cfg", "seed=0,1")
    assert nothing.code == 2 and "2 cells: 0 finished, 0 failed, 2 skipped" in nothing.out


@pytest.mark.slow
def test_a_user_s_mistake_on_a_worker_exits_2(smoke: Any) -> None:
    words = [*CLASSIFY, "method=full", "model.base=scratch", "-m", "workers=2"]
    assert smoke(*words, "trainer.lr=-1,-2").code == 2
    assert smoke(*words, "trainer.lr=-1,1e30").code == 1


def test_a_finished_record_is_not_made_skipped(tmp_path: Path) -> None:
    config, choices, _ = compose("scale=smoke")
    job = Job("x", (), config, choices, tmp_path / "cell")
    assert note_skipped(job, "why").skipped and Record.read(job.folder).status == "skipped"
    values = json.loads((job.folder / "record.json").read_text()) | {"status": "finished", "error": None}
    (job.folder / "record.json").write_text(json.dumps(values))
    note_skipped(job, "why")
    assert Record.read(job.folder).status == "finished"


def test_the_best_so_far(tmp_path: Path) -> None:
    config, choices, _ = compose("scale=smoke", "task=classify")
    other, chosen, _ = compose("scale=smoke", "task=diffuse")

    def outcome(label: str, name: str, value: float, *, of: Any = config, kind: Any = choices) -> Outcome:
        return Outcome(Job(label, (), of, kind, tmp_path), Record(tmp_path, metrics={f"test/{name}": value}))

    high = [outcome("a", "accuracy", 0.2), outcome("b", "accuracy", 0.7), outcome("c", "accuracy", 0.4)]
    assert best(high) == "best: accuracy 0.7 (b)" and best(high[:1]) == ""
    low = [outcome(label, "fid", v, of=other, kind=chosen) for label, v in (("a", 3.0), ("b", 2.0))]
    assert best(low) == "best: fid 2 (b)" and best([*low, *high]) == ""
    skipped = Outcome(high[0].job, error="no\nmore", code=0, skipped=True)
    text = summary([*high, skipped], 6, 2, 9.0)
    assert text == "4/6 done, 2 running, 1 skipped, about 6.00 s left; best: accuracy 0.7 (b)"
    assert told(skipped) == "skipped: no" and not skipped.failed and Outcome(high[0].job, error="x").failed
