"""Train some entries of a tensor and leave the others as they are, bit for bit.

`ScatterEntries` keeps the chosen entries in one vector, the only thing that has a gradient and optimizer state
("unstructural back-propagation" in SaRA, arXiv 2409.06633, section 3.4): the dense gradient of a tensor exists only
while its layer is in the backward pass. `DenseEntries` is the plain variant with a masked gradient, for comparison.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SMALL = 4096
"""Up to as many positions are kept as they are: packing them would save little and costs a kernel a step."""


def pack_positions(index: Tensor) -> Tensor:
    """Ascending positions, int64 (k,), as the gaps between them in the smallest integers that hold those: uint8 mostly.

    An eighth of the memory; where many entries train, 64-bit positions would take twice what the values do. Positions
    of few entries, or too far apart, stay as they are.
    """
    if len(index) > SMALL:
        gaps = index.diff(prepend=index.new_zeros(1))
        widest = int(gaps.max())
        for dtype in (torch.uint8, torch.int16, torch.int32):
            if widest <= torch.iinfo(dtype).max:
                return gaps.to(dtype)
    return index


def positions(packed: Tensor) -> Tensor:
    """The int64 (k,) positions that `pack_positions` was given."""
    return packed if packed.dtype == torch.int64 else packed.cumsum(0, dtype=torch.int64)


FIRST = 2**62
"""Place in the backward pass of what takes the chosen entries out of a dense gradient: before all layers that wait.

Autograd goes by the age of what is ready, the latest first. These nodes are older than any forward pass: left to that
rule they would come last, and all dense gradients would wait for them together.
"""


class _Entries(torch.autograd.Function):
    """Present a dense tensor whose chosen entries are the vector `values`; the gradient goes to `values` alone.

    The result shares the memory of `dense` but is no view of it, so writing the entries after an optimizer step needs
    no new graph; nothing is saved for the backward pass, so one result serves any number of them.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, packed: Tensor) -> Tensor:
        ctx.packed = packed
        same = torch.empty(0, dtype=dense.dtype, device=dense.device)
        return same.set_(dense.untyped_storage(), dense.storage_offset(), dense.size(), dense.stride())  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].take(positions(ctx.packed)), None, None


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds a parameter, by the parameter's id (several where weights are tied)."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    return owners


def keep_order(module: nn.Module, order: list[str]) -> None:
    """Put the module's own parameters back into `order` after one was taken out and registered again."""
    for name in order:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


