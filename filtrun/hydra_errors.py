"""Hydra's and OmegaConf's messages about a command line, turned into one clear line with the closest match."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filtrun.errors import UserError, closest, unknown

_FULL_KEY = re.compile(r"full_key: (\S+)")
_QUOTED = re.compile(r"Could not (?:override|append|delete)[^']*'([^']+)'")


@contextmanager
def translated(overrides: Sequence[str]) -> Iterator[None]:
    """Raise UserError in place of what Hydra raises while it composes `overrides`."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MissingConfigException as error:
        raise _missing(error) from error
    except OverrideParseException as error:
        raise UserError(
            f"{error.override!r} on the command line is not understood; write key=value, for example seed=1 or "
            f"method=[sara,lora]\n{str(error).splitlines()[0]}"
        ) from error
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        wrong = [o for o in overrides if (_group_folder(o.partition("=")[0])).is_dir() and not _names_option(o)]
        key, _, value = (wrong or [overrides[-1]])[0].partition("=")
        names = [path.stem for path in _group_folder(key).glob("*.yaml")]
        raise UserError(f"{key}={value} must be a name\nallowed: {', '.join(sorted(names))}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _wrong_key(error, overrides) from error


def check_optional(overrides: Sequence[str]) -> None:
    """Raise UserError for a recipe that is not there: Hydra leaves out an optional choice without a word."""
    for override in overrides:
        group, _, given = override.partition("=")
        if group in ("recipe", "task_scale"):
            names = [path.stem for path in _group_folder(group).glob("*.yaml")]
            for name in given.strip("[]").split(","):
                if name not in (*names, "null", ""):
                    raise unknown(group, name, names)


def _group_folder(group: str) -> Path:
    from filtrun.catalogue import conf_dir

    return conf_dir() / (group.lstrip("+~") or "-")


def _names_option(override: str) -> bool:
    value = override.partition("=")[2]
    return bool(value) and value != "null" and not value.replace(".", "").lstrip("-").isdigit()


def _missing(error: Any) -> UserError:
    wanted = str(error.missing_cfg_file or "")
    group, _, option = wanted.rpartition("/")
    options = error.options or [path.stem for path in _group_folder(group).glob("*.yaml")]  # none for lists of options
    if options:
        return unknown(group or "option", option, options)
    return UserError(str(error).splitlines()[0])


def _wrong_key(error: BaseException, overrides: Sequence[str]) -> UserError:
    text = f"{error}\n{error.__cause__ or ''}"
    found = _FULL_KEY.search(text) or _QUOTED.search(text)
    if not found:
        return UserError(" ".join(str(error).split("\n")[:2]).strip())
    key = found.group(1).split("@")[0]
    given = [o for o in overrides if o.lstrip("+~").partition("=")[0] == key]
    if not given:
        given = [o for o in overrides if o.lstrip("+~").partition("=")[0].startswith(key)]
    if "is not in struct" not in text and "Could not override" not in text:
        return UserError(f"{given[0] if given else key}: {str(error.__cause__ or error).splitlines()[0]}")
    parent, siblings = _siblings(key, [o for o in overrides if o not in given])
    where = f" in {parent}" if parent else ""
    name = key.rpartition(".")[2] if parent == key.rpartition(".")[0] else key[len(parent) :].lstrip(".").split(".")[0]
    return UserError(f"unknown key {key!r}{closest(name, siblings)}\nallowed{where}: {', '.join(sorted(siblings))}")


def _siblings(key: str, others: Sequence[str]) -> tuple[str, list[str]]:
    """The deepest node on the way to `key` that exists, and its keys (with the config groups, at the top)."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from filtrun.catalogue import conf_dir

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            node: Any = compose("config", [o for o in others if not o.startswith("hydra.")])
    except Exception:  # another mistake beside this one: name the groups at least
        return "", [p.name for p in conf_dir().iterdir() if p.is_dir() and p.name not in ("paper", "recipe")]
    path: list[str] = []
    for part in key.split(".")[:-1]:
        child = node.get(part) if hasattr(node, "get") else None
        if not hasattr(child, "keys"):
            break
        node, path = child, [*path, part]
    return ".".join(path), [str(k) for k in node]
