from __future__ import annotations

from filtrun.catalogue import entries
from filtrun.report.card import Cell
from filtrun.report.evidence import Claims, finished_records, is_run_of


def cell(*overrides):
    return Cell("sara", 1, overrides)


def test_a_run_is_recognised_by_what_was_set(records):
    record = records.make_record()
    assert is_run_of(record, cell("method=sara", "data=digits", "model=unet", "scale=laptop", "seed=1"))
    assert is_run_of(record, cell("method=[sara]", "seed=1")) is False  # written otherwise: not counted
    for other in ("method=lora", "data=cifar10", "model=resnet20", "scale=paper", "seed=2", "model.size=large"):
        assert not is_run_of(record, cell("seed=1", "method=sara", other))
    assert is_run_of(record, cell("seed=1", "method=sara", "model.size=tiny"))


def test_anything_else_that_was_set_makes_it_another_run(records):
    wanted = cell("method=sara", "seed=1")
    for extra, same in (("device=cuda", True), ("data.root=/x", True), ("stages.root=/y", True),
                        ("hydra.run.dir=z", True),
                        ("trainer.lr=1", False), ("+model.x=2", False), ("data=digits", False)):  # fmt: skip
        record = records.make_record(overrides=["method=sara", "seed=1", extra])
        assert is_run_of(record, wanted) is same, extra


def test_numbers_and_lists_match_however_they_are_written(records):
    record = records.make_record(methods=["sara", "lora"])
    record["config"] |= {"trainer": {"lr": 0.001, "steps": None, "ema": False}}
    record["overrides"] = ["method=[sara, lora]", "trainer.lr=1e-3"]
    assert is_run_of(record, cell("method=[sara,lora]", "trainer.lr=1e-3", "trainer.steps=null", "trainer.ema=false"))


def test_only_finished_records_count_and_broken_ones_are_passed_over(records, tmp_path):
    records.write_record(tmp_path / "runs" / "a")
    records.write_record(tmp_path / "sweeps" / "s" / "cell")
    records.write_record(tmp_path / "runs" / "b", status="failed")
    (tmp_path / "runs" / "c").mkdir()
    (tmp_path / "runs" / "c" / "record.json").write_text("{")
    (tmp_path / "runs" / "d").mkdir()
    (tmp_path / "runs" / "d" / "record.json").write_text("[]")
    assert [r["folder"] for r in finished_records(tmp_path)] == [
        str(tmp_path / "runs" / "a"), str(tmp_path / "sweeps" / "s" / "cell"),
    ]  # fmt: skip


def test_status_of_a_claim(records, tmp_path):
    by_name = {e.name: e for e in entries("methods")}
    assert Claims(root=tmp_path).status(by_name["sara"]) == "not run"
    assert Claims(root=tmp_path).status(by_name["full"]) == "implemented"
    for method in ("sara", "lora", "full"):
        for seed in range(3):
            overrides = [f"method={method}", "data=digits", "model=unet", "scale=laptop", f"seed={seed}"]
            config = records.make_record()["config"] | {"seed": seed}
            records.write_record(
                tmp_path / "runs" / f"{method}{seed}", overrides=overrides, methods=[method], seed=seed, config=config
            )
            if (method, seed) == ("sara", 1):
                assert Claims(root=tmp_path).status(by_name["sara"]) == "2 of 9 runs"
    assert Claims(root=tmp_path).status(by_name["sara"]) == "holds 0/2 (laptop)"
    assert Claims(root=tmp_path).status(next(e for e in entries("papers") if e.name == "sara")) == "holds 0/2 (laptop)"


def test_smoke_runs_prove_nothing(records, tmp_path):
    config = records.make_record()["config"] | {"scale": "smoke", "seed": 0}
    for method in ("sara", "lora", "full"):
        overrides = [f"method={method}", "data=digits", "model=unet", "scale=smoke", "seed=0"]
        records.write_record(tmp_path / "runs" / method, overrides=overrides, methods=[method], seed=0, config=config)
    assert Claims(root=tmp_path).status(next(e for e in entries("methods") if e.name == "sara")) == "not run"
