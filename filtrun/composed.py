"""Composed configurations, kept beside the cells they make: composing takes 0.1 s, a table of all papers hundreds."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filtrun.stages import digest

FOLDER = ".composed"


def kept(sweep_dir: Path, words: Sequence[str], config_dirs: Sequence[str | Path], make: Callable[[], Any]) -> Any:
    """What `make` gives for an override list, from an earlier call when no config file has changed since.

    Args:
        sweep_dir: results are kept below it, if it is there.
        words: the overrides.
        config_dirs: the user's own folders of configs.
        make: composes; gives JSON values.
    """
    folders = tuple(str(Path(folder).expanduser().absolute()) for folder in config_dirs)
    path = sweep_dir / FOLDER / f"{digest([list(words), folders])}.json"
    now = stamp(folders)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["stamp"] == now:
            return found["value"]
    value = make()
    text = json.dumps({"stamp": now, "value": value}, default=str)
    if sweep_dir.is_dir() and json.loads(text)["value"] == value:  # keys that are no text would come back otherwise
        work = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            work.write_text(text, encoding="utf-8")
            os.replace(work, path)
    return value


def stamp(config_dirs: Sequence[str | Path]) -> str:
    """Changes whenever a config file does, filtrun's own or one of the user's folders."""
    return digest([_stamp(), *(_state(str(Path(folder).expanduser().absolute())) for folder in config_dirs)])


@functools.cache
def _stamp() -> str:
    """Changes whenever a config file of filtrun's own does, or the code that composes."""
    from filtrun import __version__
    from filtrun.catalogue import conf_dir

    return digest([__version__, _state(str(conf_dir()))])


def _state(folder: str) -> list[Any]:
    """The files of a folder of configs with time and size; paper cards take no part in composing."""
    found: list[Any] = []
    for parent, names, files in os.walk(folder):
        names[:] = sorted(n for n in names if n != "paper")
        for file in sorted(files):
            state = os.stat(os.path.join(parent, file))
            found.append([parent, file, state.st_mtime_ns, state.st_size])
    return found
