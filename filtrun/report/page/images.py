"""Sample grids of runs, scaled down and encoded anew within a budget of bytes that they share."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = {"samples_before.png": "before", "samples.png": "after"}
WIDTHS = (480, 360, 260, 180)
"""Pixels; the largest that fits its share of the budget is taken."""
QUALITIES = (78, 50, 25)
LEAST = 1200
"""Bytes below which a picture shows nothing; when no more than that is left, pictures are left out."""
PIXELS = 40_000_000
"""Larger pictures are left out: nothing a run draws is so large, and decoding one takes all memory."""


class Images:
    """Pictures of a page: `encoded` as data URIs, each once, however many runs show it."""

    def __init__(self, budget: int) -> None:
        self.encoded: list[str] = []
        self.left_out = 0
        self._left = budget

    def add(self, runs: Sequence[tuple[Path, Iterable[Mapping[str, Any]]]]) -> list[dict[str, int]]:
        """For each (run folder, its artifacts): {"before" or "after": the place of its picture in `encoded`}.

        Args:
            artifacts: only those with a name of `NAMES`, or of the kind ``samples``, and inside the folder, are read.
        """
        files = [{kind: folder / name for name, kind in _named(found) if _inside(folder / name, folder)}
                 for folder, found in runs]  # fmt: skip
        marks: dict[Path, str] = {}
        for each in files:
            marks |= {path: _mark(path) for path in each.values()}
        waiting = len(set(marks.values()))
        known: dict[str, int | None] = {}
        for path, mark in marks.items():
            if mark not in known:
                known[mark] = self._encode(path, self._left // max(1, waiting))
                waiting -= 1
        shown = [{kind: known[marks[path]] for kind, path in each.items()} for each in files]
        return [{kind: place for kind, place in each.items() if place is not None} for each in shown]

    def _encode(self, path: Path, share: int) -> int | None:
        """Encode a picture in at most `share` bytes of base64 text; None, and counted, when that cannot be."""
        data = encode(path, share) if share >= LEAST else None
        if data is None:
            self.left_out += 1
            return None
        self.encoded.append("data:image/webp;base64," + base64.b64encode(data).decode())
        self._left -= len(self.encoded[-1])
        return len(self.encoded) - 1


def encode(path: Path, share: int) -> bytes | None:
    """A picture as WebP that takes at most `share` bytes as base64 text; None when it is none or does not fit."""
    room = (share - 32) * 3 // 4
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            if opened.width * opened.height > PIXELS:
                return None
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    for width in WIDTHS:
        if width != WIDTHS[-1] and width > picture.width and picture.width >= WIDTHS[-1]:
            continue  # nothing is scaled up, and the first of these is the picture as it is
        height = max(1, round(picture.height * width / picture.width))
        small = picture if width >= picture.width else picture.resize((width, height), Image.Resampling.BOX)
        for quality in QUALITIES:
            stream = io.BytesIO()
            try:
                small.save(stream, "WEBP", quality=quality, method=2)
            except (OSError, ValueError):  # higher than WebP can be
                return None
            if stream.tell() <= room:
                return stream.getvalue()
    return None


def _named(artifacts: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    known = [name for a in artifacts if isinstance(a, Mapping) and isinstance(name := a.get("path"), str)]
    return [(name, kind) for name, kind in NAMES.items() if name in known or not known]


def _inside(path: Path, folder: Path) -> bool:
    return not path.is_symlink() and path.is_file() and path.parent == folder


def _mark(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
