"""Split work over the pixels of an image among threads, so that every thread runs whole chains of small operations.

torch runs each operation on all cores and waits for the slowest, operation after operation. For chains of many short
ones that costs more than it gains, and on a machine that is busy with other processes it is many times slower than one
core. Here a thread does all steps on its own pieces, and nothing waits before the end.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_own = threading.local()


def for_pieces(work: Callable[[int, int], None], count: int, step: int, parallel: bool = True) -> None:
    """Call ``work(start, end)`` for pieces of `step` that cover 0 .. `count`, on ``torch.get_num_threads()`` threads.

    `work` runs without autograd; it must write its results itself. Its errors are raised here. Called from within
    `work`, this runs in the same thread.

    Args:
        parallel: False runs the pieces one after the other in this thread (tensors on a GPU).
    """
    pieces = [(start, min(start + step, count)) for start in range(0, count, step)]
    threads = torch.get_num_threads()
    if not parallel or threads == 1 or len(pieces) < 2 or getattr(_own, "busy", False):
        with torch.no_grad():
            for start, end in pieces:
                work(start, end)
        return
    inference = torch.is_inference_mode_enabled()

    def one(piece: tuple[int, int]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are settings of the thread
            work(*piece)

    list(_pool(os.getpid(), threads).map(one, pieces))


@functools.lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each; a forked process gets its own."""
    before = torch.get_num_threads()
    started = threading.Barrier(threads + 1)

    def start() -> None:
        _own.busy = True
        torch.get_num_threads()  # makes torch set this thread up, which would undo the next line later
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="filtrun-lut", initializer=start)
    for _ in range(threads):  # a thread starts with its first piece of work, and none is idle before all have started
        pool.submit(int)
    started.wait()
    torch.set_num_threads(before)  # the setting is each thread's own, but new threads take the last one set
    return pool
