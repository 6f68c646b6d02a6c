"""Sheets on a terminal: columns that do not fit beside ours come after them as tables of their own."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from filtrun.report.formats import ARROWS, text_sections
from filtrun.report.sheet import BEST, SECOND, Box, Column, Sheet
from filtrun.report.units import plain

STYLES = {BEST: "bold", SECOND: "underline", "": ""}
VERDICTS = {"holds": "green", "does not hold": "red", "not run": "yellow"}
HEADINGS = {"Mind": "yellow"}


def show(console: Console, sheets: list[Sheet]) -> None:
    """Print sheets one after the other."""
    for position, sheet in enumerate(sheets):
        if position:
            console.rule(style="dim")
        _show(console, sheet)


def _show(console: Console, sheet: Sheet) -> None:
    console.print(Text(plain(sheet.title), style="bold"))
    whole = _table(console, sheet, sheet.columns)
    natural = Measurement.get(console, console.options.update(max_width=10_000), whole).maximum
    if natural <= console.width or len(_groups(sheet)) < 2:
        console.print(whole)
    else:
        for group in _groups(sheet):
            columns = [c for c in sheet.columns if c.group in ("", group)]
            console.print(_table(console, sheet, columns, title=group))
    for title, lines in text_sections(sheet):
        if title == "Claims":
            _claims(console, sheet)
            continue
        if title:
            console.print(Text(f"{title}:", style=HEADINGS.get(title, "")))
        for line in lines:
            told = Text(plain(line), style="" if title else "dim")
            console.print(Padding(told, (0, 0, 0, 2 if title else 0), expand=False))
    for each in sheet.more:
        console.print()
        _show(console, each)


def _groups(sheet: Sheet) -> list[str]:
    return list(dict.fromkeys(c.group for c in sheet.columns if c.group))


def _table(console: Console, sheet: Sheet, columns: list[Column], title: str = "") -> Table:
    """Some columns of a sheet; rows that say nothing in them are left out."""
    arrows = {"lower": "(low)", "higher": "(high)"} if console.options.ascii_only else ARROWS
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title_justify="left")
    own = next((g for g in _groups(sheet) if g.startswith("ours")), "")  # a paper's table is ours where nothing is said
    if title:
        table.title, table.title_style = Text(title), "dim"
    for column in columns:
        group = f"{column.group}\n" if column.group and not title and column.group != own else ""
        heading = Text(f"{group}{column.title} {arrows.get(column.better, '')}".rstrip())
        table.add_column(heading, justify="right" if column.number else "left", overflow="fold")
    places = [i for i, c in enumerate(sheet.columns) if c in columns]
    for row in sheet.rows:
        boxes = [row[i] for i in places]
        if len(columns) == len(sheet.columns) or any(b.text != "-" for b in boxes[1:]):
            table.add_row(*map(_told, boxes))
    return table


def _told(box_: Box) -> Text:
    return Text(plain(box_.text), style=STYLES[box_.mark])


def _claims(console: Console, sheet: Sheet) -> None:
    console.print(Text("Claims:"))
    for claim in sheet.claims:
        line = Text("  ")
        line.append(claim.verdict, style=f"bold {VERDICTS.get(claim.verdict, '')}".strip())
        line.append(f": {plain(claim.says)}")
        console.print(line)
        console.print(Padding(Text(plain(claim.evidence), style="dim"), (0, 0, 0, 4), expand=False))
