"""``filtrun table PAPER|DIR``: a paper's table beside the published numbers, claims judged; or any records' table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.catalogue import entries
from filtrun.cells import MACHINE_KEYS
from filtrun.errors import UserError, closest
from filtrun.report.card import SCALES
from filtrun.report.select import parse_where
from filtrun.verbs import Parser, print_json, terminal

if TYPE_CHECKING:
    from filtrun.catalogue import Entry
    from filtrun.report.card import Card
    from filtrun.report.grid import Grid
    from filtrun.report.sheet import Sheet

FORMATS = ("rich", "md", "latex", "html", "json", "csv", "parquet")
GALLERY = "gallery"
EPILOG = """\
Numbers of ours come from records only, published ones from the paper's card. Cells lie in outputs/sweeps, named by what
they compute: the same cell started with `filtrun -m` or from another table is not run again.

A key is name, status, seed, task, data, model, methods or folder; a metric such as test/accuracy; cost/NAME,
report/NAME, evaluation/NAME or environment/NAME; or the path of a config value such as trainer.lr. Conditions are
KEY SIGN VALUE with = != < <= > >= and ~ (contains, or a pattern with *); joined by commas, all must hold.
"""


def main(argv: Sequence[str]) -> int:
    """Print tables, after running what is missing with ``--run``; returns 1 when a cell failed."""
    options = parse(argv)
    folder = folder_of(options)
    if folder is not None:
        from filtrun.verbs.table_folder import table_of

        return table_of(folder, options)
    _check_paper(options)
    cards = find_cards(options)
    if options.write_card:
        from filtrun.report.measured import check_writable

        for path in paths_of(cards, options.config_dir).values():
            check_writable(path)
    grids = {scale: read(options, cards, scale) for scale in options.scale}
    failed = 0
    if options.run:
        from filtrun.verbs.table_run import run_missing

        failed = run_missing(to_run(options, grids), options.sweep_dir, force=options.force)
    show(options, sheets_of(options, cards, grids))
    if options.write_card:
        write_cards(options, [grid for found in grids.values() for grid in found])
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked and split. Raises UserError."""
    parser = Parser("table", __doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.usage = (
        "%(prog)s PAPER [--scale SCALE] [--run] [--format FORMAT] [options] [KEY=VALUE ...]\n"
        "       %(prog)s DIR [--where CONDITIONS] [--by KEYS] [--pivot KEY] [--metric METRICS] [options]"
    )
    parser.add_argument(
        "paper", metavar="PAPER|DIR",
        help="a paper of `filtrun list papers`, gallery (one line of each paper), or a folder of records",
    )  # fmt: skip
    parser.add_argument(
        "words", metavar="KEY=VALUE", nargs="*", help="where cells run: device=cuda, stages.root=DIR ..."
    )
    parser.add_argument("--scale", help=f"{', '.join(SCALES)}, or several (default laptop)")
    parser.add_argument("--run", action="store_true", help="run the cells that have no finished record")
    parser.add_argument(
        "--force", action="store_true", help="with --run: run finished cells again, keep their old files"
    )
    parser.add_argument("--format", metavar="FORMAT", help=", ".join(FORMATS) + " (default: what --out says, or rich)")
    parser.add_argument("--out", metavar="FILE", help="write the table into a file")
    parser.add_argument("--overwrite", action="store_true", help="with --out: replace a file that is there")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITIONS",
        help="only such records: seed<3,method.sara.rank=4",
    )
    parser.add_argument("--sweep-dir", default="outputs/sweeps", metavar="DIR", help="where the cells' folders lie")
    parser.add_argument("--rows", metavar="ROW,ROW", help="only these rows; of the gallery, only these papers")
    parser.add_argument("--seeds", metavar="N,N", help="instead of the card's seeds")
    parser.add_argument("--write-card", action="store_true", help="write what was measured into the paper's card")
    parser.add_config_dir()
    many = parser.add_argument_group("of a folder of records")
    many.add_argument("--by", metavar="KEY,KEY", help="one row for all finished records with the same values")
    many.add_argument("--pivot", metavar="KEY", help="columns of their own for each of the key's values")
    many.add_argument("--metric", metavar="NAME,NAME", help="test/accuracy, cost/flops, report/sparsity ...")
    many.add_argument("--columns", metavar="KEY,KEY", help="what to show of each record; all: every key (in files)")
    many.add_argument("--sort", metavar="KEY", help="a key or a metric (best first)")
    many.add_argument("--reverse", action="store_true", help="with --sort: the other way round")
    many.add_argument("--limit", type=int, metavar="N", help="show so many rows; 0: all (default 60 on a terminal)")
    options, rest = parser.parse_known_intermixed_args(list(argv))
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"{parser.prog}: {rest[0]} is no option{closest(rest[0].partition('=')[0], known)}")
    options.scale_given = options.scale is not None
    options.scale = _chosen("scale", (options.scale or "laptop").split(","), SCALES)
    options.format = _format(options)
    options.where = parse_where(options.where)
    if options.force and not options.run:
        raise UserError("--force goes with --run: it runs finished cells again")
    options.rows = options.rows.split(",") if options.rows else None
    options.seeds = _seeds(options.seeds) if options.seeds else None
    if options.write_card and (options.paper == GALLERY or options.rows or "smoke" in options.scale):
        raise UserError("--write-card takes one paper with all its rows, at a scale whose numbers mean something")
    options.sweep_dir = Path(options.sweep_dir).expanduser().absolute()
    return options


