"""A tensor of the last forward pass that a regulariser needs, kept outside the module's state."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LastTensor:
    """Holds a tensor with its graph; copies and pickles of it are empty, so that the model around it can be copied."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> LastTensor:
        return LastTensor()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return LastTensor, ()
