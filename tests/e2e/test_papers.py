"""What makes a paper `implemented`: every cell of its tables composes, and its own row runs at smoke scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from filtrun.catalogue import entries
from filtrun.report.evidence import measured
from filtrun.report.grid import read_grid
from filtrun.sweeps.jobs import run_job

PAPERS = {entry.name: entry.card for entry in entries("papers") if entry.status == "implemented"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_every_implemented_paper_composes_and_runs(name: str, tmp_path: Path, stages_root: Path) -> None:
    """All rows at all scales compose; the row that the gallery shows runs and measures the table's metrics."""
    card = PAPERS[name]
    assert card is not None and card.gallery is not None
    where = ["device=cpu", "logger=none", f"stages.root={stages_root}"]
    (tmp_path / "sweeps").mkdir()
    for table in card.tables:
        for scale in table.scales:
            grid = read_grid(card, table, scale, tmp_path / "sweeps", extra=where)
            assert grid.problems == {} and len(grid.slots) == len(table.rows) * len(grid.seeds)
    shown = card.table(card.gallery.table)
    grid = read_grid(card, shown, "smoke", tmp_path / "sweeps", rows=[card.gallery.row], extra=where)
    outcome = run_job(grid.slots[0].job)
    assert outcome is not None and outcome.error == "" and outcome.record.status == "finished"
    (again,) = read_grid(card, shown, "smoke", tmp_path / "sweeps", rows=[card.gallery.row], extra=where).slots
    assert again.record is not None and measured(again.record, card.gallery.metric) is not None
