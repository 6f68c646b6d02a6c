"""Sets published as files: found under a root, in the cache, or downloaded into the cache by torchvision."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from filtrun.data.base import Data, folder_of
from filtrun.data.formats import Found, Layout, locate, read
from filtrun.data.split import Split
from filtrun.errors import UserError

_TIMEOUT = 5.0  # seconds without an answer


def cache_dir() -> Path:
    """Where downloads go: ``$FILTRUN_DATA``, else ``~/.cache/filtrun/data``."""
    return Path(os.environ.get("FILTRUN_DATA") or "~/.cache/filtrun/data").expanduser().absolute()


@dataclass
class FileSet(Data):
    """A set with a `layout`; `torchvision` names the class of torchvision.datasets that downloads it."""

    layout: ClassVar[Layout]
    torchvision: ClassVar[str]

    def _load(self) -> dict[str, Split]:
        if self.root is not None:
            root = folder_of(self.root)
            found = locate(root, self.layout)
            if found is None:
                raise UserError(f"data.root={self.root} has no {self.layout.title}; put {self.layout.wanted()} there")
            return read(found, self.layout)
        found = self._cached() or self._download()
        return read(found, self.layout)

    @classmethod
    def available(cls, root: str | None = None) -> tuple[bool, str]:
        if root is not None:
            try:
                found = locate(folder_of(root), cls.layout)
            except UserError as error:
                return False, str(error)
        else:
            found = cls._cached()
        if found is not None:
            return True, f"{found.path} ({found.kind})"
        return False, f"downloads on first use, or put {cls.layout.wanted()} under DIR and pass data.root=DIR"

    @classmethod
    def _cached(cls) -> Found | None:
        folder = cache_dir()
        return locate(folder, cls.layout, official=True) if folder.is_dir() else None

    def _download(self) -> Found:
        """Fetch with torchvision into a folder aside, then move into the cache, so that no half set is ever there."""
        cache = cache_dir()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as aside, _impatient():
                from filtrun.compat import torchvision

                datasets = torchvision().datasets
                print(f"{self.name}: downloading {self.layout.title} into {cache}", file=sys.stderr)
                with contextlib.redirect_stdout(sys.stderr):
                    getattr(datasets, self.torchvision)(root=aside, train=True, download=True)
                for path in Path(aside).iterdir():
                    if path.is_dir() and not (cache / path.name).exists():
                        with contextlib.suppress(FileExistsError, shutil.Error):  # another process was faster
                            os.rename(path, cache / path.name)
        except (OSError, RuntimeError, ImportError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
            raise UserError(
                f"data={self.name}: {self.layout.title} is not here and could not be downloaded ({_reason(error)}); "
                f"put {self.layout.wanted()} under DIR and pass data.root=DIR"
            ) from error
        found = self._cached()
        if found is None:
            raise UserError(f"data={self.name}: the download did not leave {self.layout.title} in {cache}")
        return found


def _reason(error: BaseException) -> str:
    """The cause in a few words: the last line that says something."""
    lines = [line.strip() for line in str(getattr(error, "reason", None) or error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:120]


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Give up on a silent server after some seconds; the download code has no setting for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
