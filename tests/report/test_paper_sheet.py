from __future__ import annotations

import copy
import dataclasses
import json
import shutil

from filtrun.report.card import Measured, make_card
from filtrun.report.grid import read_grid
from filtrun.report.paper_sheet import paper_sheet


def texts(sheet):
    return {row[0].text: [box.text for box in row[1:]] for row in sheet.rows}


def test_ours_beside_the_published_numbers(cards, run_sweeps):
    sheet, ours = paper_sheet(cards.grid_of(run_sweeps)), "ours, laptop scale, 3 seeds"
    assert [(c.title, c.better, c.group) for c in sheet.columns] == [
        ("", "", ""), ("accuracy", "higher", ours), ("NLL", "lower", ours),
        ("trained parameters", "", ours), ("top-1", "higher", "published [1] ≠"),
    ]  # fmt: skip
    assert texts(sheet) == {
        "full": ["92.00 ± 2.00 %", "0.4000 ± 0.1000", "17,254 (100.0%)", "70.50"],
        "head": ["81.33 ± 1.53 %", "1.5000 ± 0.1000", "650 (3.8%)", "-"],
        "none": ["10.00 ± 0.00 %", "2.0000 ± 0.0000", "0", "-"],
        "bitfit": ["-", "-", "-", "69.25"],
    }
    assert [[box.mark for box in row[1:]] for row in sheet.rows] == [
        ["best", "best", "", "best"], ["second", "second", "", ""], ["", "", "", ""], ["", "", "", ""],
    ]  # fmt: skip
    assert sheet.notes == ["[1] ImageNet [Table 1]; ≠ another setting than ours, not to be compared"]
    (other,) = sheet.more
    assert other.title == "Published [2]: digits [Table 2]" and texts(other) == {"head": ["50"]}  # the same setting


def test_the_caption_states_the_conditions(cards, run_sweeps):
    sheet = paper_sheet(cards.grid_of(run_sweeps))
    caption = "\n".join(sheet.caption)
    for part in ("laptop scale, not the paper's setting", "a classifier learns new classes", "data digits",
                 "model resnet20 (17,254 parameters)", "120 steps of 64, 7,680 images seen", "none: nothing trained",
                 "pre-trained for 250 steps", "seeds 0, 1, 2", "tuning: none was done", "torch 2.13.0"):  # fmt: skip
        assert part in caption


def test_what_differs_beside_the_rows_axis_is_warned_of(cards, run_sweeps, tmp_path):
    sheet = paper_sheet(cards.grid_of(run_sweeps))
    assert sheet.warnings == ["the rows also set trainer.lr: 0.0005 (full, none), 0.01 (head)"]
    card = copy.deepcopy(cards.CARD)
    card["tables"][0]["rows"] = {"a": ["method=none"], "b": ["method=none", "data=digits"]}
    card["claims"] = []
    made = make_card("x", card)
    grid = read_grid(made, made.tables[0], "smoke", tmp_path)
    for slot, device in zip(grid.slots, ("cpu", "cuda"), strict=True):
        config = copy.deepcopy(slot.job.config)
        config["trainer"]["ema"] = {"a": 0.5, "b": 0.9}[slot.row]  # say, by a method's own YAML
        slot.record = {
            "config": config,
            "environment": {"device": device},
            "evaluation": {"split": slot.row},
            "folder": "x",
        }
    told = "\n".join(paper_sheet(grid).warnings)
    for part in ("mean anything", "the rows also differ in trainer.ema: 0.5 (a), 0.9 (b)", "unlike device: cpu, cuda",
                 "measured unlike: split: a (a), b (b)"):  # fmt: skip
        assert part in told


def test_claims_with_their_evidence(cards, run_sweeps):
    first, second = paper_sheet(cards.grid_of(run_sweeps)).claims
    assert (first.verdict, first.says) == ("holds", "all beats some [abstract]")
    for part in ("92.00 ± 2.00 % against 81.33 ± 1.53 %", "mean paired gain +10.67 pts",
                 "95 % CI [+5.50 pts, +15.84 pts]", "3 of 3 seeds",
                 "effect size d = ", "p = 0.125 (the least it can be)", "paired t-test p = 0.0062"):  # fmt: skip
        assert part in first.evidence
    assert second.verdict == "does not hold" and "not beyond the noise" not in second.evidence


def test_data_holds_every_number(cards, run_sweeps):
    data = json.loads(json.dumps(paper_sheet(cards.grid_of(run_sweeps)).data))
    nll = data["rows"]["head"]["metrics"]["test/nll"]
    assert nll == {"mean": 1.5, "std": nll["std"], "values": {"0": 1.5, "1": 1.6, "2": 1.4}}
    assert [c["verdict"] for c in data["claims"]] == ["holds", "does not hold"] and data["missing"] == []
    assert [p["same_setting"] for p in data["published"]] == [False, True] and data["rows"]["none"]["n"] == 3


def test_missing_cells_and_their_cost(cards, records, run_sweeps, tmp_path):
    sweeps = tmp_path / "sweeps"
    shutil.copytree(run_sweeps, sweeps)
    for slot in cards.grid_of(sweeps).slots:
        if slot.row == "none" or (slot.row, slot.seed) == ("full", 2):
            shutil.rmtree(slot.job.folder)
    grid = cards.grid_of(sweeps)
    sheet = paper_sheet(grid)
    assert sheet.missing == [
        "full: seed 2 (about 2.50 s each)", "none: seed 0, 1, 2 (about 2.75 s each, by full, head)",
        "4 of 9 cells are not run (about 10.8 s); --run does",
    ]  # fmt: skip
    assert [c.verdict for c in sheet.claims] == ["not run", "not run"] and "2 of 3 seeds" in sheet.claims[0].evidence
    assert texts(sheet)["none"][:2] == ["not run", "not run"]
    assert texts(sheet)["full"][0] == "91.00 ± 1.41 % (2 of 3)" and any(
        "unlike numbers of seeds: 2 (full)" in w for w in sheet.warnings
    )
    entry = sheet.data["missing"][0]
    assert (entry["row"], entry["seed"], entry["seconds"]) == ("full", 2, 2.5) and "method=full" in entry["overrides"]
    assert [m["estimate"] for m in sheet.data["missing"]] == ["by its row", *["by full, head"] * 3]


def test_the_cards_numbers_are_never_ours(cards, tmp_path):
    made = make_card("tiny", cards.CARD)
    known = Measured("laptop", "2026-01-31", "cpu", (0,), {"full": {"test/accuracy": (0.77,)}})
    table = dataclasses.replace(made.tables[0], measured=(known,))
    sheet = paper_sheet(read_grid(dataclasses.replace(made, tables=(table,)), table, "laptop", tmp_path))
    assert texts(sheet)["full"][:2] == ["not run", "not run"] and "0.77" not in str(sheet.data)
    assert any("measured at laptop scale on 2026-01-31 (`filtrun info tiny`)" in note for note in sheet.notes)


def test_only_some_rows(cards, run_sweeps):
    sheet = paper_sheet(cards.grid_of(run_sweeps, rows=["head", "none"]), only_rows=True)
    assert list(texts(sheet)) == ["head", "none"] and [c.verdict for c in sheet.claims] == ["does not hold"]
    assert [c.group for c in sheet.columns][-1] == "published [1]" and texts(sheet)["head"][-1] == "50"
