"""Writing what was measured into a paper's card, leaving everything else in the file as it is."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from filtrun.config_file import parse_yaml, read_text
from filtrun.errors import UserError
from filtrun.report.card import Measured, make_card
from filtrun.report.grid import Grid

DIGITS = 6
"""Significant digits of the numbers in a card."""


def measured_of(grid: Grid, date: str = "", note: str = "") -> Measured:
    """The numbers of a grid as a card holds them; rows with all seeds only.

    Raises UserError when there is none.
    """
    rows: dict[str, dict[str, tuple[float, ...]]] = {}
    for row in grid.rows:
        values = {metric: grid.values(row, metric) for metric in grid.table.metrics}
        whole = {
            metric: tuple(float(f"{v[seed]:.{DIGITS}g}") for seed in grid.seeds)
            for metric, v in values.items()
            if set(v) == set(grid.seeds)
        }
        if whole:
            rows[row] = whole
    if not rows:
        raise UserError(
            f"{grid.card.slug}: no row of {grid.table.name} at {grid.scale} scale is run with all seeds; "
            f"run `filtrun table {grid.card.slug} --scale {grid.scale} --run` first"
        )
    devices = dict.fromkeys(str((r.get("environment") or {}).get("device")) for r in grid.records())
    date = date or datetime.date.today().isoformat()
    return Measured(grid.scale, date, ", ".join(devices), grid.seeds, rows, note)


def write_measured(path: Path, table: str, new: Measured) -> None:
    """Put numbers into a table of a card, in place of those of the same scale; all else in the file stays as it is.

    A note that stood beside the old numbers is kept unless the new ones have one. Raises UserError when the file cannot
    be written or is not laid out so that it can be done.
    """
    text = read_text(path)
    card = make_card(path.stem, parse_yaml(text, path))
    index = [t.name for t in card.tables].index(table)
    old = card.tables[index].measured_at(new.scale)
    if old and not new.note:
        new = dataclasses.replace(new, note=old.note)
    order = [m for m in card.tables[index].measured if m.scale != new.scale] + [new]
    blocks = sorted(order, key=lambda m: list(card.tables[index].scales).index(m.scale))
    changed = replace_block(text, index, blocks, path)
    tables = list(card.tables)
    tables[index] = dataclasses.replace(tables[index], measured=tuple(blocks))
    if make_card(path.stem, parse_yaml(changed, path)) != dataclasses.replace(card, tables=tuple(tables)):
        raise UserError(
            f"{path}: the numbers could not be written without changing something else; nothing was written"
        )
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_text(changed, encoding="utf-8")
        os.replace(work, path)
    except OSError as error:
        work.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raise UserError unless a card lies in a checkout or in a folder of the user's own, where it may be changed."""
    package = Path(__file__).absolute().parent.parent
    if path.absolute().is_relative_to(package):
        raise UserError(
            f"--write-card: {path} belongs to an installed filtrun; it works in a checkout or with --config-dir"
        )
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise UserError(f"--write-card: {path} is not writable")


def replace_block(text: str, index: int, blocks: Sequence[Measured], path: Path) -> str:
    """The text of a card with ``measured`` of its table number `index` replaced, or added at the table's end."""
    root = yaml.compose(text, yaml.SafeLoader)
    table = _value(_value(root, "tables"), index)
    if not isinstance(table, yaml.MappingNode) or table.flow_style or not table.value:
        raise UserError(f"{path}: a table in braces cannot be changed; write it as a block")
    indent = " " * table.value[0][0].start_mark.column
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    for key, value in table.value:
        if key.value == "measured":
            first, last = key.start_mark.line, _last_line(value)
            break
    else:
        first = max(_last_line(value) for _, value in table.value) + 1
        last = first - 1
    return "".join([*lines[:first], *_written(blocks, indent), *lines[last + 1 :]])


def _written(blocks: Sequence[Measured], indent: str) -> list[str]:
    """The lines of the key ``measured``."""
    lines = ["measured:  # written by `filtrun table --write-card`"]
    for block in blocks:
        lines += [f"  - scale: {block.scale}", f"    date: {json.dumps(block.date)}"]
        lines += [f"    device: {json.dumps(block.device)}", f"    seeds: {list(block.seeds)}"]
        if block.note:
            lines.append(f"    note: {json.dumps(block.note, ensure_ascii=False)}")
        lines.append("    rows:")
        for row, metrics in block.rows.items():
            lines.append(f"      {_key(row)}:" + ("" if metrics else " {}"))
            lines += [f"        {_key(metric)}: {json.dumps(list(values))}" for metric, values in metrics.items()]
    return [f"{indent}{line}\n" for line in lines]


def _key(name: str) -> str:
    """A mapping's key, quoted where YAML would not read it as text."""
    return name if isinstance(yaml.safe_load(name), str) and ": " not in name and "#" not in name else json.dumps(name)


def _value(node: Any, key: str | int) -> Any:
    if isinstance(key, int):
        return node.value[key]
    return next(value for name, value in node.value if name.value == key)


def _last_line(node: Any) -> int:
    """The number of the last line a node stands on; comments and blank lines after it are not its own."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        end = node.end_mark
        return end.line - 1 if end.column == 0 and end.line > node.start_mark.line else end.line
    children = [c for pair in node.value for c in pair] if isinstance(node, yaml.MappingNode) else node.value
    return max(_last_line(child) for child in children)
