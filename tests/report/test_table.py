from __future__ import annotations

import io

import pytest
from rich.console import Console

from filtrun.report.table import result_table
from filtrun.syntax import MetricFacts

METRICS = {
    "fid": MetricFacts("FID", "lower", "distance to real images", ".2f"),
    "target_accuracy": MetricFacts("class accuracy", "higher", "samples of the class asked for", ".1%"),
    "source_accuracy": MetricFacts("old classes kept", "higher", "the same for old classes", ".1%"),
}


def drawn(record, metrics=METRICS, width=80, encoding="utf-8", color=None):
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=buffer, width=width, color_system=color, force_terminal=color is not None).print(
        result_table(record, metrics)
    )
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)


def words(text, start):
    return next(line.split() for line in text.splitlines() if line.startswith(start))


def test_a_finished_run(records):
    text = drawn(records.make_record(folder="/tmp/run7"))
    assert "method sara, data digits, model unet, task diffuse" in text
    assert words(text, "measured") == ["measured", "base", "fine-tuned", "change", "what", "it", "means"]
    assert words(text, "FID")[:6] == ["FID", "↓", "71.30", "12.41", "-58.89", "better"]
    assert words(text, "class accuracy")[2:7] == ["↑", "2.0%", "91.7%", "+89.7", "pts"]
    assert words(text, "old classes kept")[3:8] == ["↑", "93.0%", "87.0%", "-6.0", "pts"]
    assert "worse" in text and "distance to real" in text
    flat = " ".join(text.split())
    for part in ("20,480 10.00% of the", "84.1 KB", "412.3 MB", "1 min 15 s", "1,352"):
        assert part in flat
    assert "feature net: small_cnn features; judge: small_cnn judge; samples per set of classes: 512" in flat
    assert "laptop scale, not the paper's setting; seed 1" in flat and "results: /tmp/run7" in flat
    assert "after finish" not in text


def test_it_fits_the_terminal_and_has_no_colour_codes_unless_asked(records):
    changed = records.make_record()
    changed["metrics"]["test/fid"] = 13.1
    for record in (records.make_record(), changed):
        for width in (40, 60, 76, 80, 120):
            text = drawn(record, width=width)
            assert max(map(len, text.splitlines())) <= width and "\x1b" not in text and "…" not in text
    assert "\x1b[32m" in drawn(records.make_record(), color="standard")


def test_meanings_come_below_a_narrow_table(records):
    text = drawn(records.make_record(), width=60)
    assert "what it means" not in text and "FID: distance to real images" in text


def test_after_finish_only_where_it_differs(records):
    record = records.make_record()
    record["metrics"]["test/fid"] = 13.1
    text = drawn(record, width=100)
    assert "after finish" in text
    assert words(text, "FID")[2:6] == ["71.30", "12.41", "13.10", "-58.20"]  # the change is to what is kept


def test_from_scratch_there_is_no_base_and_no_change(records):
    record = records.make_record()
    record["metrics"] = {k: v for k, v in record["metrics"].items() if not k.startswith("base/")}
    text = drawn(record)
    assert words(text, "measured")[:2] == ["measured", "trained"]
    assert "base" not in words(text, "measured") and "better" not in text.split("lower is better")[0]


def test_training_free_methods_have_a_result(records):
    record = records.make_record()
    record["cost"] = {"trainable_params": 0, "total_params": 10, "train_seconds": 0.0, "steps": 0}
    text = drawn(record)
    assert words(text, "measured")[2] == "result" and "training time" not in text


def test_missing_and_unknown_values(records):
    record = records.make_record(
        metrics={"tuned/odd": 1.23456, "tuned/fid": None, "base/fid": 3.0}, cost={}, evaluation={}
    )
    text = drawn(record)
    assert words(text, "FID")[:5] == ["FID", "↓", "3.00", "-", "-"]
    assert words(text, "odd")[:2] == ["odd", "-"] and "1.235" in text
    assert "measured with" not in text


@pytest.mark.parametrize("record", [{}, {"metrics": None, "cost": None, "status": "failed", "methods": []}])
def test_an_empty_record(record):
    text = drawn(record, {})
    assert "method none" in text and ("failed" in text) == (record.get("status") == "failed")


def test_no_change_is_said(records):
    record = records.make_record(metrics={"base/fid": 3.0, "tuned/fid": 3.0 + 1e-9})
    assert "same" in words(drawn(record), "FID")


def test_scales(records):
    for scale, said in (("smoke", "the numbers mean nothing"), ("paper", "paper scale"), ("mine", "scale mine")):
        record = records.make_record()
        record["config"]["scale"] = scale
        assert said in drawn(record)


def test_plain_ascii_terminals(records):
    text = drawn(records.make_record(), encoding="ascii")
    assert "FID (low)" in text and "(high) higher is better" in text


def test_text_from_a_record_is_not_obeyed(records):
    text = drawn(records.make_record(methods=["[red]x[/red]"], data="a\x1b[2Jb"))
    assert "[red]x[/red]" in text and "\x1b" not in text


def test_the_tasks_own_metrics_fit(records):
    from filtrun.tasks.diffuse import Diffuse

    assert words(drawn(records.make_record(), Diffuse.metrics), "FID")[2] == "71.30"
