from __future__ import annotations

import pytest

from filtrun.report.sheet import Number, marks, metric_facts, plus_minus
from filtrun.syntax import MetricFacts


@pytest.mark.parametrize(
    ("values", "form", "text"),
    [
        ([3.08, 3.12, 3.10], ".2f", "3.10 ± 0.02"),
        ([0.975, 0.981, 0.978], ".1%", "97.8 ± 0.3 %"),
        ([0.975], ".1%", "97.5 %"),
        ([3.1], ".2f", "3.10"),
        ([], ".2f", "-"),
        ([2.0, 2.0], ".1f", "2.0 ± 0.0"),
    ],
)
def test_mean_and_deviation(values, form, text):
    assert plus_minus(values, form) == text


@pytest.mark.parametrize(
    ("values", "better", "marked"),
    [
        ([3.0, 1.0, 2.0], "lower", ["", "best", "second"]),
        ([3.0, 1.0, 2.0], "higher", ["best", "", "second"]),
        ([3.0, 1.0], "higher", ["best", ""]),  # there is no second among two
        ([3.0, None, 3.0, 1.0], "higher", ["best", "", "best", "second"]),
        ([1.0, 1.0], "lower", ["", ""]),
        ([1.0, None], "lower", ["", ""]),
        ([1.0, 2.0, 3.0], "", ["", "", ""]),
    ],
)
def test_best_and_second(values, better, marked):
    assert marks(values, better) == marked


def test_numbers_are_written_as_their_task_says():
    facts = metric_facts(["filtrun.tasks.diffuse.Diffuse", "no.such.Task"])
    assert Number.of("test/fid", facts).values([3.101, 3.12]) == "3.11 ± 0.01"
    assert Number.of("base/fid", facts).title == "FID (base)"
    accuracy = Number.of("test/target_accuracy", facts)
    assert (accuracy.title, accuracy.change(0.0123)[-3:]) == ("class accuracy", "pts")
    own = Number.of("report/kept_share", {"kept_share": MetricFacts("no", format=".9f")})
    assert (own.title, own.values([0.25])) == ("kept share", "0.25")


def test_costs_have_units():
    assert Number.of("cost/stored_bytes", {}).values([84120.0, 84120.0]) == "84.1 KB"
    assert Number.of("cost/train_seconds", {}).values([1.0, 3.0]) == "2.00 s ± 1.41 s"
    assert Number.of("cost/nfe", {}).change(-12) == "-12" and Number.of("cost/unknown", {}).title == "unknown"
