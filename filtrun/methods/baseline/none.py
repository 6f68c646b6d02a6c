"""No method: the base as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from filtrun.method import Method


@dataclass
class NoMethod(Method):
    """Train nothing and evaluate the base as it is: the lower reference of every comparison."""

    trains: ClassVar = "nothing"
    paper: ClassVar[str] = "the unchanged base (baseline)"
