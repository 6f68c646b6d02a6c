from __future__ import annotations

import copy

import pytest

from filtrun.report.card import Claim, make_card
from filtrun.report.judge import count_verdicts, judge, judge_card, measured_scale, verdict_data

CARD = {
    "title": "T: a title", "link": "https://x.org", "year": 2024, "family": "peft", "abstract": "A.",
    "tables": [
        {
            "name": "t", "title": "Table", "setting": "s", "rows": {"a": ["method=a"], "b": ["method=b"]},
            "scales": {"smoke": {"seeds": [0]}, "laptop": {"seeds": [0, 1, 2]}, "paper": {"seeds": [0, 1, 2]}},
            "metrics": {"test/fid": "lower", "test/accuracy": "higher"},
            "measured": [
                {"scale": "laptop", "date": "2026-01-31", "device": "cpu", "seeds": [0, 1, 2], "rows": {
                    "a": {"test/fid": [3.1, 3.2, 3.0], "test/accuracy": [0.9, 0.91, 0.92]},
                    "b": {"test/fid": [4.2, 4.4, 4.5]},
                }},
            ],
        }
    ],
    "claims": [
        {"claim": "test/fid(a) better than test/fid(b) by 0", "table": "t", "says": "x", "source": "y"},
        {"claim": "test/accuracy(a) better than test/accuracy(b) by 0", "table": "t", "says": "x", "source": "y"},
    ],
}  # fmt: skip


def claim(margin=0.0, relative=False):
    return Claim("text", "test/fid", "a", "b", margin, relative, "t", "says", "source")


def seeds(*values):
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("direction", "margin", "relative", "verdict"),
    [
        ("lower", 0.0, False, "holds"),
        ("higher", 0.0, False, "does not hold"),
        ("lower", 1.0, False, "holds"),  # exactly the margin
        ("lower", 1.01, False, "does not hold"),
        ("higher", -1.0, False, "holds"),  # allowed to be worse by that much
        ("higher", -0.9, False, "does not hold"),
        ("lower", 0.2, True, "holds"),
        ("lower", 0.3, True, "does not hold"),
    ],
)
def test_verdicts(direction, margin, relative, verdict):
    found = judge(claim(margin, relative), direction, seeds(3.0, 3.0, 3.0), seeds(4.0, 4.0, 4.0), (0, 1, 2))
    assert found.verdict == verdict and found.gain.mean == (1.0 if direction == "lower" else -1.0)


def test_a_draw_is_not_better():
    assert judge(claim(), "lower", seeds(1.0, 1.0), seeds(1.0, 1.0), (0, 1)).verdict == "does not hold"


def test_pairs_are_of_one_seed():
    found = judge(claim(), "higher", {0: 1.0, 1: 5.0, 7: 0.0}, {1: 4.5, 0: 0.9}, (1, 0))
    assert found.gain.differences == pytest.approx((0.5, 0.1)) and found.verdict == "holds" and found.sure is False
    sure = judge(claim(), "higher", seeds(1.0, 2.0, 3.0), seeds(0.5, 1.49, 2.5), (0, 1, 2))
    assert sure.sure is True


def test_not_run_while_a_seed_is_missing():
    found = judge(claim(), "lower", seeds(1.0, 1.0), seeds(2.0, 2.0, 2.0), (0, 1, 2))
    assert (found.verdict, found.note, found.gain) == ("not run", "2 of 3 seeds", None)
    assert judge(claim(), "lower", {}, seeds(2.0), (0,)).note == "" and "p_t" not in verdict_data(found)


def test_the_cards_own_numbers_are_judged():
    card = make_card("a", copy.deepcopy(CARD))
    first, second = judge_card(card, "laptop")
    assert (first.verdict, second.verdict) == ("holds", "not run")
    assert first.gain.mean == pytest.approx((1.1 + 1.2 + 1.5) / 3) and first.beyond.least_p == 0.125
    assert measured_scale(card) == "laptop" and count_verdicts([first, second]) == "1/2, 1 not run"
    assert [v.verdict for v in judge_card(card, "paper")] == ["not run", "not run"] and count_verdicts([]) == "-"
    data = verdict_data(first)
    assert data["wins"] == 3 and data["ci95"][0] > 0 and data["sure"] is True
