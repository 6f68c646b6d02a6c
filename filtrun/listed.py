"""The catalogue of papers: what each one claims, whether it has a card and configs here or is planned.

`conf/catalogue.jsonl` holds one paper a line; the cards in `conf/paper` say more of those that are implemented.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from filtrun.errors import UserError

IMPLEMENTED, PLANNED = "implemented", "planned"
STATUSES = (IMPLEMENTED, PLANNED)
"""A paper is implemented when it has a card, which every card's smoke runs in the tests justify."""


@dataclass(frozen=True)
class Listed:
    """A paper of the catalogue: `kind` says what it brings (method, loss, theory ...), `about` what it does."""

    id: str
    title: str
    family: str
    kind: str
    about: str
    claim: str
    year: int | None = None
    link: str = ""


@functools.cache
def read_listed(path: Path) -> dict[str, Listed]:
    """The papers of a catalogue file by name, none when there is no file. Raises UserError naming a broken line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found: dict[str, Listed] = {}
    for number, line in enumerate(lines, 1):
        try:
            paper = Listed(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no paper: {error}") from None
        if paper.id in found:
            raise UserError(f"{path}, line {number}: {paper.id} is there twice")
        found[paper.id] = paper
    return found
