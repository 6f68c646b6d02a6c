"""The words of ``filtrun -m`` as the words of each cell: a product of lists of values, and rows of values that pair."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import UserError, closest

FLAGS = ("-m", "--multirun", "--config-dir", "-cd")
"""Hydra's flags that mean something for a sweep."""

PLACES = ("hydra.sweep.dir", "hydra.searchpath")
"""Hydra's keys that do."""


def expand(
    words: Sequence[str], rows: Sequence[Sequence[str]] = ((),), config_dirs: Sequence[str | Path] = ()
) -> list[tuple[str, ...]]:
    """The overrides of every cell, in the order of the words: the last list of values varies fastest.

    Args:
        words: overrides as Hydra reads them: ``seed=0,1,2``, ``trainer.lr=choice(0.1,0.2)``, ``seed=range(0,10)``,
            ``method=glob(*)``.
        rows: overrides that belong together, which may hold lists of values too; every row goes with every cell of
            `words`, and what is in both is as in `words`: what is given last for a key counts.
        config_dirs: the user's own folders of configs, which ``glob`` looks into as well.

    Raises:
        UserError: a word is not understood, or sweeps over what has no end.
    """
    return [cell for row in rows for cell in itertools.product(*_values([*row, *words], config_dirs))]


def _values(words: Sequence[str], config_dirs: Sequence[str | Path]) -> list[list[str]]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from filtrun.hydra_errors import translated

    with translated(words):
        parsed = OverridesParser.create(config_loader=_options(config_dirs)).parse_overrides(list(words))
    found: dict[str, list[str]] = {}
    for override in parsed:
        key = override.get_key_element()
        if not override.is_sweep_override():
            found[key] = [str(override.input_line)]
            continue
        if not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line}: an interval has no end of values; list some, or search it: "
                f"filtrun search '{override.key_or_group}=A..B'"
            )
        found[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        if not found[key]:
            raise UserError(f"{override.input_line} is a list without values")
    return list(found.values())


def _options(config_dirs: Sequence[str | Path]) -> Any:
    """What tells ``glob`` the options of a group."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    from filtrun.catalogue import conf_dir

    path = create_config_search_path(str(conf_dir()))
    for folder in config_dirs:
        path.append("command-line", f"file://{Path(folder).expanduser().absolute()}")
    return ConfigLoaderImpl(config_search_path=path)


def split_rows(text: str) -> list[list[str]]:
    """``method=lora trainer.lr=1e-3; method=sara trainer.lr=5e-4`` as the words of each row.

    Raises UserError for a row that is empty or not made of KEY=VALUE.
    """
    rows = []
    for part in text.strip("\n ").split(";"):
        try:
            words = shlex.split(part)
        except ValueError as error:
            raise UserError(f"rows: {part.strip()!r} is not understood: {error}") from error
        rows.append(check_row(words, part.strip()))
    return rows


def check_row(words: Sequence[str], told: str) -> list[str]:
    """Raise UserError when a row is not made of KEY=VALUE, or of words that sweeps do not take."""
    if not words or any("=" not in word for word in words):
        raise UserError(f"rows: {told!r} must read KEY=VALUE KEY=VALUE, rows parted by ;")
    for word in words:
        if word.startswith("hydra"):
            raise UserError(f"rows: {word} says where a sweep runs, which is the same for all its cells")
    return list(words)


def pull(words: Sequence[str], key: str) -> tuple[list[str], str | None]:
    """(the other words, the value given last for `key`); None when it is not given."""
    rest = [word for word in words if word.partition("=")[0] != key]
    given = [word.partition("=")[2] for word in words if word.partition("=")[0] == key]
    return rest, given[-1] if given else None


def check_hydra(words: Sequence[str], flags: Sequence[str]) -> None:
    """Raise UserError for what Hydra knows and a sweep has no use for."""
    for flag in flags:
        if flag.startswith("-") and flag.partition("=")[0] not in FLAGS:
            raise UserError(f"{flag} does not go with a sweep; of Hydra's flags {', '.join(FLAGS)} do")
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if key == "hydra.run.dir":
            raise UserError("hydra.run.dir is the folder of one run; the cells of a sweep lie below hydra.sweep.dir")
        if key == "hydra.sweep.subdir":
            raise UserError("hydra.sweep.subdir: the folder of a cell is named by what it computes")
        if key.startswith("hydra") and key not in PLACES:
            raise UserError(
                f"{word} does not go with a sweep{closest(key, PLACES)}; of Hydra's keys {', '.join(PLACES)}"
            )
