"""The arguments of ``filtrun table``, and whether they mean a paper or a folder of records."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from filtrun.catalogue import conf_dir
from filtrun.cells import MACHINE_KEYS
from filtrun.errors import UserError, closest
from filtrun.report.card import SCALES
from filtrun.report.select import parse_where
from filtrun.verbs import Parser

FORMATS = ("rich", "md", "latex", "html", "json", "csv", "parquet")
GALLERY = "gallery"
DESCRIPTION = (
    "``filtrun table PAPER|DIR``: a paper's table beside the published numbers, with every claim judged; "
    "or the table of any records."
)
EPILOG = """\
Numbers of ours come from records only, published ones from the paper's card. Cells lie in outputs/sweeps, named by what
they compute: the same cell started with `filtrun -m` or from another table is not run again.

A key is name, status, seed, task, data, model, methods or folder; a metric such as test/accuracy; cost/NAME,
report/NAME, evaluation/NAME or environment/NAME; or the path of a config value such as trainer.lr. Conditions are
KEY SIGN VALUE with = != < <= > >= and ~ (contains, or a pattern with *); joined by commas, all must hold.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked and split. Raises UserError."""
    parser = Parser("table", DESCRIPTION)
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
    parser.add_argument(
        "--workers", type=int, metavar="N", help="with --run: N processes at a time (default: this one, cell by cell)"
    )
    parser.add_argument(
        "--launcher", metavar="NAME", help="with --run: where the workers run, with hydra.launcher.KEY=VALUE options"
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
    if options.workers is not None and (options.workers < 1 or not options.run):
        raise UserError("--workers goes with --run and is a whole number from 1")
    _launcher(options)
    options.rows = options.rows.split(",") if options.rows else None
    options.seeds = _seeds(options.seeds) if options.seeds else None
    if options.write_card and (options.paper == GALLERY or options.rows or "smoke" in options.scale):
        raise UserError("--write-card takes one paper with all its rows, at a scale whose numbers mean something")
    options.sweep_dir = Path(options.sweep_dir).expanduser().absolute()
    return options


def _launcher(options: argparse.Namespace) -> None:
    """Take the launcher's options out of the words."""
    from filtrun.sweeps.launchers import launcher_of

    given = [f"hydra/launcher={options.launcher}"] if options.launcher else []
    found = launcher_of([*given, *options.words], options.config_dir)
    options.words, options.launcher, options.launcher_options = found
    if options.launcher and not options.run:
        raise UserError("--launcher goes with --run: it says where the cells run")


def folder_of(options: argparse.Namespace) -> Path | None:
    """The folder of records that is meant; None when it is a paper's name, also where a folder is called like it."""
    folder = Path(options.paper).expanduser()
    named = os.sep not in options.paper and options.paper not in (".", "..", "~")
    folders = [conf_dir(), *(Path(given).expanduser() for given in options.config_dir)]
    paper = options.paper == GALLERY or any((each / "paper" / f"{options.paper}.yaml").is_file() for each in folders)
    if named and (paper or not folder.is_dir()):
        return None
    if not folder.is_dir():
        raise UserError(f"there is no folder {options.paper}")
    return folder


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


def check_paper(options: argparse.Namespace) -> None:
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
