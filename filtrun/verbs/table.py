"""``filtrun table PAPER``: a paper's table from records beside the published numbers, with every claim judged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.catalogue import entries
from filtrun.cells import MACHINE_KEYS
from filtrun.errors import UserError, closest
from filtrun.report.card import SCALES
from filtrun.verbs import Parser, print_json, terminal

if TYPE_CHECKING:
    from filtrun.catalogue import Entry
    from filtrun.report.card import Card
    from filtrun.report.grid import Grid
    from filtrun.report.sheet import Sheet

FORMATS = ("rich", "md", "latex", "html", "json")
GALLERY = "gallery"
EPILOG = """\
Numbers of ours come from records only, published ones from the paper's card. Cells lie in outputs/sweeps, named by what
they compute: the same cell started with `filtrun -m` or from another table is not run again.
"""


def main(argv: Sequence[str]) -> int:
    """Print tables, after running what is missing with ``--run``; returns 1 when a cell failed."""
    options = parse(argv)
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
    parser.usage = "%(prog)s PAPER [--scale SCALE] [--run] [--format FORMAT] [options] [KEY=VALUE ...]"
    parser.add_argument("paper", metavar="PAPER", help="a paper of `filtrun list papers`, or gallery: one line of each")
    parser.add_argument(
        "words", metavar="KEY=VALUE", nargs="*", help="where cells run: device=cuda, stages.root=DIR ..."
    )
    parser.add_argument("--scale", default="laptop", help=f"{', '.join(SCALES)}, or several (default laptop)")
    parser.add_argument("--run", action="store_true", help="run the cells that have no finished record")
    parser.add_argument(
        "--force", action="store_true", help="with --run: run finished cells again, keep their old files"
    )
    parser.add_argument("--format", default="rich", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--sweep-dir", default="outputs/sweeps", metavar="DIR", help="where the cells' folders lie")
    parser.add_argument("--rows", metavar="ROW,ROW", help="only these rows; of the gallery, only these papers")
    parser.add_argument("--seeds", metavar="N,N", help="instead of the card's seeds")
    parser.add_argument("--write-card", action="store_true", help="write what was measured into the paper's card")
    parser.add_config_dir()
    options, rest = parser.parse_known_intermixed_args(list(argv))
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"{parser.prog}: {rest[0]} is no option{closest(rest[0].partition('=')[0], known)}")
    options.scale = _chosen("scale", options.scale.split(","), SCALES)
    (options.format,) = _chosen("format", [options.format], FORMATS)
    if options.force and not options.run:
        raise UserError("--force goes with --run: it runs finished cells again")
    options.rows = options.rows.split(",") if options.rows else None
    options.seeds = _seeds(options.seeds) if options.seeds else None
    if options.write_card and (options.paper == GALLERY or options.rows or "smoke" in options.scale):
        raise UserError("--write-card takes one paper with all its rows, at a scale whose numbers mean something")
    options.sweep_dir = Path(options.sweep_dir).expanduser().absolute()
    for word in options.words:
        key = word.partition("=")[0]
        if "=" not in word or (key.partition(".")[0] not in MACHINE_KEYS and key != "data.root") or key == "force":
            raise UserError(
                f"{word}: a card says what its cells compute; only where they run can be set here "
                "(device, threads, logger, stages.root, data.root, trust)"
            )
    return options


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
    papers = entries("papers", options.config_dir)
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
    from filtrun.report.grid import choose_rows, read_grid

    if options.rows and options.paper != GALLERY:
        choose_rows(cards[0], options.rows)
    rows = None if options.paper == GALLERY else options.rows
    given: dict[str, Any] = {"seeds": options.seeds, "extra": options.words, "config_dirs": options.config_dir}
    return [
        read_grid(card, table, scale, options.sweep_dir, rows=rows, **given)
        for card in cards
        for table in card.tables
        if scale in table.scales and (rows is None or set(rows) & set(table.rows))
    ]


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
    return [paper_sheet(grid, only_rows=options.rows is not None) for found in grids.values() for grid in found]


def show(options: argparse.Namespace, sheets: list[Sheet]) -> None:
    """Print sheets in the format asked for."""
    if options.format == "json":
        print_json([sheet.data for sheet in sheets])
    elif options.format == "rich":
        from filtrun.report.terminal import show as draw

        draw(terminal(), sheets)
    else:
        from filtrun.report.formats import FORMATS as LAYOUTS

        print(LAYOUTS[options.format](sheets), end="")


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