def folder_of(options: argparse.Namespace) -> Path | None:
    """The folder of records that is meant; None when it is a paper's name, also where a folder is called like it."""
    folder = Path(options.paper).expanduser()
    named = os.sep not in options.paper and options.paper not in (".", "..", "~")
    if named and (not folder.is_dir() or options.paper in [GALLERY, *(e.name for e in _papers(options))]):
        return None
    if not folder.is_dir():
        raise UserError(f"there is no folder {options.paper}")
    return folder


def _papers(options: argparse.Namespace) -> list[Any]:
    return entries("papers", options.config_dir)


def _format(options: argparse.Namespace) -> str:
    """The format asked for, or that of the file's name."""
    from filtrun.report.export import SUFFIXES

    if options.overwrite and not options.out:
        raise UserError("--overwrite goes with --out FILE")
    if options.format:
        (form,) = _chosen("format", [options.format], FORMATS)
    elif options.out:
        suffix = Path(options.out).suffix
        if suffix not in SUFFIXES:
            raise UserError(f"--out {options.out}: give --format, or a name that ends in {', '.join(SUFFIXES)}")
        form = SUFFIXES[suffix]
    else:
        form = "rich"
    if form == "parquet" and not options.out:
        raise UserError("parquet is no text: give --out FILE.parquet")
    return form


def _check_paper(options: argparse.Namespace) -> None:
    """What does not go with a paper is an error, and so is a word that is more than where cells run."""
    for name in ("by", "pivot", "metric", "columns", "sort", "reverse", "limit"):
        if getattr(options, name) is not None and getattr(options, name) is not False:
            raise UserError(f"--{name} goes with a folder of records; a paper's card says what its table shows")
    if options.where and (options.paper == GALLERY or options.write_card):
        raise UserError("--where goes with the table of one paper or a folder, and not with --write-card")
    if options.out and Path(options.out).exists() and not options.overwrite:
        raise UserError(f"{options.out} exists; choose another --out, or --overwrite to replace it")
    for word in options.words:
        key = word.partition("=")[0]
        if "=" not in word or (key.partition(".")[0] not in MACHINE_KEYS and key != "data.root") or key == "force":
            raise UserError(
                f"{word}: a card says what its cells compute; only where they run can be set here "
                "(device, threads, logger, stages.root, data.root, trust)"
            )


def _chosen(what: str, words: Sequence[str], allowed: Sequence[str]) -> list[str]:
    for word in words:
        if word not in allowed:
            names = ", ".join(allowed)
            raise UserError(f"unknown {what} {word!r} (allowed: {names}){closest(word, allowed)}")
    return list(dict.fromkeys(words))


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise UserError(f"--seeds {text} must be whole numbers from 0, such as 0,1,2")
    return list(dict.fromkeys(int(word) for word in words))


def find_cards(options: argparse.Namespace) -> list[Card]:
    """The card of the paper asked for, or all that have a table. Raises UserError with the closest name."""
    papers = _papers(options)
    if options.paper == GALLERY:
        cards = [e.card for e in papers if e.card is not None and e.card.tables]
        for name in options.rows or ():
            if name not in [card.slug for card in cards]:
                raise UserError(f"--rows {name}: no such paper{closest(name, [card.slug for card in cards])}")
        return [card for card in cards if not options.rows or card.slug in options.rows]
    names = [e.name for e in papers] + [GALLERY]
    found = next((e for e in papers if e.name == options.paper), None)
    if found is None:
        near = closest(options.paper, names)
        raise UserError(f"unknown paper {options.paper!r} (`filtrun list papers` has all){near}")
    if found.card is None:
        raise UserError(found.problem or planned(found))
    return [found.card]


