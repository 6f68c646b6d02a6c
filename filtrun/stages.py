"""Work done once and shared: a folder per piece of work, named by what went into it.

Pre-training a base, training a judge, feature statistics: each is a stage. Its folder appears by one rename when it is
whole, a file lock keeps two processes from doing the same work, and every file is checked by hash when it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.pack import umask

MANIFEST = "stage.json"
FORMAT = 2
"""Raised when the files of a stage are written in another way: older stages are then made anew, not misread."""


def digest(parts: Any, length: int = 16) -> str:
    """Hex digest of a JSON-like value, the same on every machine and for every order of keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a stage folder has its manifest and every file has the size and hash written there."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(file_sha256(folder / name) == sha for name, sha in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class Stages:
    """The stage cache under one root folder."""

    def __init__(self, root: Path, log: Callable[[str], None] = lambda line: None) -> None:
        self.root = Path(root).expanduser().absolute()
        self.log = log
        self.used: list[dict[str, Any]] = []

    def folder(self, name: str, parts: Mapping[str, Any]) -> Path:
        """Where the stage `name` made from `parts` lies, whether or not it is there yet."""
        return self.root / f"{name}-{digest({'format': FORMAT, 'parts': parts})}"

    def cached(self, name: str, parts: Mapping[str, Any]) -> bool:
        """Whether the stage is there; its files are not read."""
        return (self.folder(name, parts) / MANIFEST).exists()

    def get(self, name: str, parts: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
        """Return the folder of a stage, building it first if it is not there or is damaged.

        Args:
            name: short name, part of the folder's name.
            parts: everything the result depends on, JSON-like.
            build: writes the stage's files into the folder it is given.

        Raises:
            UserError: the cache folder cannot be written.
        """
        from filelock import FileLock

        folder = self.folder(name, parts)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{folder}.lock")
            lock.acquire()
        except OSError as error:
            raise UserError(f"stages.root={self.root} cannot be written: {error.strerror or error}") from error
        try:
            cached = is_whole(folder)
            if cached:
                self.log(f"stage {name}: from the cache ({folder.name})")
            else:
                self._build(folder, name, parts, build)
        finally:
            lock.release()
        self.used.append({"name": name, "key": folder.name.rpartition("-")[2], "cached": cached})
        return folder

    def _build(self, folder: Path, name: str, parts: Mapping[str, Any], build: Callable[[Path], None]) -> None:
        if folder.exists():  # kept aside, never deleted: it may be all somebody has
            aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.damaged-", dir=self.root))
            os.replace(folder, aside / folder.name)
            self.log(f"stage {name}: {folder} is damaged; moved to {aside} and made again")
        for left in self.root.glob(f".{folder.name}.*"):  # by a builder that was killed: the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        self.log(f"stage {name}: working")
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=self.root))
        try:
            build(work)
            files = {str(p.relative_to(work)): file_sha256(p) for p in sorted(work.rglob("*")) if p.is_file()}
            manifest = {"name": name, "parts": parts, "files": files}
            (work / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str))
            os.chmod(work, 0o777 & ~umask())  # a cache may be shared; temporary folders are private
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
