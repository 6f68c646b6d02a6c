"""One YAML file as Hydra reads it, with the comments that explain it; without importing Hydra."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from filtrun.errors import UserError

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """YAML as Hydra reads it: ``1e-3`` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*\.[\d_]*(?:e[-+]?\d+)?|\d[\d_]*e[-+]?\d+|\.\d+(?:e[-+]?\d+)?|\.inf)$|\.nan$", re.I),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file. Raises UserError naming the file and the line when it cannot be read."""
    return parse_yaml(read_text(path), path)


def parse_yaml(text: str, path: Path) -> Any:
    """Like `read_yaml`, for text that has been read from `path`."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: {getattr(error, 'problem', None) or error}") from error


def read_text(path: Path) -> str:
    """A file's text. Raises UserError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def comments(text: str) -> tuple[str, dict[str, str]]:
    """The comment at the top, without the line for Hydra, and the comments at the end of option lines."""
    header = []
    for line in text.splitlines():
        if line.startswith("#"):
            if not re.match(r"# *@package", line):
                header.append(line.lstrip("#").strip())
        elif line.strip() and header:
            break
        elif line.strip():
            break
    notes = re.findall(r"^[ \t]*([\w.]+):[^#\n]*[ \t]#[ \t]*(.+)$", text, re.M)
    return "\n".join(header).strip(), dict(notes)
