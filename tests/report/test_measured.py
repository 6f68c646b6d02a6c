from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import yaml

from filtrun.catalogue import conf_dir
from filtrun.errors import UserError
from filtrun.report.card import Measured, make_card, read_card
from filtrun.report.measured import check_writable, write_measured

CARD = """\
# A card.
title: "T"          # the title
link: https://x.org
year: 2024
family: peft
abstract: >-
  Long
  text.
tables:
  - name: first     # one
    title: First
    setting: s
    rows:
      a: [method=a]
      "on": [method=b, "x=[1,2]"]
    scales: {laptop: {seeds: [0, 1]}, paper: {seeds: [0]}}
    metrics: {test/fid: lower}
    # about the published numbers
    published: []

  # the second table
  - name: second
    title: Second
    setting: >-
      wrapped
      text
    rows: {a: [method=a]}
    scales: {laptop: {seeds: [0]}}
    metrics:
      test/fid: lower

# and the claims
claims: []
"""

NEW = Measured("laptop", "2026-01-31", "cpu (x86)", (0, 1), {"a": {"test/fid": (1.5, 2e-05)}, "on": {}})


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CARD)
    return path


def test_numbers_are_added_and_everything_else_stays(card):
    write_measured(card, "first", NEW)
    text = card.read_text()
    block = text[text.index("    measured:") : text.index("\n  # the second table")]
    assert text.replace(block, "") == CARD and block.splitlines()[1] == "      - scale: laptop"
    assert read_card(card).table("first").measured == (NEW,)
    write_measured(card, "first", NEW)
    assert card.read_text() == text


def test_numbers_of_one_scale_replace_their_like(card):
    write_measured(card, "first", NEW)
    paper = dataclasses.replace(NEW, scale="paper", seeds=(3,), rows={"on": {"test/fid": (1.0,)}}, note='a "note": so')
    write_measured(card, "first", paper)
    again = dataclasses.replace(NEW, date="2026-02-01")
    write_measured(card, "first", again)
    write_measured(card, "first", dataclasses.replace(paper, note=""))
    assert read_card(card).table("first").measured == (again, paper)  # in the order of the scales, the note is kept
    last = Measured("laptop", "2026-02-01", "cpu", (0,), {"a": {"test/fid": (1.0,)}})
    write_measured(card, "second", last)
    assert read_card(card).table("second").measured == (last,) and read_card(card).table("first").measured[0] == again
    assert "# and the claims\nclaims: []\n" in card.read_text() and "# about the published" in card.read_text()


def test_comments_beside_the_numbers_do_not_hinder(card):
    write_measured(card, "first", NEW)
    card.write_text(card.read_text().replace("    measured:", "    # before\n    measured:").replace(
        "\n  # the second", "    # after\n\n  # the second"))  # fmt: skip
    write_measured(card, "first", dataclasses.replace(NEW, date="2026-03-01"))
    text = card.read_text()
    assert "    # before\n    measured:" in text and "    # after\n" in text and text.count("measured:") == 1


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_dir() / "paper").glob("*.yaml")))
def test_every_card_can_be_written_and_only_gains_lines(name, tmp_path):
    path = tmp_path / f"{name}.yaml"
    text = (conf_dir() / "paper" / f"{name}.yaml").read_text()
    path.write_text(text)
    for table in read_card(path).tables:
        for scale, how in table.scales.items():
            rows = {row: {m: tuple(0.5 for _ in how.seeds) for m in table.metrics} for row in table.rows}
            write_measured(path, table.name, Measured(scale, "2026-01-31", "cpu", how.seeds, rows))
    lines = iter(path.read_text().splitlines())
    if "measured:" not in text:
        assert all(line in lines for line in text.splitlines())  # in their order
    tables = read_card(path).tables
    assert all([m.scale for m in table.measured] == list(table.scales) for table in tables)


def test_layouts_that_cannot_be_changed_are_refused(card):
    values = yaml.safe_load(CARD)
    for flow in (True, False):
        card.write_text(yaml.safe_dump(values, default_flow_style=flow))
        before = card.read_text()
        if flow:
            with pytest.raises(UserError, match="in braces"):
                write_measured(card, "first", NEW)
            assert card.read_text() == before
        else:
            write_measured(card, "first", NEW)
            assert read_card(card).table("first").measured == (NEW,)


def test_where_a_card_may_be_written(card, monkeypatch):
    check_writable(card)
    from filtrun.report import measured

    inside = card.parent / "filtrun" / "report" / "measured.py"
    monkeypatch.setattr(measured, "__file__", str(inside))
    with pytest.raises(UserError, match="belongs to an installed filtrun"):
        check_writable(card.parent / "filtrun" / "conf" / "paper" / "x.yaml")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="is not writable"):
        check_writable(card)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["scale"], "paper", "names no scale of the table 'paper'"),
        (["seeds"], [0], "must hold 1 numbers, one for each seed"),
        (["seeds"], [], "seeds must be a list of whole numbers"),
        (["rows", "c"], {}, "names no row 'c'"),
        (["rows", "a", "test/fdi"], [1, 2], "test/fdi is no metric of the table; did you mean 'test/fid'"),
        (["rows", "a", "test/fid"], [1, None], "must hold 2 numbers"),
        (["date"], 2026, "date must be a date"),
        (["device"], None, "device is missing"),
        (["extra"], 1, "extra is no key"),
    ],
)
def test_wrong_numbers_are_told_by_file_and_key(path, value, message):
    values = yaml.safe_load(CARD)
    block = {"scale": "laptop", "date": "2026-01-31", "device": "cpu", "seeds": [0, 1],
             "rows": {"a": {"test/fid": [1, 2.5]}}}  # fmt: skip
    values["tables"][1]["rows"]["b"] = ["method=b"]
    values["tables"][1]["measured"] = [block]
    good = make_card("x", copy.deepcopy(values)).table("second").measured[0]
    assert good.values("a", "test/fid") == {0: 1.0, 1: 2.5} and good.values("b", "test/fid") == {}
    for key in path[:-1]:
        block = block[key]
    block[path[-1]] = value
    with pytest.raises(UserError, match=message) as error:
        make_card("x", values)
    assert str(error.value).startswith("paper/x.yaml: tables[1]: measured[0]")
