from __future__ import annotations

import pytest

from filtrun.report import units


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (units.count, 31482, "31,482"),
        (units.count, None, "-"),
        (units.size, 999, "999 B"),
        (units.size, 84120, "84.1 KB"),
        (units.size, 999_960, "1.0 MB"),
        (units.size, 2.5e9, "2.5 GB"),
        (units.size, 3e12, "3.0 TB"),
        (units.size, None, "-"),
        (units.duration, 0.8419, "0.84 s"),
        (units.duration, 59.94, "59.9 s"),
        (units.duration, 59.96, "1 min 0 s"),
        (units.duration, 125.2, "2 min 5 s"),
        (units.duration, 3599.7, "1 h 0 min"),
        (units.duration, 12000, "3 h 20 min"),
        (units.rate, 1352.3, "1,352"),
        (units.rate, 12.345, "12.3"),
        (units.flops, 1.234e6, "1.23 MFLOP"),
        (units.flops, 5.0e13, "50 TFLOP"),
        (units.flops, None, "-"),
    ],
)
def test_units(form, value, text):
    assert form(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([23059166], ["23,059,166"]),
        ([317056.0, 7235713.0, None], ["317,056", "7,235,713", "-"]),
        ([27.1, 27.55, 0.5], ["27.10", "27.55", "0.50"]),
        ([42.4, None], ["42.4", "-"]),
        ([1234.5, 3.0], ["1,234.5", "3.0"]),
        ([2e-7, 1.0], ["0.0000002", "1.0000000"]),
        ([0.8682, -1], ["0.8682", "-1.0000"]),
        ([1 / 3], ["0.333333"]),
        ([None], ["-"]),
        ([float("inf"), 2], ["inf", "2"]),
    ],
)
def test_numbers_of_a_column(values, texts):
    assert units.aligned(values) == texts


def test_metrics_and_changes():
    assert units.metric(0.9166, ".1%") == "91.7%"
    assert units.metric(12.414, ".2f") == "12.41"
    assert units.metric(None, ".2f") == "-"
    assert units.metric(12.41421, "nonsense") == "12.41"
    assert units.change(0.897, ".1%") == "+89.7 pts"
    assert units.change(-58.89, ".2f") == "-58.89"
    assert units.change(None, ".2f") == "-"


def test_plain_takes_out_what_a_terminal_would_obey():
    assert units.plain("a\x1b[31mb\x07") == "a?[31mb?"
    assert units.plain("± ↓ é\n") == "± ↓ é\n"
