"""Tensors in fewer bytes, without loss: bool masks as bits, tensors with many zeros as bits and the other values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OVERHEAD = 200  # bytes that two more entries take in a file


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor (any shape) as uint8 (ceil(n / 8),), first entry in the highest bit."""
    bits = mask.detach().flatten().to(torch.uint8)
    rows = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (rows * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool tensor of `shape` that `pack_bits` packed."""
    size = torch.Size(shape)
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return ((packed[:, None] >> shifts) & 1).flatten()[: size.numel()].bool().view(size)


def pack_zeros(tensor: Tensor) -> Tensor | dict[str, Any]:
    """A floating tensor as a bit for each entry and the values that are not +0, where that is smaller; else itself."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    plain = tensor.detach().contiguous()
    alive = plain.view(_AS_INTEGER[plain.element_size()]) != 0  # by its bits: -0 is a value of its own
    size = int(alive.sum()) * plain.element_size() + plain.numel() // 8 + _OVERHEAD
    if size > 0.95 * plain.numel() * plain.element_size():
        return tensor
    return {"nonzero": pack_bits(alive), "values": plain[alive], "shape": list(plain.shape)}


def unpack_zeros(packed: Tensor | Mapping[str, Any]) -> Tensor:
    """The tensor that `pack_zeros` was given, bit for bit."""
    if isinstance(packed, Tensor):
        return packed
    values = packed["values"]
    tensor = torch.zeros(packed["shape"], dtype=values.dtype, device=values.device)
    tensor[unpack_bits(packed["nonzero"], packed["shape"])] = values
    return tensor
