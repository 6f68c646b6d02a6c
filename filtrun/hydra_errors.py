"""Hydra's and OmegaConf's messages about a command line, turned into one clear line with the closest match."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    except (HydraException, OmegaConfBaseException) as error:
        raise _wrong_key(error, overrides) from error


def _missing(error: Any) -> UserError:
    wanted = str(error.missing_cfg_file or "")
    group, _, option = wanted.rpartition("/")
    if error.options:
        return unknown(group or "option", option, error.options)
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
