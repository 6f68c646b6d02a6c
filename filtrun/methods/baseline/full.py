"""Full training: every parameter is trained. From a pre-trained base this is full fine-tuning, the usual ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from filtrun.method import Method


@dataclass
class Full(Method):
    """Train all parameters with the trainer's optimizer; the reference every PEFT paper compares with."""

    trains: ClassVar = "all"
    slug: ClassVar[str] = "full"
    paper: ClassVar[str] = "full fine-tuning (baseline)"
