"""Cells in one process as if each had one of its own: what it changes in torch and Python is put back."""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def alone() -> Iterator[None]:
    """Leave the global settings of torch and Python as they were found, whatever a cell does to them.

    Generators need no care: a run seeds them before it draws.
    """
    import torch

    backends = torch.backends
    settings: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_num_threads, torch.get_num_threads()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
        (lambda value: setattr(backends.cudnn, "benchmark", value), backends.cudnn.benchmark),
        (lambda value: setattr(backends.cudnn, "deterministic", value), backends.cudnn.deterministic),
    ]
    environment, path = dict(os.environ), list(sys.path)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for restore, value in settings:
            restore(value)
        sys.path[:] = path
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        _set_aside_what_stays()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@functools.cache
def _set_aside_what_stays() -> None:
    """Keep what the libraries made while they loaded out of later collections: looking through it takes 0.2 s each."""
    gc.freeze()
