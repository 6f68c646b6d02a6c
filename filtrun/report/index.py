"""All records below a folder, quickly: an index file beside them saves reading those that have not changed.

The records stay the truth. A walk over the folder finds every ``record.json``; what the index holds of one counts only
while the file has the time, size and inode it had, and the whole index only while its checksum is right and the code
that wrote it is this one. Anything else is read again, and the index replaced in one piece where the folder can be
written; where it cannot, everything works without.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filtrun.cells import cell_digest
from filtrun.record import FILE

INDEX = ".records.index"
LEAST = 100
"""In folders with fewer records no index is written: reading them takes no time."""

_SHARED = ("environment", "evaluation", "stages")
"""What many records hold alike and is kept once, as the parts of their configurations are."""
_TYPES: dict[str, type] = {
    "config": dict, "metrics": dict, "cost": dict, "report": dict, "evaluation": dict, "environment": dict,
    "methods": list, "overrides": list, "stages": list, "artifacts": list,
    "status": str, "name": str, "task": str, "data": str, "model": str,
}  # fmt: skip


@dataclass
class Found:
    """The records below a folder, and the files named like one that are none."""

    records: list[dict[str, Any]] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)


def read_records(folder: Path | str, *, finished: bool = False) -> list[dict[str, Any]]:
    """The records below a folder, in the order of their paths; with `finished` only those of finished runs.

    Each is what its ``record.json`` holds with two more keys: ``folder``, where it lies, and ``cell``, the digest of
    what it computed (`filtrun.cells.cell_digest`). Records share the parts they have in common: do not change them.
    What cannot be read is left out; a folder that is not there has none.
    """
    found = find(folder).records
    return [r for r in found if r.get("status") == "finished"] if finished else found


def find(folder: Path | str) -> Found:
    """All records below a folder, with the broken ones; see `read_records`. Run folders are not looked into."""
    root = os.fspath(folder)
    with _no_collection():
        there = _walk(root)
        index = _read(root)
        known, parts = index if index else ({}, _Parts())
        entries = {}
        for place, state in there.items():
            entry = known.get(place)
            entries[place] = entry if entry and entry.state == state else _entry(root, place, state, parts)
        changed = any(known.get(place) is not entry for place, entry in entries.items()) or len(known) > len(entries)
        if changed and (len(entries) >= LEAST or index):
            _write(root, entries, parts)
        found = Found()
        for place in sorted(entries, key=lambda p: p.split(os.sep)):
            record = entries[place].record(os.path.join(root, place) if place else root, parts)
            if record is None:
                found.broken.append(Path(root, place, FILE))
            else:
                found.records.append(record)
    return found


class _Parts:
    """JSON texts that several records share, each parsed once and only when it is asked for."""

    def __init__(self, texts: list[str] | None = None) -> None:
        self.texts = texts or []
        self._numbers = {text: number for number, text in enumerate(self.texts)}
        self._values: dict[int, Any] = {}

    def add(self, value: Any) -> int:
        text = json.dumps(value, separators=(",", ":"))
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number

    def value(self, number: int) -> Any:
        if number not in self._values:
            self._values[number] = json.loads(self.texts[number])
        return self._values[number]


@dataclass
class _Entry:
    """A record in pieces: `own` is what only it has, `config` and `top` say which parts stand where."""

    state: list[int]
    cell: str
    config: dict[str, int]
    top: dict[str, int]
    own: dict[str, Any] | None

    def record(self, folder: str, parts: _Parts) -> dict[str, Any] | None:
        if self.own is None:
            return None
        record = dict(self.own)
        record |= {key: parts.value(number) for key, number in self.top.items()}
        if self.config:
            record["config"] = record["config"] | {key: parts.value(number) for key, number in self.config.items()}
        record["folder"], record["cell"] = folder, self.cell
        return record


def _walk(root: str) -> dict[str, list[int]]:
    """Every run folder below `root`, relative to it, with time, size and inode of its record."""
    found: dict[str, list[int]] = {}
    waiting, seen = [""], set[str]()
    while waiting:
        place = waiting.pop()
        folders: list[str] = []
        try:
            with os.scandir(os.path.join(root, place)) as items:
                for item in items:
                    if item.name == FILE:
                        with contextlib.suppress(OSError):
                            state = item.stat()
                            found[place] = [state.st_mtime_ns, state.st_size, state.st_ino]
                    elif not item.name.startswith(".") and item.is_dir() and _new(item, seen):
                        folders.append(os.path.join(place, item.name))
        except OSError:  # not there, no permission, or gone meanwhile
            continue
        if place not in found:
            waiting += folders
    return found


def _new(item: os.DirEntry[str], seen: set[str]) -> bool:
    """Whether a folder is to be looked into; a link only once, so that none leads in circles."""
    if not item.is_symlink():
        return True
    real = os.path.realpath(item.path)
    outside = not os.path.realpath(os.path.dirname(item.path)).startswith(real + os.sep) and real not in seen
    seen.add(real)
    return outside


def _entry(root: str, place: str, state: list[int], parts: _Parts) -> _Entry:
    """A record read from its file."""
    try:
        with open(os.path.join(root, place, FILE), encoding="utf-8") as stream:
            values = json.load(stream)
        if not isinstance(values, dict) or any(not isinstance(values.get(k, t()), t) for k, t in _TYPES.items()):
            raise ValueError
        config = values.get("config", {})
        cell = cell_digest(config)
        top = {key: parts.add(values[key]) for key in _SHARED if values.get(key)}
        inner = {key: parts.add(value) for key, value in config.items() if isinstance(value, dict) and value}
    except (OSError, ValueError, RecursionError):
        return _Entry(state, "", {}, {}, None)
    own = values | dict.fromkeys(top)
    if inner:
        own["config"] = config | dict.fromkeys(inner)
    return _Entry(state, cell, inner, top, own)


def _read(root: str) -> tuple[dict[str, _Entry], _Parts] | None:
    """What the index of a folder holds; None when it is missing, broken, or written by other code."""
    try:
        with open(os.path.join(root, INDEX), "rb") as stream:
            head, text = json.loads(stream.readline()), stream.read()
        if head["code"] != _code() or head["checksum"] != zlib.crc32(text):
            return None
        lines = text.decode("ascii").split("\n")
        rows = map(json.loads, lines[head["parts"] : head["parts"] + head["records"]])
        return {place: _Entry(*rest) for place, *rest in rows}, _Parts(lines[: head["parts"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(root: str, entries: dict[str, _Entry], parts: _Parts) -> None:
    """Replace the index of a folder, if it can be written."""
    used = sorted({n for e in entries.values() for n in (*e.config.values(), *e.top.values())})
    number = {old: new for new, old in enumerate(used)}
    lines = [parts.texts[old] for old in used]
    for place, e in entries.items():
        config, top = ({key: number[old] for key, old in each.items()} for each in (e.config, e.top))
        lines.append(json.dumps([place, e.state, e.cell, config, top, e.own], separators=(",", ":")))
    text = "\n".join(lines).encode("ascii")
    head = {"code": _code(), "parts": len(used), "records": len(entries), "checksum": zlib.crc32(text)}
    path = os.path.join(root, INDEX)
    work = f"{path}.{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with open(work, "xb") as stream:
            stream.write(json.dumps(head).encode() + b"\n" + text)
        os.replace(work, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(work)


def _code() -> int:
    """Changes with the code that decides what an index holds."""
    here = Path(__file__).parent
    files = (Path(__file__), here.parent / "cells.py", here.parent / "stages.py")
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the cyclic collector, which would search thousands of new dicts for garbage again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
