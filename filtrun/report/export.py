"""Tables as text or files: each format for people or programs, and files written in one piece."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import RunFailure, UserError
from filtrun.report.formats import FORMATS as LAYOUTS
from filtrun.report.select import told
from filtrun.report.sheet import Sheet

SUFFIXES = {
    ".md": "md", ".tex": "latex", ".html": "html", ".json": "json", ".csv": "csv", ".parquet": "parquet",
    ".txt": "rich",
}  # fmt: skip
"""The format that a file's name stands for."""


def rendered(sheets: Sequence[Sheet], form: str) -> bytes:
    """Sheets in a format of `SUFFIXES`. Raises UserError when the format cannot hold them or an extra is missing."""
    if form == "json":
        return (json.dumps([s.data for s in sheets], indent=1, default=str) + "\n").encode()
    if form == "rich":
        from rich.console import Console

        from filtrun.report.terminal import show

        console = Console(file=io.StringIO(), width=160)
        show(console, list(sheets))
        return console.file.getvalue().encode()  # type: ignore[attr-defined]
    if form in LAYOUTS:
        return LAYOUTS[form](sheets).encode()
    rows = [row for sheet in sheets for row in flat_rows(sheet)]
    return _csv(rows).encode() if form == "csv" else _parquet(rows)


def flat_rows(sheet: Sheet) -> list[dict[str, Any]]:
    """A sheet's values, a mapping for each line of a file. Of a paper's table: a line for each cell that was run."""
    rows = sheet.data.get("rows")
    if isinstance(rows, list):
        return rows
    if not isinstance(rows, Mapping):
        raise UserError("the gallery has no form as csv or parquet; --format json has all of it")
    about = {key: sheet.data[key] for key in ("paper", "table", "scale")}
    found = []
    for row, values in rows.items():
        metrics = {metric: each["values"] for metric, each in values["metrics"].items()}
        for seed in sorted({seed for each in metrics.values() for seed in each}):
            line = {metric: each.get(seed) for metric, each in metrics.items()}
            tuning = {"tuning": values["tuning"]["text"], "tuning trials": values["tuning"]["trials"]}
            found.append(about | {"row": row, "seed": seed} | line | tuning)
    return found


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """RFC 4180 with a heading; numbers in full, nothing for what is not there."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _names(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: told(v) if isinstance(v, bool) else v for k, v in row.items()} for row in rows)
    return stream.getvalue()


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'filtrun[parquet]'") from error
    columns = {}
    for name in _names(rows):
        values = [row.get(name) for row in rows]
        kinds = {type(v) for v in values if v is not None}
        if kinds == {int, float}:
            values = [None if v is None else float(v) for v in values]
        elif len(kinds) > 1:
            values = [None if v is None else told(v) for v in values]
        columns[name] = values
    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue().to_pybytes()


def write(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file in one piece. Raises UserError when it is there already, RunFailure when it cannot be written."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another --out, or --overwrite to replace it")
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_bytes(content)
        os.replace(work, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)
        raise RunFailure(f"{path} could not be written: {error.strerror or error}") from error
