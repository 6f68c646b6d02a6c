"""Tuning budgets: read from searches, told of every row in every form, and warned of where they are unlike."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from filtrun.report import export
from filtrun.report.gallery import gallery_sheet
from filtrun.report.index import read_records
from filtrun.report.many import Question, folder_sheet
from filtrun.report.page.gather import gather
from filtrun.report.paper_sheet import paper_sheet
from filtrun.report.tuning import read_searches

FORMS = ("rich", "md", "latex", "html")
RECORD = {"methods": ["full"], "task": "classify", "data": "digits", "model": "resnet20",
          "config": {"scale": "laptop"}}  # fmt: skip
LONG = "24 trials of 2 seeds over trainer.lr, trainer.weight_decay"
MANY = ["complete"] * 20 + ["pruned"] * 3 + ["fail"]


@pytest.fixture
def outputs(cards: Any, records: Any, searches: Any, tmp_path: Path) -> Path:
    """Records of every cell of the example card, and a search for one of its rows."""
    cards.write_records(tmp_path / "sweeps", records.make_record)
    searches.write_search(tmp_path, "full", [*MANY, "running"], ("trainer.lr", "trainer.weight_decay"), seeds=[0, 1])
    return tmp_path


def flat(text: bytes) -> str:
    return " ".join(text.decode().replace("\\_", "_").replace("\\", "").split())


def test_a_search_is_found_by_what_it_was_for(outputs: Path) -> None:
    found = read_searches(outputs / "sweeps")
    budget = found.of(RECORD)
    assert (budget.trials, budget.short, budget.text) == (24, "24 trials", LONG)  # one is still running
    assert budget.data()["searches"] == [
        {"name": "full", "trials": 24, "seeds": 2, "keys": ["trainer.lr", "trainer.weight_decay"], "split": "val",
         "scale": "laptop"}
    ]  # fmt: skip
    for change in ({"methods": ["lora"]}, {"methods": ["full", "ema"]}, {"task": "diffuse"}, {"data": "cifar"},
                   {"model": "vit"}):  # fmt: skip
        other = found.of(RECORD | change)
        assert (other.trials, other.short, other.text) == (0, "no search on record", "no search on record")
    assert found.of(RECORD | {"config": {"scale": "paper"}}).text == f"{LONG} at laptop scale"
    assert read_searches(outputs).of(RECORD) == budget  # a folder of all, as well as one beside the searches
    assert read_searches(outputs, outputs / "sweeps").of(RECORD) == budget  # and each once
    assert read_searches(outputs / "sweeps" / "deeper").of(RECORD).trials == 0


def test_several_searches_add_up_and_a_look_at_the_test_split_is_told(outputs: Path, searches: Any) -> None:
    searches.write_search(outputs, "more", ["complete"], [f"k{i}" for i in range(6)], split="test")
    budget = read_searches(outputs).of(RECORD)
    assert budget.short == "25 trials"
    assert budget.text == f"{LONG} and 1 trial of 1 seed over k0, k1, k2, k3 and 2 more judged on the test split"


def test_a_search_over_methods_counts_for_each(tmp_path: Path, searches: Any) -> None:
    path = searches.write_search(tmp_path, "both", MANY, ("method", "trainer.lr"))
    values = json.loads(path.read_text())
    for trial in values["trials"]:
        trial["params"]["method"] = "lora" if trial["number"] < 5 else "full"
    path.write_text(json.dumps(values))
    found = read_searches(tmp_path)
    assert [found.of(RECORD | {"methods": [m]}).trials for m in ("full", "lora", "ssf")] == [19, 5, 0]


def test_one_from_before_settings_were_noted_is_composed(tmp_path: Path, searches: Any) -> None:
    searches.write_search(tmp_path, "old", MANY, setting=None)
    assert read_searches(tmp_path).of(RECORD).text == "24 trials of 1 seed over trainer.lr"


def test_files_that_are_no_searches_are_named(outputs: Path, searches: Any) -> None:
    for i, text in enumerate(("{", "[]", '{"space": 3}', "null")):
        path = searches.write_search(outputs, f"bad{i}", [])
        path.write_text(text)
    found = read_searches(outputs)
    assert len(found.broken) == 4 and found.of(RECORD).trials == 24
    told = f"4 search files could not be read, {outputs.resolve() / 'searches/bad0/search.json'} first"
    assert found.problems() == [told]
    assert told in folder_sheet(read_records(outputs), outputs, Question()).notes


def test_a_papers_table_says_it_of_each_row(cards: Any, outputs: Path) -> None:
    sheet = paper_sheet(cards.grid_of(outputs / "sweeps"))
    place = [c.title for c in sheet.columns].index("tuning")
    assert {row[0].text: row[place].text for row in sheet.rows} == {
        "full": "24 trials", "head": "no search on record", "none": "no search on record", "bitfit": "-",
    }  # fmt: skip
    line = f"tuning budget: full: {LONG}; head, none: no search on record"
    warning = "unlike tuning budgets: 24 trials of 2 seeds (full), no search on record (head)"  # `none` trains nothing
    assert line in sheet.caption and warning in sheet.warnings
    for form in FORMS:
        text = flat(export.rendered([sheet], form))
        assert line in text and warning in text and text.count("no search on record") == 4, form
    rows = json.loads(export.rendered([sheet], "json"))[0]["rows"]
    assert rows["full"]["tuning"]["trials"] == 24 and rows["full"]["tuning"]["text"] == LONG
    assert rows["head"]["tuning"] == {"text": "no search on record", "trials": 0, "searches": []}
    lines = list(csv.DictReader(io.StringIO(export.rendered([sheet], "csv").decode())))
    assert {(x["row"], x["tuning"], x["tuning trials"]) for x in lines} == {
        ("full", LONG, "24"), ("head", "no search on record", "0"), ("none", "no search on record", "0"),
    }  # fmt: skip


def test_without_any_search_one_line_says_so(cards: Any, run_sweeps: Path) -> None:
    sheet = paper_sheet(cards.grid_of(run_sweeps))
    assert "tuning budget: no search on record for any row" in sheet.caption
    assert "tuning" not in [c.title for c in sheet.columns]
    assert not [w for w in sheet.warnings if "tuning" in w]


def test_equal_budgets_are_no_cause_to_warn(cards: Any, outputs: Path, searches: Any) -> None:
    setting = searches.SETTING | {"methods": ["linear_probe"]}
    searches.write_search(outputs, "head", MANY, ("trainer.clip",), seeds=[5, 6], setting=setting)
    sheet = paper_sheet(cards.grid_of(outputs / "sweeps"))
    told = f"tuning budget: full: {LONG}; head: 24 trials of 2 seeds over trainer.clip; none: no search on record"
    assert told in sheet.caption and not [w for w in sheet.warnings if "tuning" in w]


def test_a_folders_table_too(outputs: Path) -> None:
    found = read_records(outputs)
    sheet = folder_sheet(found, outputs, Question(by=("methods",), metrics=("test/accuracy",)))
    assert [(row[0].text, row[-1].text) for row in sheet.rows] == [
        ("full", "24 trials"), ("linear_probe", "no search on record"), ("none", "no search on record"),
    ]  # fmt: skip
    line = f"tuning budget: full: {LONG}; linear_probe, none: no search on record"
    warning = "unlike tuning budgets: 24 trials of 2 seeds (full), no search on record (linear_probe)"
    assert line in sheet.caption and warning in sheet.warnings
    for form in FORMS:
        text = flat(export.rendered([sheet], form))
        assert line in text and warning in text, form
    single = folder_sheet(found, outputs, Question(columns=("methods", "seed")))
    assert [c.title for c in single.columns][-1] == "tuning" and len(single.rows) == 9
    rows = list(csv.DictReader(io.StringIO(export.rendered([single], "csv").decode())))
    assert {(r["methods"], r["tuning"], r["tuning trials"]) for r in rows} == {
        ("full", LONG, "24"), ("linear_probe", "no search on record", "0"), ("none", "no search on record", "0"),
    }  # fmt: skip
    by_data = folder_sheet(found, outputs, Question(by=("data",), metrics=("test/accuracy",)))
    assert [row[-1].text for row in by_data.rows] == ["24 trials, no search on record"]
    assert by_data.data["rows"][0]["tuning trials"] is None and warning in by_data.warnings


def test_what_else_varies_is_named_with_a_method(outputs: Path, records: Any) -> None:
    other = records.make_record(**RECORD | {"data": "cifar", "seed": 7})
    records.write_record(outputs / "runs" / "x", **other)
    sheet = folder_sheet(read_records(outputs), outputs, Question(by=("methods", "data")))
    (line,) = [line for line in sheet.caption if line.startswith("tuning budget")]
    assert f"full data=digits: {LONG}" in line and "full data=cifar" in line.partition("; ")[2]


def test_the_gallery_too(cards: Any, outputs: Path, run_sweeps: Path) -> None:
    sheet = gallery_sheet([cards.grid_of(outputs / "sweeps")], "laptop")
    assert sheet.notes == [f"tiny: tuning budget: full: {LONG}; head: no search on record"]
    assert sheet.warnings == ["tiny: unlike tuning budgets: 24 trials of 2 seeds (full), no search on record (head)"]
    assert sheet.data["papers"][0]["ours"]["tuning"]["trials"] == 24
    without = gallery_sheet([cards.grid_of(run_sweeps)], "laptop")
    assert "tuning budget: no search on record for any row" in without.caption[-1] and not without.warnings


def test_the_report_page_too(outputs: Path) -> None:
    data = gather(outputs)
    assert {(r["methods"], r["tuning"], r["trials"]) for r in data["runs"]} == {
        ("full", "24 trials", 24), ("linear_probe", "no search on record", 0), ("none", "no search on record", 0),
    }  # fmt: skip
    assert data["tuning"] == {
        "line": f"tuning budget: full: {LONG}; linear_probe, none: no search on record",
        "warnings": ["unlike tuning budgets: 24 trials of 2 seeds (full), no search on record (linear_probe)"],
    }
