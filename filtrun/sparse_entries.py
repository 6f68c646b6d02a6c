"""Train some entries of a tensor and leave the others as they are, bit for bit.

`ScatterEntries` keeps the chosen entries in one vector, the only thing that has a gradient and optimizer state
("unstructural back-propagation" in SaRA, arXiv 2409.06633, section 3.4): the dense gradient of a tensor exists only
while its layer is in the backward pass. `DenseEntries` is the plain variant with a masked gradient, for comparison.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Entries(torch.autograd.Function):
    """Present a dense tensor whose chosen entries are the vector `values`; the gradient goes to `values` alone.

    The result shares the memory of `dense` but is no view of it, so writing the entries after an optimizer step needs
    no new graph; nothing is saved for the backward pass, so one result serves any number of them.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, index: Tensor) -> Tensor:
        ctx.index = index
        same = torch.empty(0, dtype=dense.dtype, device=dense.device)
        return same.set_(dense.untyped_storage(), dense.storage_offset(), dense.size(), dense.stride())  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].take(ctx.index), None, None


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds a parameter, by the parameter's id (several where weights are tied)."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    return owners


class ScatterEntries:
    """The entries of one parameter where `mask` holds, as a vector parameter `values` (k,) in row-major order.

    The parameter is taken out of its modules; they keep the dense tensor as a buffer, and the forward pass sees it
    with gradients going to `values`. `active` (k,) says which entries still train once `freeze` was called.
    """

    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor, owners: list[tuple[nn.Module, str]]) -> None:
        self.name, self.owners = name, owners
        self.active: Tensor | None = None
        self.kept: Tensor | None = None
        index = mask.flatten().nonzero().flatten()
        self.values = nn.Parameter(parameter.detach().take(index))
        module, attribute = owners[0]
        for owner, at in owners:
            del owner._parameters[at]
        module.register_parameter(f"{attribute}_values", self.values)
        module.register_buffer(f"{attribute}_dense", parameter.detach(), persistent=False)
        module.register_buffer(f"{attribute}_index", index, persistent=False)
        self._bind()

    @property
    def dense(self) -> Tensor:
        """The whole tensor; entries outside the mask are those of the base."""
        module, attribute = self.owners[0]
        return module._buffers[f"{attribute}_dense"]  # type: ignore[return-value]

    @property
    def index(self) -> Tensor:
        """Positions of the entries in the flattened tensor, int64 (k,)."""
        module, attribute = self.owners[0]
        return module._buffers[f"{attribute}_index"]  # type: ignore[return-value]

    def _bind(self) -> None:
        self._bound = self.dense
        with torch.enable_grad():
            seen = _Entries.apply(self.values, self.dense, self.index)
        for owner, attribute in self.owners:
            object.__setattr__(owner, attribute, seen)

    @torch.no_grad()
    def sync(self, magnitude: bool = False) -> None:
        """Write `values` into the dense tensor (their magnitudes if asked); frozen entries get their value back."""
        if self._bound is not self.dense:  # the model was moved to another device
            self._bind()
        if self.active is not None and self.kept is not None:
            self.values.data = torch.where(self.active, self.values, self.kept)
        self.dense.put_(self.index, self.values.abs() if magnitude else self.values.detach())

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Where training still acts, a bool tensor of the dense shape."""
        mask = torch.zeros(self.dense.shape, dtype=torch.bool, device=self.dense.device)
        return mask.put_(self.index, torch.ones_like(self.index, dtype=torch.bool) if self.active is None else self.active)

    @torch.no_grad()
    def freeze(self, active: Tensor) -> None:
        """From now on only the entries where `active` (k,) holds train; the others keep their present value."""
        self.active = active.to(self.values.device)
        self.kept = self.values.detach().clone()

    @torch.no_grad()
    def add_grad(self, dense_grad: Tensor) -> None:
        """Add the entries of a gradient of the dense shape to that of `values`."""
        grad = dense_grad.take(self.index)
        self.values.grad = grad if self.values.grad is None else self.values.grad.add_(grad)

    def restore(self) -> nn.Parameter:
        """Put an ordinary parameter with the trained entries back into the modules, and return it."""
        self.sync()
        module, attribute = self.owners[0]
        parameter = nn.Parameter(self.dense)
        del module._parameters[f"{attribute}_values"], module._buffers[f"{attribute}_dense"]
        del module._buffers[f"{attribute}_index"]
        module._non_persistent_buffers_set -= {f"{attribute}_dense", f"{attribute}_index"}
        for owner, at in self.owners:
            object.__delattr__(owner, at)
            owner.register_parameter(at, parameter)
        return parameter


class DenseEntries(ScatterEntries):
    """The same with an ordinary parameter: dense gradient and optimizer state, masked. Costs more memory."""

    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor, owners: list[tuple[nn.Module, str]]) -> None:
        self.name, self.owners, self.values = name, owners, parameter
        self.active, self.kept = mask, parameter.detach().clone()
        parameter.requires_grad_(True)
        self._hook = parameter.register_hook(lambda grad: grad * self.active)

    @property
    def dense(self) -> Tensor:
        return self.values.detach()

    @property
    def index(self) -> Tensor:
        return torch.arange(self.values.numel(), device=self.values.device)

    @torch.no_grad()
    def sync(self, magnitude: bool = False) -> None:
        assert self.active is not None and self.kept is not None
        if self.active.device != self.values.device:
            self.active, self.kept = self.active.to(self.values.device), self.kept.to(self.values.device)
        self.values.copy_(torch.where(self.active, self.values, self.kept))

    def mask(self) -> Tensor:
        assert self.active is not None
        return self.active

    @torch.no_grad()
    def freeze(self, active: Tensor) -> None:
        self.active = active.reshape(self.values.shape).to(self.values.device)
        self.kept = self.values.detach().clone()

    @torch.no_grad()
    def add_grad(self, dense_grad: Tensor) -> None:
        grad = dense_grad * self.active
        self.values.grad = grad if self.values.grad is None else self.values.grad.add_(grad)

    def restore(self) -> nn.Parameter:
        self.sync()
        self._hook.remove()
        return self.values
