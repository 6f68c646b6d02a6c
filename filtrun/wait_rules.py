"""The stand-in for a GPU, and which operations of torch's core make the host wait for one (names as in ``aten``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cpu", 0)
"""Stands for the GPU."""
HOST = torch.device("cpu")

READS = {
    "_local_scalar_dense",  # item(), float(), bool(), int()
    "equal",
    # the size of the result has to be known
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "bincount", "repeat_interleave.Tensor", "histc", "_histogramdd_from_bin_tensors",
    # their arguments are checked
    "multinomial", "normal.Tensor_Tensor", "normal.float_Tensor", "_linalg_check_errors",
    # solvers that report whether they converged
    "_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_lstsq", "_linalg_eigvals", "linalg_eigvals",
}  # fmt: skip
"""Operations on device tensors that the host waits for; with an overload's name only that one."""


def _blocks(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))


COPIES: dict[str, Callable[[Sequence[Any], dict[str, Any]], bool]] = {
    "copy_": lambda args, kwargs: not _blocks(args, kwargs),
    "_foreach_copy_": lambda args, kwargs: not _blocks(args, kwargs),
}
"""Copies that may go from one place to the other -> whether a call of them goes on without waiting."""


def reads_mask(name: str, indices: Sequence[Tensor], args: Sequence[Any]) -> bool:
    """Whether indexing looks for the places a mask is true at; writing one number at one mask does not."""
    masks = [t for t in indices if t.dtype in (torch.bool, torch.uint8)]
    adds = len(args) > 3 and args[3]
    return bool(masks) and not ("put" in name and len(indices) == 1 and args[2].numel() == 1 and not adds)


def mixable(name: str) -> bool:
    """Whether an operation may have tensors of both places."""
    return name in ("_to_copy", "set_", "is_same_size", "_has_compatible_shallow_copy_type", "copy")


def storage_of(tensor: Tensor) -> Any:
    """The memory of a tensor, the same object for all its views; None where it has none (sparse tensors)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for part in tree for t in tensors_in(part)] if isinstance(tree, (list, tuple)) else []
