"""``filtrun list``: the methods, models, data sets, tasks and papers there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from filtrun.catalogue import GROUPS, Entry, entries
from filtrun.errors import unknown
from filtrun.report.evidence import Claims
from filtrun.report.units import plain
from filtrun.verbs import Parser, print_json, terminal

SHOWN = ("methods", "models", "data", "tasks", "papers")
_TITLES = {"methods": "Methods", "models": "Models", "data": "Data sets", "tasks": "Tasks", "papers": "Papers"}


def main(argv: Sequence[str]) -> int:
    """List the kinds asked for (``methods``, ``methods,papers``; all of them when none is); returns the exit code."""
    parser = Parser("list", __doc__ or "")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(SHOWN)}, loggers, recipes or scales")
    parser.add_json()
    parser.add_config_dir()
    options = parser.parse(argv)
    kinds = [_kind(word) for given in options.kinds for word in given.split(",") if word] or list(SHOWN)
    found = {kind: entries(kind, options.config_dir) for kind in dict.fromkeys(kinds)}
    claims = Claims(options.config_dir)
    if options.json:
        print_json([row(entry, claims) for group in found.values() for entry in group])
    else:
        _print(found, claims)
    return 0


def _kind(word: str) -> str:
    known = {**{k: k for k in GROUPS}, **{group: kind for kind, group in GROUPS.items()}}
    if word not in known:
        raise unknown("kind", word, [k for k in GROUPS if k != "trainer"])
    return known[word]


def row(entry: Entry, claims: Claims) -> dict[str, Any]:
    """What the list says of an entry."""
    paper = entry.paper
    return {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "paper": paper.title if paper else None,
        "link": (paper.link or None) if paper else None,
        "year": paper.year if paper else None,
        "family": entry.family or None,
        "status": claims.status(entry),
    }


def _print(found: dict[str, list[Entry]], claims: Claims) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = terminal()
    for kind, group in found.items():
        rows = [row(entry, claims) for entry in group]
        title = f"{_TITLES.get(kind, kind.capitalize())} ({len(rows)})"
        if kind != "papers":
            title += f": {GROUPS[kind]}=NAME"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        columns = _columns(kind, rows, console.width)
        for column in columns:
            table.add_column(column, no_wrap=column in ("name", "year", "status"), overflow="fold")
        for item in rows:
            cells = {**item, "what it is": _short(item["summary"]), "paper": item["paper"] or ""}
            table.add_row(*(Text(plain(cells[c] or "")) for c in columns))
        console.print(table)
    console.print("`filtrun info NAME` explains one of them", markup=False)


def _columns(kind: str, rows: list[dict[str, Any]], width: int) -> list[str]:
    """The columns of a kind: what a paper's method is from, what anything else is; those that say nothing left out."""
    wanted = ["name", "what it is", "paper", "year", "family", "status"]
    if width < 120 or kind == "papers":
        wanted.remove("what it is" if kind in ("methods", "papers") else "paper")
    if kind not in ("methods", "papers") and all(item["status"] == "implemented" for item in rows):
        wanted.remove("status")
    return [c for c in wanted if c not in ("paper", "year", "family") or any(item[c] for item in rows)]


def _short(text: str, most: int = 90) -> str:
    """The first sentence, cut between words where it is long."""
    first = re.split(r"(?<!al)(?<=\.) ", text)[0]
    return first if len(first) <= most else first[:most].rpartition(" ")[0].rstrip(" ,;:(") + " ..."
