"""``filtrun table PAPER|DIR``: a paper's table beside the published numbers, claims judged; or any records' table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.catalogue import entries
from filtrun.errors import UserError, closest
from filtrun.verbs import print_json, terminal
from filtrun.verbs.table_options import GALLERY, check_paper, folder_of, parse

if TYPE_CHECKING:
    from filtrun.catalogue import Entry
    from filtrun.report.card import Card
    from filtrun.report.grid import Grid
    from filtrun.report.sheet import Sheet


def main(argv: Sequence[str]) -> int:
    """Print tables, after running what is missing with ``--run``; returns 1 when a cell failed."""
    options = parse(argv)
    folder = folder_of(options)
    if folder is not None:
        from filtrun.verbs.table_folder import table_of

        return table_of(folder, options)
    check_paper(options)
    cards = find_cards(options)
    if options.write_card:
        from filtrun.report.measured import check_writable

        for path in paths_of(cards, options.config_dir).values():
            check_writable(path)
    grids = {scale: read(options, cards, scale) for scale in options.scale}
    failed = 0
    if options.run:
        from filtrun.verbs.table_run import run_missing

        failed = run_missing(
            to_run(options, grids), options.sweep_dir, force=options.force, workers=options.workers,
            launcher=options.launcher, options=options.launcher_options,
        )  # fmt: skip
    show(options, sheets_of(options, cards, grids))
    if options.write_card:
        write_cards(options, [grid for found in grids.values() for grid in found])
    return 1 if failed else 0


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
