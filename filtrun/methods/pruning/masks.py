"""Keep masks over the parameters of a model, 1 = alive. A pruning method stores what it removed as a `MaskSet`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from filtrun.bits import pack_bits, unpack_bits
from filtrun.errors import UserError


@dataclass
class Mask:
    """The mask of one parameter.

    Attributes:
        name: what it is stored under; the parameter itself may be renamed by other methods.
        parameter: the tensor it acts on.
        keep: bool, broadcastable to the parameter: its own shape for single weights, (out, 1, 1, 1) for filters.
        granularity: ``weight``, ``filter``, ``channel`` or N:M as in ``2:4`` (N kept of every M).
    """

    name: str
    parameter: nn.Parameter
    keep: Tensor
    granularity: str = "weight"

    @property
    def kept(self) -> int:
        """Scalars of the parameter that are alive."""
        return int(self.keep.sum()) * (self.parameter.numel() // max(1, self.keep.numel()))


class MaskSet:
    """Masks of several parameters, applied by zeroing: after every optimizer step, after loading, before evaluation.

    >>> masks = MaskSet()
    >>> masks.set("weight", layer.weight, layer.weight.abs() > 0.1)  # doctest: +SKIP
    >>> masks.apply()  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.entries: dict[str, Mask] = {}

    def __iter__(self) -> Iterator[Mask]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].keep

    def set(self, name: str, parameter: nn.Parameter, keep: Tensor, granularity: str = "weight") -> None:
        """Give `parameter` a mask, or another one. Raises ValueError when `keep` does not broadcast to it."""
        if keep.ndim != parameter.ndim or any(
            k not in (1, p) for k, p in zip(keep.shape, parameter.shape, strict=True)
        ):
            raise ValueError(f"{name}: a mask of shape {tuple(keep.shape)} does not fit {tuple(parameter.shape)}")
        self.entries[name] = Mask(name, parameter, keep.detach().to(parameter.device, torch.bool), granularity)

    def clear(self) -> None:
        """Forget all masks; the zeros stay."""
        self.entries = {}

    @torch.no_grad()
    def apply(self) -> None:
        """Write +0 wherever a mask is 0: exact, also where the weight is not finite."""
        for mask in self:
            mask.parameter.masked_fill_(~mask.keep.to(mask.parameter.device), 0)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """The same for the gradients: a pruned entry then neither trains nor enters a clipped norm."""
        for mask in self:
            if mask.parameter.grad is not None:
                mask.parameter.grad.masked_fill_(~mask.keep.to(mask.parameter.device), 0)

    def sparsity(self) -> float:
        """Share of the masked parameters' entries that are zeroed, in [0, 1]; 0 without masks."""
        total = sum(mask.parameter.numel() for mask in self)
        return 1 - sum(mask.kept for mask in self) / total if total else 0.0

    def shares(self) -> dict[str, float]:
        """Name -> share of its entries that is alive."""
        return {mask.name: mask.kept / mask.parameter.numel() for mask in self}

    def state_dict(self) -> dict[str, Any]:
        """Bits, shapes and tags by name."""
        return {
            mask.name: {"bits": pack_bits(mask.keep), "shape": list(mask.keep.shape), "granularity": mask.granularity}
            for mask in self
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the masks `state_dict` gave, over `parameters` by their names; they are applied too.

        Raises UserError for a name that is not there or a mask that does not fit.
        """
        self.entries = {}
        for name, node in state.items():
            keep = unpack_bits(node["bits"], node["shape"])
            if name not in parameters:
                raise UserError(f"a stored mask is for {name}, but this model has no such tensor")
            try:
                self.set(name, parameters[name], keep, node["granularity"])
            except ValueError as error:
                raise UserError(f"a stored mask does not fit this model: {error}") from error
        self.apply()
