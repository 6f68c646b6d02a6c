"""``make bench`` runs every benchmark."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_benchmark_is_run() -> None:
    rule = (ROOT / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    modules = {p.stem for p in (ROOT / "bench").glob("*.py") if "__main__" in p.read_text()}
    assert set(re.findall(r"-m bench\.(\w+)", rule)) == modules
