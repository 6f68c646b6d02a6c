"""Which launcher starts a sweep's workers, and its options: ``hydra/launcher=NAME hydra.launcher.KEY=VALUE``."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from filtrun.catalogue import conf_dir
from filtrun.config_file import read_text
from filtrun.errors import UserError, closest, unknown
from filtrun.options import check_options
from filtrun.sweeps.launcher import Launcher
from filtrun.sweeps.launcher_options import LocalOptions, RayOptions, SlurmOptions

GROUP = "hydra/launcher"
KEY = "hydra.launcher."
OPTIONS: dict[str, type] = {"submitit_local": LocalOptions, "submitit_slurm": SlurmOptions, "ray": RayOptions}
"""Launcher -> its options. A file ``hydra/launcher/NAME.yaml`` is a launcher with options of its own: ``engine`` says
which of these it is."""

HERE = "basic"
"""Hydra's name for no launcher: processes on this machine."""


def launcher_of(
    overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()
) -> tuple[list[str], str | None, dict[str, Any]]:
    """Pull the launcher out of the words of a command: (the other words, launcher, its options).

    Args:
        overrides: ``KEY=VALUE`` words.
        config_dirs: folders where ``hydra/launcher/NAME.yaml`` may lie beside filtrun's own.

    Returns:
        The launcher is one of `OPTIONS`, or None for processes on this machine; options are all of its own, checked.

    Raises:
        UserError: there is no such launcher or option, or an option has the wrong kind of value.
    """
    rest: list[str] = []
    name, given = HERE, dict[str, str]()
    for word in overrides:
        key, sign, value = word.lstrip("+").partition("=")
        if key == GROUP and sign:
            name = value
        elif key.startswith(KEY) and sign:
            given[key.removeprefix(KEY)] = value
        elif key.lstrip("~").startswith((KEY, GROUP)):
            raise UserError(f"{word} is not understood; write {GROUP}=NAME and {KEY}OPTION=VALUE")
        else:
            rest.append(word)
    if name == HERE:
        if given:
            option = next(iter(given))
            raise UserError(f"{KEY}{option} goes with {GROUP}=NAME, one of {', '.join(OPTIONS)}")
        return rest, None, {}
    engine, options = _from_file(name, config_dirs)
    return rest, engine, _checked(engine, {**options, **given})


def make_launcher(name: str | None, options: Mapping[str, Any]) -> Launcher | None:
    """A launcher by its name in `OPTIONS`; None for None. Raises UserError as `launcher_of` does.

    Args:
        options: those that differ from the launcher's defaults, or all.
    """
    if name is None:
        return None
    if name not in OPTIONS:
        raise unknown("launcher", name, OPTIONS)
    values = OPTIONS[name](**_checked(name, options))
    if name == "ray":
        from filtrun.sweeps.on_ray import Ray

        return Ray(values)
    if name == "submitit_slurm":
        from filtrun.sweeps.on_slurm import Slurm

        return Slurm(values)
    from filtrun.sweeps.on_submitit import Local

    return Local(values)


def _from_file(name: str, config_dirs: Sequence[str | Path]) -> tuple[str, dict[str, Any]]:
    """(which of `OPTIONS`, its options as text) of a launcher's file."""
    folders = [Path(folder).expanduser() / GROUP for folder in config_dirs] + [conf_dir() / GROUP]
    names = {path.stem for folder in folders for path in folder.glob("*.yaml")}
    path = next((folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()), None)
    if path is None or not re.fullmatch(r"[\w.-]+", name):
        raise unknown(GROUP, name, {*names, HERE})
    try:
        values = yaml.load(read_text(path), yaml.BaseLoader)  # text: 4:00:00 would be a number
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or values.get("engine") not in OPTIONS:
        raise UserError(f"{path}: `engine:` must be one of {', '.join(OPTIONS)}")
    return values.pop("engine"), values


def _checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a launcher, their types made right."""
    from filtrun.build import typed

    kind = OPTIONS[name]
    hints = typing.get_type_hints(kind)
    for key in given:
        if key not in hints:
            raise UserError(f"{KEY}{key}: {name} has no such option{closest(key, hints)}\nallowed: {', '.join(hints)}")
    node = {key: _value(key, value, hints[key]) for key, value in given.items()}
    values = typed(kind, node, KEY.rstrip("."))
    check_options(kind(**values), KEY.rstrip("."))
    return {field.name: values[field.name] for field in dataclasses.fields(kind)}


def _value(key: str, value: Any, hint: Any) -> Any:
    """What a word on the command line means for an option of this type."""
    if not isinstance(value, str) and not isinstance(value, dict):
        return value
    if typing.get_origin(hint) in (list, dict):
        try:
            value = yaml.load(value.strip(), yaml.BaseLoader) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise UserError(f"{KEY}{key}={value} is not understood; write [A,B] or {{KEY: VALUE}}") from error
        if isinstance(value, dict):
            return {name: {"true": True, "false": False}.get(str(item), item) for name, item in value.items()}
        return value
    text = str(value).strip()
    if text in ("null", ""):
        return None
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
