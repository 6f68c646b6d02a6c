from __future__ import annotations

import copy
import json
import shutil

import pytest

from filtrun.errors import UserError
from filtrun.report.card import make_card
from filtrun.report.grid import choose_rows, read_grid


def test_cells_find_their_records(cards, run_sweeps):
    grid = cards.grid_of(run_sweeps)
    assert grid.rows == ("full", "head", "none") and grid.seeds == (0, 1, 2) and not grid.missing
    assert grid.values("head", "test/nll") == {0: 1.5, 1: 1.6, 2: 1.4} and grid.seconds("head") == 3.0
    assert grid.values("full", "cost/steps") == {0: 120.0, 1: 120.0, 2: 120.0} and grid.values("full", "test/fid") == {}
    assert [r["seed"] for r in grid.records("full")] == [0, 1, 2] and len(grid.records()) == 9
    assert all(s.job.folder.name == s.record["folder"].rpartition("/")[2] for s in grid.slots)


def test_where_cells_run_does_not_change_which_they_are(cards, run_sweeps):
    there = [slot.job.folder for slot in cards.grid_of(run_sweeps).slots]
    moved = cards.grid_of(
        run_sweeps, extra=["device=cuda", "threads=3", "stages.root=/x", "data.root=/y", "logger=none"]
    )
    assert [slot.job.folder for slot in moved.slots] == there and not moved.missing


def test_rows_and_seeds_can_be_chosen(cards, run_sweeps):
    grid = cards.grid_of(run_sweeps, rows=["none"], seeds=[2, 5])
    assert [(s.row, s.seed, s.state) for s in grid.slots] == [("none", 2, "finished"), ("none", 5, "not run")]
    with pytest.raises(UserError, match="--rows haed: .* no such row; did you mean 'head'"):
        choose_rows(make_card("tiny", cards.CARD), ["full", "haed"])


def test_what_became_of_a_cell(cards, run_sweeps, tmp_path):
    sweeps = tmp_path / "sweeps"
    shutil.copytree(run_sweeps, sweeps)
    slots = cards.grid_of(sweeps).slots
    for slot, status in zip(slots, ("failed", "interrupted", "running"), strict=False):
        path = slot.job.folder / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": status, "error": "the loss\nbecame"}))
    (slots[3].job.folder / "record.json").write_text("{")
    moved = json.loads((slots[4].job.folder / "record.json").read_text())
    moved["config"]["seed"] = 9  # a record that does not belong into this folder
    (slots[4].job.folder / "record.json").write_text(json.dumps(moved))
    states = [(s.state, s.error) for s in cards.grid_of(sweeps).slots]
    assert states[:3] == [("failed", "the loss"), ("interrupted", "the loss"), ("running", "the loss")]
    assert [s[0] for s in states[3:]] == ["not run", "not run"] + ["finished"] * 4


def test_single_runs_count(cards, run_sweeps, tmp_path):
    (tmp_path / "sweeps").mkdir()
    done = cards.grid_of(run_sweeps).slots[1]
    shutil.copytree(done.job.folder, tmp_path / "runs" / "2026")
    grid = cards.grid_of(tmp_path / "sweeps")
    assert [(s.row, s.seed) for s in grid.slots if s.record] == [("full", 1)]


def test_a_row_that_cannot_be_composed_is_named(cards, tmp_path):
    import copy

    from filtrun.report.grid import read_grid

    values = copy.deepcopy(cards.CARD)
    values["tables"][0]["rows"]["none"] = ["method=nnoe"]
    card = make_card("tiny", values)
    grid = read_grid(card, card.tables[0], "smoke", tmp_path)
    assert list(grid.problems) == ["none"] and "unknown method 'nnoe'; did you mean" in grid.problems["none"]
    assert [s.row for s in grid.slots] == ["full", "head"]
    assert read_grid(card, card.tables[0], "paper", tmp_path).slots == []


def test_composed_cells_are_kept_until_a_config_changes(cards, tmp_path, monkeypatch):
    from filtrun import api

    config = tmp_path / "conf" / "method"
    config.mkdir(parents=True)
    (config / "mine.yaml").write_text("full: {_target_: filtrun.methods.baseline.full.Full}\n")
    (tmp_path / "sweeps").mkdir()
    calls = []
    composed = api.composed_by_hydra
    monkeypatch.setattr(api, "composed_by_hydra", lambda *words: calls.append(words) or composed(*words))

    def folder():
        return cards.grid_of(tmp_path / "sweeps", config_dirs=[tmp_path / "conf"], rows=["full"]).slots[0].job.folder

    first = folder()
    assert folder() == first and len(calls) == 1
    (config / "mine.yaml").write_text("# longer\nfull: {_target_: filtrun.methods.baseline.full.Full}\n")
    assert folder() == first and len(calls) == 2


def test_a_row_may_differ_at_one_scale(cards, run_sweeps):
    values = copy.deepcopy(cards.CARD)
    plain = {(s.row, s.seed): s.job.folder for s in cards.grid_of(run_sweeps).slots}
    table = values["tables"][0]
    table["scales"]["laptop"]["rows"] = {"head": ["trainer.lr=0.5"]}
    made = make_card("tiny", values)
    moved = read_grid(made, made.tables[0], "laptop", run_sweeps)
    changed = {slot.row for slot in moved.slots if plain[slot.row, slot.seed] != slot.job.folder}
    assert changed == {"head"}
    assert all(slot.job.config["trainer"]["lr"] == 0.5 for slot in moved.slots if slot.row == "head")
