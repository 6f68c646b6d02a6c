"""One job at a time in a thread, beside what its caller does meanwhile: checkpoints, photographs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Aside(Generic[T]):
    """A thread of its own for jobs that mostly wait for the disk or compute outside Python (encoders, zlib, numpy).

    The thread is made with the first job. Whoever starts jobs calls `close` in the end.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._pool: ThreadPoolExecutor | None = None
        self._job: Future[T] | None = None

    def start(self, function: Callable[..., T], *arguments: Any) -> None:
        """Begin ``function(*arguments)`` once the job before is through; raises what went wrong with that one."""
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._job = self._pool.submit(function, *arguments)

    def wait(self) -> T | None:
        """What the last job returned, when it is through, or raises what went wrong with it; told once, then None."""
        job, self._job = self._job, None
        return None if job is None else job.result()

    def close(self) -> None:
        """Wait for the last job and end the thread; raises what went wrong with it if nobody has asked yet."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
