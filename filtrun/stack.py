"""Models of one structure with their tensors stacked, so that one vectorised call runs them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from filtrun.data.split import Batch


class Apart(Exception):
    """Why runs cannot be trained at once; nothing has been changed."""


class Stack:
    """The tensors of S models of one structure, with a new first dimension of size S.

    The models' own parameters and buffers become views of them, so that whoever looks at a model sees it train.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = models
        named = [dict(model.named_parameters()) for model in models]
        kept = [dict(model.named_buffers()) for model in models]
        for of, what in ((named, "parameters"), (kept, "buffers")):
            shapes = [{k: (v.shape, v.dtype, v.requires_grad) for k, v in each.items()} for each in of]
            if any(each != shapes[0] for each in shapes):
                raise Apart(f"their {what} have different names or shapes")
        self.trained: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        for name, parameter in named[0].items():
            each = [found[name] for found in named]
            if not parameter.requires_grad and all(torch.equal(parameter, other) for other in each[1:]):
                self.shared[name] = parameter.detach()  # the base, which all have in common: kept once
                continue
            stacked = self._stacked(each)
            (self.trained if parameter.requires_grad else self.frozen)[name] = stacked
            stacked.requires_grad_(parameter.requires_grad)
        self.buffers = {name: self._stacked([found[name] for found in kept]) for name in kept[0]}
        self.places = {id(p): (name, i) for i, found in enumerate(named) for name, p in found.items()}

    @staticmethod
    def _stacked(tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack([t.detach() for t in tensors])
        for i, tensor in enumerate(tensors):
            tensor.data = stacked[i]
        return stacked

    def each(self, call: Callable[[Callable[..., Any], Batch], Tensor], batches: Sequence[Batch]) -> Tensor:
        """``call(network, batch)`` for each model with its batch, all at once; the results stacked."""

        def one(own: tuple[dict[str, Tensor], ...], x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            state = {**self.shared}
            for part in own:
                state |= part

            def network(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.models[0], state, args, kwargs)

            return call(network, Batch(x, y, index))

        columns = (torch.stack([getattr(b, name) for b in batches]) for name in ("x", "y", "index"))
        made: Tensor = vmap(one, randomness="error")((self.trained, self.frozen, self.buffers), *columns)
        return made

    def release(self, optimizers: Sequence[Any]) -> None:
        """Give every model, and every optimizer, tensors of its own again."""
        for model in self.models:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
        for optimizer in optimizers:
            for state in state_of(optimizer).values():
                state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})


def state_of(optimizer: Any) -> Any:
    """What an optimizer remembers of each parameter; Fabric's wrapper may hold that of an earlier load."""
    return getattr(optimizer, "optimizer", optimizer).state


def clip_each(parameters: Sequence[Tensor], most: float) -> None:
    """Scale the gradients of each of S stacked models so that its norm is at most `most`, as ``clip_grad_norm_``."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factors = (most / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)))
