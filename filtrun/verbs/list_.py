"""``filtrun list``: the methods, models, data sets, tasks and papers there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from filtrun.catalogue import GROUPS, Entry, entries
from filtrun.errors import unknown
from filtrun.report.evidence import Claims
from filtrun.verbs import Parser, print_json

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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for kind, group in found.items():
        rows = [row(entry, claims) for entry in group]
        title = f"{_TITLES.get(kind, kind.capitalize())} ({len(rows)}), chosen with {GROUPS[kind]}=NAME"
        if kind == "papers":
            title = f"Papers ({len(rows)})"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        columns = ("name", "paper", "year", "family", "status")
        if kind not in ("methods", "papers"):
            columns = ("name", "what it is", "year", "family", "status")
        elif kind == "methods" and console.width >= 120:
            columns = ("name", "what it is", "paper", "year", "family", "status")
        keep = [c for c in columns if c != "year" or any(r["year"] for r in rows)]
        for column in keep:
            table.add_column(column, no_wrap=column in ("name", "year", "status"), overflow="fold")
        for item in rows:
            cells = {**item, "what it is": item["summary"], "paper": item["paper"] or item["summary"]}
            table.add_row(*(Text(str(cells[c] or "")) for c in keep))
        console.print(table)
    console.print("`filtrun info NAME` explains one of them", markup=False, highlight=False)
