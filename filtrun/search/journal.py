"""The file a study is kept in: Optuna's journal, with a lock that is free again as soon as whoever held it is dead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from filelock import FileLock

NAME = "journal.log"


class JournalLock:
    """Excludes other processes from writing, by a lock of the operating system.

    Optuna's own is a link, which one that was killed leaves behind and the others wait for. A line that is not whole,
    as after a loss of power, would make the journal unreadable once another follows it: it is cut off.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.lock = FileLock(journal.with_name(f".{journal.name}.lock"))

    def acquire(self) -> bool:
        """Wait for the lock, and leave the journal with whole lines."""
        self.lock.acquire()
        with self.journal.open("r+b") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(end - 1)
                if stream.read(1) != b"\n":
                    stream.seek(0)
                    stream.truncate(stream.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give the lock back."""
        self.lock.release()


def storage(optuna: Any, folder: Path) -> Any:
    """The study's storage in `folder`, shared by all processes."""
    path = folder.absolute() / NAME
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=JournalLock(path))
    return optuna.storages.JournalStorage(backend)
