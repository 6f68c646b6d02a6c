"""Many configurations that choose the same options of groups: composed once, each with its own values on a copy.

Reading and merging the YAML files is nearly all that composing costs, and the rows of a table mostly choose the same.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.catalogue import conf_dir

KEPT = 32
"""Compositions kept in memory, of a few hundred kilobytes each."""


def composed_on_base(
    overrides: Sequence[str], config_dirs: Sequence[str | Path], stamp: str
) -> tuple[Any, dict[str, str]]:
    """The configuration `filtrun.api.composed_by_hydra` gives without its ``hydra`` node, and the choices of groups.

    Args:
        stamp: changes whenever a config file does.

    Raises:
        UserError: an override names what does not exist.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from filtrun.api import composed_by_hydra, with_default_model, without_hydra
    from filtrun.hydra_errors import translated

    folders = tuple(str(Path(folder).expanduser().absolute()) for folder in config_dirs)
    words = with_default_model(overrides)
    choices = [word for word in words if _chooses(word, folders)]
    values = [word for word in words if word not in choices]
    with translated(words):
        parsed = OverridesParser.create().parse_overrides(values)
    if any(override.is_sweep_override() for override in parsed):
        return without_hydra(composed_by_hydra(overrides, config_dirs))  # which says what is wrong with it
    base, chosen = _base(tuple(choices), folders, stamp)
    made = copy.deepcopy(base)
    with translated(words):
        ConfigLoaderImpl._apply_overrides_to_config(parsed, made)
    return made, chosen


@functools.lru_cache(maxsize=KEPT)
def _base(choices: tuple[str, ...], folders: tuple[str, ...], stamp: str) -> tuple[Any, dict[str, str]]:
    from filtrun.api import composed_by_hydra, without_hydra

    return without_hydra(composed_by_hydra(choices, folders))


def _chooses(word: str, folders: Sequence[str]) -> bool:
    """Whether an override takes part in choosing files; what is not plainly the value of a key counts as such."""
    key, sign, _ = word.partition("=")
    name = key.lstrip("+")
    if not sign or name == "model.base" or not name.replace(".", "").replace("_", "").isalnum():
        return True
    return name.startswith("hydra") or any(Path(folder, name).is_dir() for folder in (str(conf_dir()), *folders))
