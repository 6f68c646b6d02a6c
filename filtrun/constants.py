"""Small tensors of fixed numbers, made once for each device: copying them there again would wait for it every time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def constant(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)`` of numbers in nested tuples, to be read only.

    The same tensor comes back for the same arguments.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.tensor(values, dtype=dtype, device=device)  # belongs to what is traced
    return _made(values, dtype, device)


@functools.lru_cache(maxsize=256)
def _made(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first, others may need gradients
        return torch.tensor(values, dtype=dtype, device=device)
