"""A search, then the runs it was for: the tables and the page say what was spent on whom."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")


@pytest.mark.slow
def test_the_budget_of_a_real_search_is_in_every_table(cli: Any, stages_root: Path) -> None:
    where = ["device=cpu", "logger=none", f"stages.root={stages_root}"]
    words = ["scale=smoke", "data=digits", "model=resnet20", "model.width=4", "method=full"]
    done = cli("search", *where, *words, "trainer.lr=log(1e-3,1e-2)", "trainer.clip=choice(0,1)", "--metric",
               "test/accuracy", "--study", "s", "--trials", "3", "--seeds", "0,1", "--json")  # fmt: skip
    assert done.code == 0, done.err
    best = shlex.split(json.loads(done.out)["command"])
    assert best[:2] == ["filtrun", "-m"]
    assert cli(*best[1:]).code == 0
    assert cli("-m", *where, *words[:-1], "method=linear_probe", "seed=0,1").code == 0

    text = "3 trials of 2 seeds over trainer.lr, trainer.clip"
    line = f"tuning budget: full: {text}; linear_probe: no search on record"
    warning = "unlike tuning budgets: 3 trials of 2 seeds (full), no search on record (linear_probe)"
    asked = ["table", "outputs/sweeps", "--by", "methods", "--metric", "test/accuracy", "--where", "task.split=test"]
    for form in ("rich", "md", "latex", "html"):
        shown = cli(*asked, "--format", form)
        assert shown.code == 0, shown.err
        plain = " ".join(shown.out.replace("\\", "").split())
        assert line in plain and warning in plain, form
        assert ("3 trials | " if form == "md" else "3 trials") in plain
    rows = list(csv.DictReader(io.StringIO(cli(*asked, "--format", "csv").out)))
    assert [(r["methods"], r["n"], r["tuning"], r["tuning trials"]) for r in rows] == [
        ("full", "2", text, "3"), ("linear_probe", "2", "no search on record", "0"),
    ]  # fmt: skip

    assert cli("report", "outputs", "--out", "r.html").code == 0
    page = Path("r.html").read_text()
    assert line in page and warning in page
    cards = Path("conf/paper")
    cards.mkdir(parents=True)
    (cards / "mine.yaml").write_text(CARD)
    paper = cli("table", "mine", "--config-dir", "conf", "--scale", "smoke")
    plain = " ".join(paper.out.split())
    assert paper.code == 0, paper.err
    assert "tuning: by hand" in plain and "3 trials" in plain
    assert "tuning budget: all: 3 trials of 2 seeds over trainer.lr, trainer.clip; head: no search on record" in plain


CARD = """
title: A card
link: https://x.org
year: 2024
family: peft
abstract: A.
methods: []
tuning: by hand
tables:
  - name: main
    title: Two ways
    setting: a classifier
    rows: {all: [method=full], head: [method=linear_probe]}
    scales: {smoke: {seeds: [0], overrides: [data=digits, model=resnet20, model.width=4]}}
    metrics: {test/accuracy: higher}
claims: []
"""
