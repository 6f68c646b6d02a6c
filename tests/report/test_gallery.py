from __future__ import annotations

import copy
import json

from filtrun.report.card import make_card
from filtrun.report.gallery import gallery_sheet, needed
from filtrun.report.grid import read_grid


def grids(cards, sweeps, **gallery):
    values = copy.deepcopy(cards.CARD) | {"gallery": gallery}
    second = copy.deepcopy(values["tables"][0]) | {"name": "other", "rows": {"x": ["method=bitfit"]}, "scales": {}}
    values["tables"].append(second)
    card = make_card("tiny", values)
    return [read_grid(card, table, "laptop", sweeps) for table in card.tables]


def test_a_line_for_each_paper(cards, run_sweeps):
    sheet = gallery_sheet(grids(cards, run_sweeps, row="head", baseline="full"), "laptop")
    (line,) = sheet.rows
    assert dict(zip([c.title for c in sheet.columns], [b.text for b in line], strict=True)) == {
        "method": "head", "paper": "Tiny", "year": "2024", "family": "peft", "task, data": "classify, digits",
        "metric": "accuracy ↑", "ours": "81.33 ± 1.53 % (3)", "baseline": "full 92.00 ± 2.00 % (3)",
        "cost": "3.77 % trained, training time 0.50 ×", "claims": "1/2",
    }  # fmt: skip
    assert [b.mark for b in line][6:8] == ["", "best"] and sheet.missing == []
    (data,) = json.loads(json.dumps(sheet.data))["papers"]
    assert data["ours"]["values"] == {"0": 0.80, "1": 0.83, "2": 0.81} and data["cost_ratios"]["train_seconds"] == 0.5


def test_only_what_a_line_shows_is_needed(cards, tmp_path):
    found = grids(cards, tmp_path)
    (grid,) = needed(found)
    assert {s.row for s in grid.slots} == {"full", "head"} and len(grid.slots) == 6
    sheet = gallery_sheet(found, "laptop")
    assert [b.text for b in sheet.rows[0]][6:] == ["-", "-", "-", "0/2, 2 not run"]
    assert sheet.missing == ["tiny: 6 of 6 cells are not run (cost unknown); --run does"]
