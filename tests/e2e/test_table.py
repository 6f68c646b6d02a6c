"""The real command runs what a table misses, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_a_table_runs_its_missing_cells_once(tmp_path: Path, cli: Any, record: Any, stages_root: Path) -> None:
    words = ["table", "sara", "--scale", "smoke", "--rows", "full", "--run", "device=cpu", "logger=none"]
    words.append(f"stages.root={stages_root}")
    first = cli(*words)
    assert first.code == 0, first.err
    assert "1/1 full seed=0: finished in" in first.err and "1 cells: 1 finished, 0 failed" in first.err
    (path,) = (tmp_path / "outputs" / "sweeps").glob("*/record.json")
    values, written = record(path.parent), path.stat().st_mtime_ns
    assert values["status"] == "finished" and values["methods"] == ["full"] and values["seed"] == 0
    assert f"{values['metrics']['test/fid']:.2f}" in first.out and "smoke scale: the numbers mean nothing" in first.out

    second = cli(*words, "--format", "json")
    assert second.code == 0 and "finished" not in second.err and path.stat().st_mtime_ns == written
    (data,) = json.loads(second.out)
    assert (
        data["missing"] == [] and data["rows"]["full"]["metrics"]["test/fid"]["mean"] == values["metrics"]["test/fid"]
    )

    forced = cli(*words, "--force")
    assert forced.code == 0 and "1 cells: 1 finished" in forced.err
    assert record(path.parent)["metrics"] == values["metrics"] and len(list(path.parent.glob("before-*"))) == 1


@pytest.mark.slow
def test_a_cell_that_cannot_run_is_named_and_the_others_go_on(tmp_path: Path, cli: Any, stages_root: Path) -> None:
    (tmp_path / "conf" / "paper").mkdir(parents=True)
    card = {
        "title": "T", "link": "https://x.org", "year": 2024, "family": "peft", "abstract": "A.", "methods": [],
        "claims": [], "tables": [{
            "name": "t", "title": "T", "setting": "s", "metrics": {"test/accuracy": "higher"},
            "rows": {"lost": ["method=sara", "model.base=scratch", "trainer.lr=1e30"], "none": ["method=none"],
                     "unknown": ["method=nnoe"]},
            "scales": {"smoke": {"seeds": [0], "overrides": ["model=resnet20", "model.width=4"]}},
        }],
    }  # fmt: skip
    (tmp_path / "conf" / "paper" / "bad.yaml").write_text(json.dumps(card))
    words = ["table", "bad", "--config-dir", "conf", "--scale", "smoke", "--run", f"stages.root={stages_root}"]
    done = cli(*words, "device=cpu", "logger=none")
    assert done.code == 1 and "2 cells: 1 finished, 1 failed" in done.err
    assert "1/2 lost seed=0: failed:" in done.err and "lost seed=0 failed:" in done.out
    assert "unknown: cannot be composed: unknown method 'nnoe'; did you mean 'none'" in done.out
    assert "none" in done.out and "1 of 2 cells is not run" in done.out
