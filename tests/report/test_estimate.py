from __future__ import annotations

import json

from filtrun.report.estimate import Estimate, estimate, like

CONFIG = {"scale": "laptop", "trainer": {"steps": 100, "batch_size": 10}, "method": {"lora": {}}}
CHOICES = {"task": "classify", "data": "digits", "model": "vit"}


def cell(folder, name, *, total, train=0.0, steps=100, **more):
    record = {
        "status": "finished", "methods": ["lora"], **CHOICES,
        "config": {"scale": "laptop", "trainer": {"steps": steps, "batch_size": 10}},
        "cost": {"total_seconds": total, "train_seconds": train},
    } | more  # fmt: skip
    (folder / name).mkdir(parents=True)
    (folder / name / "record.json").write_text(json.dumps(record))


def took(*seconds):
    return [{"cost": {"total_seconds": s}} for s in seconds]


def test_by_the_row_then_by_the_other_rows():
    records = {"a": took(2.0, 4.0), "b": took(9.0), "c": [{"cost": {}}]}
    assert estimate("a", records) == Estimate(3.0, "")
    assert estimate("c", records) == Estimate(6.0, "by a, b")  # a mean of rows: three seeds of one count once
    assert estimate("c", {"c": []}) is None


def test_by_cells_alike(tmp_path):
    assert like(CONFIG, CHOICES, tmp_path / "none") is None
    cell(tmp_path, "other_method", total=8.0, methods=["ssf"])
    assert like(CONFIG, CHOICES, tmp_path) == Estimate(8.0, "by 1 run of other methods on the same data and model")
    cell(tmp_path, "same", total=5.0, train=4.0, steps=50)  # twice the images are four seconds more
    cell(tmp_path, "untrained", total=3.0)
    for name, more in {"unfinished": {"status": "failed"}, "data": {"data": "cifar10"}, "model": {"model": "unet"},
                       "scale": {"config": {"scale": "smoke"}}, "unmeasured": {"cost": None}}.items():  # fmt: skip
        cell(tmp_path, name, total=100.0, **more)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "record.json").write_text("{")
    assert like(CONFIG, CHOICES, tmp_path) == Estimate(6.0, "by 2 runs of the same method on the same data and model")


def test_single_runs_beside_the_sweeps_count(tmp_path):
    cell(tmp_path / "runs", "2026-01-31", total=7.0)
    (tmp_path / "sweeps").mkdir()
    found = like(CONFIG, CHOICES, tmp_path / "sweeps")
    assert found == Estimate(7.0, "by 1 run of the same method on the same data and model")
