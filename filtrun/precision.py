"""Keep autocast away from what must be exact: degradations, colour spaces and measures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def full_precision(function: F) -> F:
    """Decorate a function of tensors so that it computes in its arguments' own types inside ``torch.autocast`` too.

    A run with ``trainer.precision=bf16`` evaluates under autocast, which would turn the matrix products and
    convolutions behind a low-resolution input into bfloat16: two to three digits, far from 8-bit images.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, (torch.Tensor, torch.device)))
        kinds = {t.type if isinstance(t, torch.device) else t.device.type for t in tensors}
        if not any(torch.is_autocast_enabled(kind) for kind in kinds):
            return function(*args, **kwargs)
        with torch.autocast(kinds.pop(), enabled=False):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