class ScatterEntries:
    """The entries of one parameter where `mask` holds, as a vector parameter `values` (k,) in row-major order.

    The parameter is taken out of its modules; they keep the dense tensor as a buffer, and the forward pass sees it
    with gradients going to `values`. `active` (k,) says which entries still train once `freeze` was called; `kept`
    holds the values of the others, and is read off at the next `sync` where it is None.
    """

    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor, owners: list[tuple[nn.Module, str]]) -> None:
        self.name, self.owners, self.parameter = name, owners, parameter
        self.active: Tensor | None = None
        self.kept: Tensor | None = None
        self._hook: Any = None
        index = mask.flatten().nonzero().flatten()
        self.values = nn.Parameter(parameter.detach().take(index))
        module, attribute = owners[0]
        self._orders = [list(owner._parameters) for owner, _ in owners]
        for owner, at in owners:
            del owner._parameters[at]
        module.register_parameter(f"{attribute}_values", self.values)
        module.register_buffer(f"{attribute}_dense", parameter.detach(), persistent=False)
        module.register_buffer(f"{attribute}_packed", pack_positions(index), persistent=False)
        self._bind()

    @property
    def dense(self) -> Tensor:
        """The whole tensor; entries outside the mask are those of the base."""
        module, attribute = self.owners[0]
        return module._buffers[f"{attribute}_dense"]  # type: ignore[return-value]

    @property
    def index(self) -> Tensor:
        """Positions of the entries in the flattened tensor, int64 (k,)."""
        return positions(self._packed)

    @property
    def _packed(self) -> Tensor:
        module, attribute = self.owners[0]
        return module._buffers[f"{attribute}_packed"]  # type: ignore[return-value]

    def _bind(self) -> None:
        self._bound = self.dense
        with torch.enable_grad():
            seen = _Entries.apply(self.values, self.dense, self._packed)
        node = seen.grad_fn
        if hasattr(node, "_set_sequence_nr"):
            node._set_sequence_nr(FIRST)
        for owner, attribute in self.owners:
            object.__setattr__(owner, attribute, seen)

    @torch.no_grad()
    def sync(self, magnitude: bool = False) -> None:
        """Write `values` into the dense tensor; frozen entries get their value back, the others lose their sign if
        `magnitude` is set."""
        if self._bound is not self.dense:  # the model was moved to another device
            self._bind()
        self._keep_frozen()
        values = self.values.detach()
        if magnitude:
            values = values.abs() if self.active is None else torch.where(self.active, values.abs(), values)
        self.dense.put_(self.index, values)

    @torch.no_grad()
    def _keep_frozen(self) -> None:
        """Undo what the optimizer (weight decay, moments) did to entries that do not train."""
        if self.active is None:
            return
        if self.kept is None:
            self.kept = self.values.detach().clone()
        if self.active.device != self.values.device:
            self.active, self.kept = self.active.to(self.values.device), self.kept.to(self.values.device)
        self.values.copy_(torch.where(self.active, self.values, self.kept))

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Where training still acts, a bool tensor of the dense shape."""
        mask = torch.zeros(self.dense.shape, dtype=torch.bool, device=self.dense.device)
        active = torch.ones_like(self.values, dtype=torch.bool) if self.active is None else self.active
        return mask.put_(self.index, active)

    @torch.no_grad()
    def freeze(self, active: Tensor) -> None:
        """From now on only the entries where `active` (k,) holds train; the others keep their value.

        Their value is the one at the next `sync`, so that a loaded state can be frozen before its values are there.
        """
        self.active, self.kept = active.reshape(self.values.shape).to(self.values.device), None
        if self._hook is None:  # a gradient that moves nothing must not count when gradients are clipped
            self._hook = self.values.register_hook(self._masked)

    def _masked(self, grad: Tensor) -> Tensor:
        if self.active is None:
            return grad
        return grad.masked_fill(~self.active.to(grad.device), 0)

    @torch.no_grad()
    def add_grad(self, dense_grad: Tensor) -> None:
        """Add the entries of a gradient of the dense shape to that of `values`."""
        grad = dense_grad.take(self.index)
        self.values.grad = grad if self.values.grad is None else self.values.grad.add_(grad)

    def restore(self) -> nn.Parameter:
        """Put an ordinary parameter with the trained entries back into the modules, and return it."""
        self.sync()
        module, attribute = self.owners[0]
        parameter = self.parameter  # the same object as before: other methods may hold it
        parameter.data = self.dense
        parameter.requires_grad_(True)
        if self._hook is not None:
            self._hook.remove()
        del module._parameters[f"{attribute}_values"], module._buffers[f"{attribute}_dense"]
        del module._buffers[f"{attribute}_packed"]
        module._non_persistent_buffers_set -= {f"{attribute}_dense", f"{attribute}_packed"}
        for (owner, at), order in zip(self.owners, self._orders, strict=True):
            object.__delattr__(owner, at)
            owner.register_parameter(at, parameter)
            keep_order(owner, order)
        return parameter


class DenseEntries(ScatterEntries):
    """The same with an ordinary parameter: dense gradient and optimizer state, masked. Costs more memory."""

    def __init__(self, name: str, parameter: nn.Parameter, mask: Tensor, owners: list[tuple[nn.Module, str]]) -> None:
        self.name, self.owners, self.values, self.parameter = name, owners, parameter, parameter
        self.active, self.kept = mask, parameter.detach().clone()
        parameter.requires_grad_(True)
        self._hook = parameter.register_hook(self._masked)

    @property
    def dense(self) -> Tensor:
        return self.values.detach()

    @property
    def index(self) -> Tensor:
        return torch.arange(self.values.numel(), device=self.values.device)

    def sync(self, magnitude: bool = False) -> None:
        self._keep_frozen()

    def mask(self) -> Tensor:
        assert self.active is not None
        return self.active

    @torch.no_grad()
    def add_grad(self, dense_grad: Tensor) -> None:
        grad = self._masked(dense_grad)
        self.values.grad = grad if self.values.grad is None else self.values.grad.add_(grad)

    def restore(self) -> nn.Parameter:
        self.sync()
        self._hook.remove()
        return self.values