def planned(entry: Entry) -> str:
    """What there is to say of a paper that only the catalogue knows."""
    claim = entry.listed.claim if entry.listed else ""
    return f"{entry.name} is planned, not implemented: there is no card and no table of it yet. It claims: {claim}"


def paths_of(cards: Sequence[Card], config_dirs: Sequence[str]) -> dict[str, Path]:
    """The files of cards by their names."""
    names = {card.slug for card in cards}
    return {e.name: e.path for e in entries("papers", config_dirs) if e.name in names}


def read(options: argparse.Namespace, cards: Sequence[Card], scale: str) -> list[Grid]:
    """The tables of cards at a scale, with their records."""
    from filtrun.report.grid import choose_cells, choose_rows, read_grid

    if options.rows and options.paper != GALLERY:
        choose_rows(cards[0], options.rows)
    rows = None if options.paper == GALLERY else options.rows
    given: dict[str, Any] = {"seeds": options.seeds, "extra": options.words, "config_dirs": options.config_dir}
    grids = [
        read_grid(card, table, scale, options.sweep_dir, rows=rows, **given)
        for card in cards
        for table in card.tables
        if scale in table.scales and (rows is None or set(rows) & set(table.rows))
    ]
    return choose_cells(grids, options.where) if options.where and grids else grids


def to_run(options: argparse.Namespace, grids: Mapping[str, list[Grid]]) -> list[Grid]:
    """The grids whose cells ``--run`` is about: of a gallery only the two rows of each paper it shows."""
    from filtrun.report.gallery import needed

    found = [grid for each in grids.values() for grid in each]
    return needed(found) if options.paper == GALLERY else found


def sheets_of(options: argparse.Namespace, cards: Sequence[Card], grids: Mapping[str, list[Grid]]) -> list[Sheet]:
    """What is to be shown."""
    from filtrun.report.gallery import gallery_sheet
    from filtrun.report.paper_sheet import paper_sheet

    if options.paper == GALLERY:
        return [gallery_sheet(found, scale) for scale, found in grids.items()]
    for scale, found in grids.items():
        if not found:
            scales = dict.fromkeys(s for table in cards[0].tables for s in table.scales)
            raise UserError(
                f"{options.paper} has no table at scale {scale}; it has {', '.join(scales) or 'none at all'}"
            )
    few = options.rows is not None or bool(options.where)
    made = [paper_sheet(grid, only_rows=few) for found in grids.values() for grid in found]
    for sheet in made if options.where else ():
        sheet.notes.append(f"only cells with {', '.join(map(str, options.where))}")
    return made


def show(options: argparse.Namespace, sheets: list[Sheet]) -> None:
    """Print sheets in the format asked for, or write them into a file."""
    from filtrun.report import export

    if options.out:
        export.write(Path(options.out), export.rendered(sheets, options.format), overwrite=options.overwrite)
        print(f"written: {options.out}", file=sys.stderr)
    elif options.format == "json":
        print_json([sheet.data for sheet in sheets])
    elif options.format == "rich":
        from filtrun.report.terminal import show as draw

        draw(terminal(), sheets)
    else:
        print(export.rendered(sheets, options.format).decode(), end="")


def write_cards(options: argparse.Namespace, grids: Sequence[Grid]) -> None:
    """Write what was measured into the papers' cards."""
    from filtrun.report.measured import measured_of, write_measured

    paths = paths_of([grid.card for grid in grids], options.config_dir)
    written, problems = [], []
    for grid in grids:
        try:
            new = measured_of(grid)
        except UserError as error:
            problems.append(str(error))
            continue
        write_measured(paths[grid.card.slug], grid.table.name, new)
        left = [row for row in grid.rows if row not in new.rows]
        more = f"; without {', '.join(left)}, not run with all seeds" if left else ""
        written.append(f"{paths[grid.card.slug]}: {grid.table.name} at {grid.scale} scale, {len(new.rows)} rows{more}")
    for line in written:
        print(f"written: {line}", file=sys.stderr)
    if problems and not written:
        raise UserError(problems[0])
    for line in problems:
        print(f"left out: {line}", file=sys.stderr)
