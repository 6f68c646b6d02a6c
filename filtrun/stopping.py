"""What ends a run from outside: at the first signal a training saves a checkpoint after its step and stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

GRACE = 8.0
"""Seconds a training has to come to the end of its step; then it is stopped where it is, without a checkpoint."""

_trainings = 0


class Stop:
    """A signal handler that raises KeyboardInterrupt once: at the end of a training step, elsewhere at once.

    A scheduler may send several signals, to several processes: the later ones do not disturb what writes the record.
    """

    def __init__(self) -> None:
        self.asked = False
        self.insists = False

    def __call__(self, *_: Any) -> None:
        if not self.asked:
            self.asked = True
            if not _trainings:
                raise KeyboardInterrupt
            timer = threading.Timer(GRACE, self._insist)
            timer.daemon = True
            timer.start()
        elif self.insists:
            self.insists = False
            if _trainings:
                raise KeyboardInterrupt

    def _insist(self) -> None:
        if _trainings and stop_asked():
            self.insists = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # also out of a wait


@contextlib.contextmanager
def stops_at(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Handle signals by `Stop` for a while, where none does so already and this is the main thread."""
    before: dict[signal.Signals, Any] = {}
    if not isinstance(signal.getsignal(signal.SIGTERM), Stop):
        stop = Stop()
        with contextlib.suppress(ValueError):  # not the main thread
            for number in signals:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """While the block runs, somebody looks at `stop_asked` after each step.

    Raises KeyboardInterrupt for a signal that came too late for the last step.
    """
    global _trainings
    _trainings += 1
    try:
        yield
    finally:
        _trainings -= 1
    if stop_asked():
        raise KeyboardInterrupt


def stop_asked() -> bool:
    """Whether a signal has asked this process to stop."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, Stop) and handler.asked
