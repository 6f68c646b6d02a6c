"""Which files a user means, and what the results are called."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filtrun.data.hdr import ALL_SUFFIXES
from filtrun.errors import UserError

FORMATS = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".tif": "tiff", ".tiff": "tiff", ".webp": "webp",
    ".hdr": "hdr", ".pic": "hdr", ".exr": "exr",
}  # fmt: skip
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "tiff": ".tif", "webp": ".webp", "hdr": ".hdr", "exr": ".exr"}
LINEAR = ("hdr", "exr")


@dataclass(frozen=True)
class Job:
    """One image: `name` is its place below the folder or pattern the user gave; `target` is written as `format`."""

    source: Path
    name: Path
    target: Path
    format: str


def find(words: Sequence[str], leave_out: Iterable[Path] = ()) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Images named by files, folders (with all below) and patterns: ([(path, name)], what was not found).

    Files named one by one count whatever their suffix is; in folders and patterns only image files do, hidden ones
    aside. A file that is named twice counts once.

    Args:
        leave_out: folders inside a given one whose files do not count, such as the one results go to.
    """
    hidden = [p.resolve() for p in leave_out]
    found: dict[Path, tuple[Path, Path]] = {}
    problems = []
    for word in words:
        some = _expand(word, hidden)
        for path, name in some:
            found.setdefault(path.resolve(), (path, name))
        if not some:
            path = Path(word).expanduser()
            what = f"{word} has no images" if path.is_dir() else f"there is no file {word!r}"
            problems.append(f"no image fits {word!r}" if glob.has_magic(word) and not path.exists() else what)
    return list(found.values()), problems


def _expand(word: str, hidden: list[Path]) -> list[tuple[Path, Path]]:
    path = Path(word).expanduser()
    if path.is_dir():
        return [(p, p.relative_to(path)) for p in _below(path, hidden)]
    if path.exists() or not glob.has_magic(word):
        return [(path, Path(path.name))] if path.exists() else []
    base = path
    while glob.has_magic(str(base)):
        base = base.parent
    found = []
    for match in sorted(Path(p) for p in glob.glob(str(path), recursive=True)):
        inside = _below(match, hidden) if match.is_dir() else [match] if _is_image(match.name) else []
        found += [(p, p.relative_to(base)) for p in inside if not _in(p.resolve(), hidden)]
    return found


def _below(folder: Path, hidden: list[Path]) -> list[Path]:
    """Image files below `folder`, sorted by path."""
    own = [h for h in hidden if h != folder.resolve()]
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and not _in(Path(where, f).resolve(), own)]
        found += [Path(where, f) for f in files if _is_image(f)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in ALL_SUFFIXES


def _in(path: Path, folders: list[Path]) -> bool:
    return any(path == folder or folder in path.parents for folder in folders)


def plan(found: Sequence[tuple[Path, Path]], out: Path, format: str | None, *, display: bool) -> list[Job]:
    """Where each image goes below `out`; results that would get one name are numbered, ``a.png`` and ``a-2.png``.

    Args:
        format: png, jpeg, tiff or webp for all; None: that of the image by its suffix, PNG where it is another one.
        display: results are images for a screen, so that HDR images become PNG files.
    """
    wanted = []
    for path, name in found:
        suffix = name.suffix.lower()
        chosen = format or FORMATS.get(suffix, "png")
        chosen = "png" if display and chosen in LINEAR else chosen
        if FORMATS.get(suffix) != chosen:
            stem = name.stem if suffix in ALL_SUFFIXES else name.name
            name = name.with_name(stem + SUFFIXES[chosen])
        wanted.append((path, name, chosen))
    plain = {_folded(name) for _, name, _ in wanted}
    taken: set[str] = set()
    jobs = []
    for (path, name), (_, target, chosen) in zip(found, wanted, strict=True):
        free, count = target, 2
        while _folded(free) in taken or (count > 2 and _folded(free) in plain):
            free, count = target.with_name(f"{target.stem}-{count}{target.suffix}"), count + 1
        taken.add(_folded(free))
        jobs.append(Job(path, name, out / free, chosen))
    return jobs


def _folded(name: Path) -> str:
    return str(name).casefold()  # some file systems do not tell a.png from A.png


def check(jobs: Sequence[Job], keep: Iterable[Path], *, force: bool) -> None:
    """Refuse to write over what is there.

    Args:
        keep: more files that must never be written over, such as masks; the images themselves never are.
        force: other files may be replaced.

    Raises:
        UserError: naming the first file in the way.
    """
    never = {path.resolve() for path in (*(job.source for job in jobs), *keep)}
    for job in jobs:
        if job.target.resolve() in never:
            raise UserError(f"{job.target} is one of the images or masks given and is not written over; change --out")
        if job.target.is_dir():
            raise UserError(f"{job.target} is a folder, and an image is to be written there; choose another --out")
    there = [job.target for job in jobs if job.target.exists() or job.target.is_symlink()]
    if there and not force:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{more} exist already; choose another --out, or --force to replace them"
                        if more else f"{there[0]} exists; choose another --out, or --force to replace it")  # fmt: skip
