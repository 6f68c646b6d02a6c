from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from filtrun.report import terminal
from filtrun.report.formats import latex, markdown, page
from filtrun.report.paper_sheet import paper_sheet
from filtrun.report.sheet import Box, Column, Judged, Sheet

SHEET = Sheet(
    "A & B",
    [Column("", number=False), Column("x_1", "lower", "ours"), Column("y", "higher", "[1]")],
    [[Box("a|b"), Box("1.0 ± 0.1", "best"), Box("50 %", "second")], [Box("<c>"), Box("2.0"), Box("-")]],
    caption=["laptop scale"], notes=["[1] elsewhere"], claims=[Judged("holds", "a_b", "p = 0.1")],
    warnings=["beware"], missing=["a: seed 0"], more=[Sheet("More", [Column("", number=False)], [[Box("row")]])],
)  # fmt: skip


def drawn(sheet, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    terminal.show(Console(file=stream, width=width, color_system=None), [sheet])
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_markdown():
    text = markdown([SHEET])
    assert text.splitlines()[2:6] == [
        r"|  | x\_1 ↓ (ours) | y ↑ (\[1\]) |", "|---|---:|---:|",
        r"| a\|b | **1.0 ± 0.1** | <u>50 %</u> |", r"| \<c\> | 2.0 | - |",
    ]  # fmt: skip
    for part in ("- laptop scale", r"- \[1\] elsewhere", r"- holds: a\_b; p = 0.1", "Mind:\n\n- beware", "**More**"):
        assert part in text


def test_latex():
    text = latex([SHEET])
    assert r"a|b & \textbf{1.0 $\pm$ 0.1} & \underline{50 \%} \\" in text
    assert r" & x\_1 $\downarrow$ & y $\uparrow$ \\" in text and r"\begin{tabular}{lrr}" in text
    assert r"\caption{A \& B. laptop scale. [1] elsewhere. beware.}" in text
    assert r"\multicolumn{1}{c}{} & \multicolumn{1}{c}{ours} & \multicolumn{1}{c}{[1]} \\" in text
    assert r"\cmidrule(lr){2-2} \cmidrule(lr){3-3}" in text and "% Claims: holds: a_b; p = 0.1" in text
    assert [text.count(rf"\{rule}rule") for rule in ("top", "bottom")] == [2, 2] and text.count(r"\end{table}") == 2


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_and_needs_nothing_else():
    text = page([SHEET, SHEET])
    parser = Tags()
    parser.feed(text)
    assert not parser.open and parser.seen.count("table") == 4 and parser.seen.count("tr") == 2 * (4 + 2)
    assert "&lt;c&gt;" in text and "<strong>1.0 ± 0.1</strong>" in text and '<span class="second">50 %</span>' in text
    assert "http" not in text and "<script" not in text and 'charset="utf-8"' in text


def test_terminal():
    text = drawn(SHEET)
    for part in ("1.0 ± 0.1", "x_1 ↓", "holds: a_b", "Mind:", "beware", "Not run:", "More", "laptop scale"):
        assert part in text
    assert "x_1 (low)" in drawn(SHEET, encoding="ascii")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_any_terminal(cards, run_sweeps, width):
    text = drawn(paper_sheet(cards.grid_of(run_sweeps)), width)
    assert max(map(len, text.splitlines())) <= width
    assert bool(re.search(r"^published \[1\]", text, re.M)) == (width == 60)  # then a table of its own
    assert "92.00 ± 2.00 %" in text or width == 60


def test_text_from_a_record_is_not_obeyed(cards):
    sheet = Sheet("[red]t[/red]", SHEET.columns, [[Box("a\x1b[2J"), Box("[b]"), Box("")]])
    text = drawn(sheet)
    assert "\x1b" not in text and "[red]t[/red]" in text and "[b]" in text
