"""Signs of life: who shows them, who looks for them, and the boards of sweeps that nobody is at any more."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filtrun.sweeps.board import LIST, PARENT, Board
from filtrun.sweeps.claims import HEARTBEAT, STALE, Holder, host, started

LOOK = 1.0
"""Seconds between two looks of a worker at whether it is to end."""

LOST = 2 * STALE
"""Seconds of silence after which a worker takes a parent on another machine for dead."""

FORGOTTEN, FORGOTTEN_DETACHED = 24 * 3600.0, 7 * 24 * 3600.0
"""Seconds of silence after which a board is removed that another machine's process made; jobs may wait in a queue."""


@contextlib.contextmanager
def beating(path: Path) -> Iterator[None]:
    """Touch a file from time to time while the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            touch(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def touch(path: Path) -> None:
    """Show that we live; a file that is gone stays so."""
    with contextlib.suppress(OSError):
        os.utime(path)


def mtime(path: Path) -> float | None:
    """When a file was last touched, asked of its file system and not of what this machine remembers."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


class Life:
    """What a worker does beside its cells: it shows that it lives, and finds out when it is to end.

    Args:
        board: of the sweep.
        name: the worker's.
        stop: called, from a thread, when the worker is to end at once.
    """

    def __init__(self, board: Board, name: str, stop: Callable[[], None]) -> None:
        self.board, self.stop = board, stop
        self.sign = board.folder / "alive" / name
        told = board.parent()
        self.parent: Holder | None = told[0] if told is not None else None
        self.detached = told is not None and told[1]
        self.orphan = False
        """The parent is silent: end after the cell at hand."""

    def start(self) -> None:
        """Begin, until this process ends."""
        threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        beaten = time.monotonic()
        while True:
            time.sleep(LOOK)
            if self.board.stopped():
                break
            if time.monotonic() - beaten < HEARTBEAT:
                continue
            beaten = time.monotonic()
            touch(self.sign)
            if self.parent is not None and not self.detached:
                if here(self.parent) and gone(self.parent):
                    break
                self.orphan = not here(self.parent) and self._silent()
        self.stop()

    def _silent(self) -> bool:
        ours, its = mtime(self.sign), mtime(self.board.folder / PARENT)
        return ours is not None and its is not None and ours - its > LOST


def here(who: Holder) -> bool:
    """Whether a process is one of this machine's."""
    return who.host == host()


def gone(who: Holder) -> bool:
    """Whether a process of this machine has ended."""
    return started(who.pid) != who.started


def remove_abandoned(folder: Path) -> None:
    """Remove the boards in `folder` that nobody is at; a live sweep's is never touched."""
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder) as fresh:
        now = os.fstat(fresh.fileno()).st_mtime  # by the clock that all the other times are of
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False) and abandoned(Path(entry.path), now):
                shutil.rmtree(entry.path, ignore_errors=True)


def abandoned(folder: Path, now: float) -> bool:
    """Whether a board's parent is dead, and so are its workers.

    A process of this machine is looked up. Of others there are only signs: a worker is dead after a minute without
    any, a parent after a day; workers that go on alone may wait in a queue, and their board for a week.
    """
    board = Board(folder)
    told = board.parent()
    if told is not None and here(told[0]) and not gone(told[0]):
        return False
    signs = [mtime(folder), mtime(folder / LIST), mtime(folder / PARENT)]
    for path in [*folder.glob("alive/*"), *folder.glob("ended/*")]:
        sign = mtime(path)
        signs.append(sign)
        worker = board.who(path.name) if path.parent.name == "alive" else None
        if worker is not None and here(worker) and not gone(worker):
            return False
        if worker is not None and not here(worker) and sign is not None and now - sign < STALE:
            return False
    silence = now - max((sign for sign in signs if sign is not None), default=now - FORGOTTEN_DETACHED - 1)
    if told is None:
        return silence > FORGOTTEN
    parent, detached = told
    if detached:
        return silence > FORGOTTEN_DETACHED
    return here(parent) or silence > FORGOTTEN
