"""``filtrun list``: the methods, models, data sets, tasks and papers there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from filtrun.catalogue import GROUPS, Entry, entries
from filtrun.errors import UserError, closest, unknown
from filtrun.listed import IMPLEMENTED, STATUSES
from filtrun.report.evidence import Claims
from filtrun.report.units import plain
from filtrun.verbs import Parser, print_json, terminal

SHOWN = ("methods", "models", "data", "tasks", "papers")
MANY = 60
"""From this many papers on a title is cut to one line."""

_TITLES = {"methods": "Methods", "models": "Models", "data": "Data sets", "tasks": "Tasks", "papers": "Papers"}


def main(argv: Sequence[str]) -> int:
    """List the kinds asked for (``methods``, ``methods,papers``; all of them when none is); returns the exit code."""
    parser = Parser("list", __doc__ or "")
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"{', '.join(SHOWN)}, sweeps, loggers, recipes or scales"
    )
    parser.add_argument("--family", metavar="NAME,NAME", help="only these families, such as peft,pruning")
    parser.add_argument("--status", metavar="STATUS", help=f"only what is {' or '.join(STATUSES)}")
    parser.add_json()
    parser.add_config_dir()
    options = parser.parse(argv)
    if options.status is not None and options.status not in STATUSES:
        raise UserError(f"--status {options.status} must be {' or '.join(STATUSES)}{closest(options.status, STATUSES)}")
    kinds = [_kind(word) for given in options.kinds for word in given.split(",") if word]
    found = {kind: entries(kind, options.config_dir) for kind in dict.fromkeys(kinds or SHOWN)}
    families = [word for word in (options.family or "").split(",") if word]
    _check_families(families, found)
    if families or options.status:
        found = {kind: chosen(group, families, options.status) for kind, group in found.items()}
        found = {kind: group for kind, group in found.items() if group}
    claims = Claims(options.config_dir)
    if options.json:
        print_json([row(entry, claims) for group in found.values() for entry in group])
    else:
        _print(found, claims, planned=bool(kinds or families or options.status))
    return 0


def _check_families(names: Sequence[str], found: dict[str, list[Entry]]) -> None:
    known = sorted({entry.family for group in found.values() for entry in group if entry.family})
    for name in names:
        if name not in known:
            raise UserError(f"no family is called {name!r} here{closest(name, known)}; there are {', '.join(known)}")


def _kind(word: str) -> str:
    known = {**{k: k for k in GROUPS}, **{group: kind for kind, group in GROUPS.items()}}
    if word not in known:
        raise unknown("kind", word, [k for k in GROUPS if k != "trainer"])
    return known[word]


def chosen(group: list[Entry], families: Sequence[str], status: str | None) -> list[Entry]:
    """The entries of some families (any, when none is named) with a status; what has a config is implemented."""
    return [e for e in group if (not families or e.family in families) and status in (None, e.status)]


def row(entry: Entry, claims: Claims) -> dict[str, Any]:
    """What the list says of an entry; of a paper its claim and, where it is implemented, how far that is tested."""
    paper = entry.paper
    made = {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "paper": paper.title if paper else None,
        "link": (paper.link or None) if paper else None,
        "year": paper.year if paper else None,
        "family": entry.family or None,
        "status": claims.status(entry),
    }
    if entry.kind != "papers" or entry.problem:
        return made
    tested = made["status"] if entry.card is not None and entry.card.claims else None
    listed = {"brings": entry.listed.kind, "claim": entry.listed.claim} if entry.listed else {}
    return made | {"status": entry.status, "claims": tested, **listed}


def _print(found: dict[str, list[Entry]], claims: Claims, *, planned: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = terminal()
    for kind, group in found.items():
        shown = group if planned else chosen(group, (), IMPLEMENTED)
        rows = [row(entry, claims) for entry in shown]
        title = f"{_TITLES.get(kind, kind.capitalize())} ({len(rows)})"
        if kind != "papers":
            title += f": {GROUPS[kind]}=NAME"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        columns = _columns(kind, rows, console.width)
        for column in columns:
            table.add_column(column, no_wrap=column in ("name", "year", "status", "claims"), overflow="fold")
        most = _title_width(rows, columns, console.width) if kind == "papers" and len(rows) > MANY else 1000
        family = None
        for item in sorted(rows, key=_by_family) if kind == "papers" else rows:
            if kind == "papers" and item["family"] != family:
                family = item["family"]
                table.add_section()
                table.add_row(Text(family or "no family", style="bold"))
            cells = {**item, "what it is": _short(item["summary"]), "paper": _cut(item["paper"] or "", most)}
            cells["claims"] = (item.get("claims") or "").removeprefix("holds ")
            table.add_row(*(Text(plain(cells[c] or "")) for c in columns))
        console.print(table)
        if kind == "papers":
            console.print(_counts(group, hidden=len(group) - len(shown)), markup=False, highlight=False)
    console.print("`filtrun info NAME` explains one of them", markup=False)


def _title_width(rows: list[dict[str, Any]], columns: Sequence[str], width: int) -> int:
    """Letters left for a title beside the other columns, so that a paper takes one line."""
    beside = [max(len(str(c)) for c in (column, *(r.get(column) or "" for r in rows))) for column in columns]
    return max(20, width - sum(beside) + beside[columns.index("paper")] - 3 * len(columns))


def _by_family(item: dict[str, Any]) -> tuple[str, str, str]:
    return item["family"] or "", item["status"], item["name"]


def _counts(papers: list[Entry], hidden: int) -> str:
    counts = [(status, sum(e.status == status for e in papers)) for status in STATUSES]
    told = f"{len(papers)} papers: " + ", ".join(f"{count} {status}" for status, count in counts if count)
    return told + (" (`filtrun list papers` shows them)" if hidden else "")


def _columns(kind: str, rows: list[dict[str, Any]], width: int) -> list[str]:
    """The columns of a kind: what a paper's method is from, what anything else is; those that say nothing left out."""
    if kind == "papers":
        tested = any(item.get("claims") for item in rows) and (width >= 120 or len(rows) <= MANY)
        return ["name", "paper", "year", "status", *(["claims"] if tested else [])]
    wanted = ["name", "what it is", "paper", "year", "family", "status"]
    if width < 120:
        wanted.remove("what it is" if kind == "methods" else "paper")
    if kind != "methods" and all(item["status"] == IMPLEMENTED for item in rows):
        wanted.remove("status")
    return [c for c in wanted if c not in ("paper", "year", "family") or any(item[c] for item in rows)]


def _short(text: str, most: int = 90) -> str:
    """The first sentence, cut between words where it is long."""
    first = re.split(r"(?<!al)(?<=\.) ", text)[0]
    return _cut(first, most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rpartition(" ")[0].rstrip(" ,;:(") + " ..."
