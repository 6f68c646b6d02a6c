"""What a physical removal of channels takes out of a model, as data: made once, stored, replayed on a fresh model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from filtrun.errors import UserError


@dataclass
class Removal:
    """Which slices of which tensors stay, and the sizes that modules write down beside their tensors.

    Attributes:
        keep: tensor name -> {dimension: bool (size,)}, True for what stays. Parameters and buffers.
        attributes: module name -> {attribute: new value}, such as ``out_channels`` or ``groups``.
        gap: largest difference between the outputs of the slim and of the masked model when it was made.

    `apply` changes tensors in place: the Parameter objects stay the same, so whatever holds one (an optimizer, another
    method) goes on holding it. Optimizer state has the old shape afterwards: call `filtrun.runner.refit`.
    """

    keep: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    gap: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing is taken out."""
        return not self.keep

    def removed(self) -> dict[str, int]:
        """Tensor name -> rows (output channels) taken out of it, where there are any."""
        return {name: int((~dims[0]).sum()) for name, dims in self.keep.items() if 0 in dims}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Take the channels out of `model`. Raises UserError when it has not the tensors or sizes this was made for."""
        tensors = tensors_of(model)
        for name, dims in self.keep.items():
            self._check(tensors, name, dims)
        for name, dims in self.keep.items():
            tensor = tensors[name]
            data = tensor.data
            for dim, keep in dims.items():
                data = data.index_select(dim, keep.nonzero().flatten().to(data.device))
            tensor.grad = None
            # a change of type makes autograd forget what it has noted about the old shape; a change of shape does not
            tensor.data = tensor.data.to(torch.float16 if tensor.dtype == torch.float64 else torch.float64)
            tensor.data = data
        for name, values in self.attributes.items():
            module = model.get_submodule(name)
            for key, value in values.items():
                setattr(module, key, value)

    @torch.no_grad()
    def mask(self, model: nn.Module) -> None:
        """Zero what `apply` would take out: the outputs of the removed channels, their norms and their biases.

        A model masked so gives the output of the slim one, up to rounding.
        """
        for keep, parameter in self.keep_masks(model).values():
            parameter.masked_fill_(~keep, 0)

    def keep_masks(self, model: nn.Module) -> dict[str, tuple[Tensor, nn.Parameter]]:
        """Parameter name -> (bool mask over its rows, broadcastable to it; the parameter)."""
        parameters, found = dict(model.named_parameters()), {}
        for name, dims in self.keep.items():
            if name in parameters and 0 in dims:
                self._check(parameters, name, dims)
                shape = (-1, *[1] * (parameters[name].ndim - 1))
                found[name] = dims[0].view(shape).to(parameters[name].device), parameters[name]
        return found

    def share_of(self, weight: str) -> float:
        """Share of the entries of the tensor `weight` that stays."""
        share = 1.0
        for keep in self.keep.get(weight, {}).values():
            share *= keep.float().mean().item()
        return share

    def _check(self, tensors: Mapping[str, Tensor], name: str, dims: Mapping[int, Tensor]) -> None:
        if name not in tensors:
            raise UserError(f"channels are to be removed from {name}, but this model has no such tensor")
        shape = tuple(tensors[name].shape)
        if any(dim >= len(shape) or shape[dim] != len(keep) for dim, keep in dims.items()):
            wanted = {dim: len(keep) for dim, keep in dims.items()}
            raise UserError(f"channels are to be removed from {name} of sizes {wanted}, but it has shape {shape}")

    # -- as JSON -----------------------------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        """JSON values; a keep vector as `to_hex` writes it."""
        keep = {name: {str(dim): to_hex(mask) for dim, mask in dims.items()} for name, dims in self.keep.items()}
        return {"keep": keep, "attributes": self.attributes, "gap": self.gap}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Removal:
        """The inverse of `to_json`."""
        keep = {n: {int(dim): from_hex(text) for dim, text in dims.items()} for n, dims in state["keep"].items()}
        attributes = {
            name: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for name, values in state["attributes"].items()
        }
        return cls(keep, attributes, state["gap"])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def to_hex(mask: Tensor) -> str:
    """A bool vector as ``size:hex digits``, first entry in the highest bit."""
    bits = "".join("1" if keep else "0" for keep in mask.tolist())
    return f"{len(bits)}:{int(bits, 2):x}" if bits else "0:0"


def from_hex(text: str) -> Tensor:
    """The inverse of `to_hex`."""
    size, _, digits = text.partition(":")
    bits = format(int(digits, 16), "b").zfill(int(size))
    return torch.tensor([bit == "1" for bit in bits[: int(size)]], dtype=torch.bool)
