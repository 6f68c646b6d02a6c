"""``filtrun table DIR``: the table of all records below a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from filtrun.errors import UserError
from filtrun.report.index import find
from filtrun.report.many import Question, folder_sheet

SHOWN = 60
"""So many rows are shown on a terminal when nothing else is asked for."""
_PAPER = ("scale_given", "run", "force", "workers", "launcher", "rows", "seeds", "write_card", "words")


def table_of(folder: Path, options: argparse.Namespace) -> int:
    """Print or write the table. Raises UserError for options of a paper's table and for unknown keys."""
    from filtrun.verbs.table import show

    for name in _PAPER:
        if getattr(options, name):
            given = options.words[0] if name == "words" else "--" + name.removesuffix("_given").replace("_", "-")
            hint = "; --where scale=... chooses by scale" if name == "scale_given" else ""
            raise UserError(f"{given} goes with a paper's table, and {options.paper} is a folder of records{hint}")
    asked, found = question(options), find(folder)
    show(options, [folder_sheet(found.records, folder, asked, found.broken)])
    return 0


def question(options: argparse.Namespace) -> Question:
    """What the options ask for. Raises UserError when they do not go together."""
    by, metrics, columns = (_words(text) for text in (options.by, options.metric, options.columns))
    if columns and (by or options.pivot):
        raise UserError("--columns shows records one by one; it does not go with --by and --pivot")
    if "all" in columns and options.format not in ("csv", "parquet", "json"):
        raise UserError("--columns all is for files: --format csv, parquet or json")
    if options.limit is not None and options.limit < 0:
        raise UserError(f"--limit {options.limit} must be a whole number from 0")
    limit = options.limit if options.limit is not None else SHOWN if options.format == "rich" and not options.out else 0
    return Question(
        tuple(options.where), by, options.pivot or "", metrics, columns, options.sort or "", options.reverse, limit
    )


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))
