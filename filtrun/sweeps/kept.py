"""Sweeps kept as configs: ``conf/sweep/NAME.yaml``, chosen with ``sweep=NAME``.

A file is a mapping with these keys, all of which may be left out:

    overrides     [override, ...]: of every cell; lists of values make a product, as on the command line; also where
                  the sweep runs: workers=N, hydra/launcher=NAME, hydra.launcher.KEY=VALUE, hydra.sweep.dir=DIR
    rows          {row: [override, ...]}: values that belong together; every row goes with the whole product
    skip          a list of {when, because}: cells that do not apply, recorded as skipped with the reason; `when` are
                  conditions on the composed cell, such as "method=ftwt,task=diffuse" or "trainer.lr>0.1"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filtrun.errors import UserError, unknown
from filtrun.report.node import Node
from filtrun.report.select import Condition, check_keys, matches, parse_where


@dataclass(frozen=True)
class KeptSweep:
    """What a file says. `skip` holds (conditions, reason)."""

    name: str = ""
    overrides: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ((),)
    skip: tuple[tuple[tuple[Condition, ...], str], ...] = ()

    def check(self, cells: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError for a condition on a key that no cell has. `cells` look like records."""
        for conditions, _ in self.skip:
            check_keys(f"sweep={self.name}: skip.when", [c.key for c in conditions], cells)

    def reason(self, cell: Mapping[str, Any]) -> str:
        """Why a cell is not run; empty when it is."""
        return next((why for conditions, why in self.skip if matches(cell, conditions)), "")


def read_sweep(name: str, config_dirs: Sequence[str | Path] = ()) -> KeptSweep:
    """A kept sweep by its name. Raises UserError for one that is not there, with the closest, or for its faults."""
    from filtrun.catalogue import entries
    from filtrun.sweeps.expand import check_row

    found = {entry.name: entry for entry in entries("sweeps", config_dirs)}
    if name not in found:
        raise unknown("sweep", name, found)
    entry = found[name]
    if entry.problem:
        raise UserError(entry.problem)
    node = Node(entry.content or {}, f"sweep/{name}.yaml")
    own = Node(node.get("rows", dict, "a mapping of rows to overrides", {}), f"{node.where}: rows")
    rows = tuple(tuple(check_row(own.texts(row), str(row))) for row in own.values)
    skip = []
    for item in node.items("skip", []):
        skip.append((tuple(parse_where([item.text("when")])), item.text("because")))
        item.done()
    made = KeptSweep(name, node.texts("overrides", []), rows or ((),), tuple(skip))
    node.done()
    return made
