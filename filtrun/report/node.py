"""Reading a paper card: mappings that know which file and key they are, so that what is wrong is told in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from filtrun.errors import UserError, closest

DIRECTIONS = ("lower", "higher")


@dataclass
class Node:
    """A mapping of a card that remembers which keys were read and where it is."""

    values: Any
    where: str
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise UserError(f"{self.where} must be a mapping of keys, not {self.values!r}")

    def error(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.where}: {key} {problem}")

    def get(self, key: str, kind: type | tuple[type, ...], wanted: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(key, f"must be {wanted}, not {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self.get(key, str, "text", default)

    def number(self, key: str) -> int:
        return self.get(key, int, "a whole number")

    def texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        found = self.get(key, list, "a list of texts", default)
        if not all(isinstance(item, str) for item in found):
            raise self.error(key, f"must be a list of texts, not {found!r}")
        return tuple(found)

    def items(self, key: str, default: list[Any] | None = None) -> list[Node]:
        found = self.get(key, list, "a list", default)
        return [Node(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(found)]

    def nodes(self, key: str) -> dict[str, Node]:
        found = self.get(key, dict, "a mapping")
        return {str(name): Node(item, f"{self.where}: {key}.{name}") for name, item in found.items()}

    def seeds(self, key: str) -> tuple[int, ...]:
        found = self.get(key, list, "a list of whole numbers")
        if not found or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in found):
            raise self.error(key, f"must be a list of whole numbers, not {found!r}")
        return tuple(found)

    def name_of(self, key: str, what: str, known: Iterable[str], default: str | None = None) -> str:
        name = self.text(key, default)
        if name not in known:
            raise self.error(key, f"names no {what} {name!r}{closest(name, known)}")
        return name

    def directions(self, key: str) -> dict[str, str]:
        found = self.get(key, dict, "a mapping of metrics to lower or higher")
        for name, better in found.items():
            if better not in DIRECTIONS:
                raise self.error(f"{key}.{name}", f"must be lower or higher, not {better!r}")
        return dict(found)

    def done(self) -> None:
        """Raise UserError when there is a key that nothing reads."""
        for key in self.values:
            if key not in self.read:
                raise self.error(str(key), f"is no key of a card{closest(key, self.read)}")
