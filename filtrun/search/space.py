"""The space of a search: overrides whose value is ``log(a,b)``, ``range(a,b)``, ``int(a,b)`` or ``choice(a,b,...)``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from filtrun.errors import UserError, closest

KINDS = ("log", "range", "int", "choice")
CALL = re.compile(r"([A-Za-z_]\w*)\((.*)\)", re.DOTALL)


@dataclass(frozen=True)
class Dimension:
    """One searched key. `values` are the two bounds, or the choices as they are written in an override."""

    key: str
    kind: str
    values: tuple[Any, ...]

    def suggest(self, trial: Any) -> Any:
        """The value an Optuna trial takes here."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, list(self.values))
        if self.kind == "int":
            return trial.suggest_int(self.key, *self.values)
        return trial.suggest_float(self.key, *self.values, log=self.kind == "log")

    def points(self) -> list[Any]:
        """All values. Raises UserError for a continuous dimension."""
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "int":
            return list(range(self.values[0], self.values[1] + 1))
        raise UserError(f"{self.key}={self.kind}(...): --sampler grid takes choice(...) and int(...) only")

    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        return self.values[0], self.values[-1]


def parse_space(words: Sequence[str]) -> tuple[list[Dimension], list[str]]:
    """(dimensions, plain overrides) of the words of a command. Raises UserError naming the word that is wrong."""
    space: list[Dimension] = []
    plain: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word}: write KEY=VALUE or KEY=log(1e-4,1e-1), range(..), int(..), choice(..)")
        call = CALL.fullmatch(value.strip())
        if call is None:
            plain.append(word)
        elif any(d.key == key for d in space):
            raise UserError(f"{key} is searched twice")
        else:
            space.append(_dimension(key, *call.groups()))
    if not space:
        raise UserError("nothing to search: give a key a range, such as 'trainer.lr=log(1e-4,1e-1)'")
    return space, plain


def _dimension(key: str, kind: str, inside: str) -> Dimension:
    if kind not in KINDS:
        raise UserError(f"{key}={kind}(...): allowed are {', '.join(KINDS)}{closest(kind, KINDS)}")
    words = [w.strip() for w in _parts(inside)]
    if kind == "choice":
        if not all(words) or len(set(words)) < len(words):
            raise UserError(f"{key}=choice({inside}): the choices must differ, and none may be empty")
        return Dimension(key, kind, tuple(words))
    try:
        bounds: list[Any] = [int(w) if kind == "int" else float(w) for w in words]
    except ValueError:
        bounds = []
    if len(bounds) != 2 or not all(math.isfinite(b) for b in bounds):
        raise UserError(f"{key}={kind}({inside}): two {'whole ' if kind == 'int' else ''}numbers are needed")
    if bounds[0] >= bounds[1] or (kind == "log" and bounds[0] <= 0):
        above = " above 0" if kind == "log" else ""
        raise UserError(
            f"{key}={kind}({inside}): the first number must be less than the second{above and ', both'}{above}"
        )
    return Dimension(key, kind, tuple(bounds))


def _parts(text: str) -> list[str]:
    """What stands between commas, but for those inside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        depth += (sign in "[({") - (sign in "])}") if not quote else 0
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def written(key: str, kind: str, values: Sequence[Any]) -> str:
    """A dimension as it is given on the command line: ``trainer.lr=log(0.0001,0.1)``."""
    return f"{key}={kind}({','.join(map(str, values))})"


def overrides(params: dict[str, Any]) -> list[str]:
    """The words that set these values."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


def grid(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Every point, the last dimension fastest. Raises UserError for a continuous dimension."""
    keys = [d.key for d in space]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*(d.points() for d in space))]
