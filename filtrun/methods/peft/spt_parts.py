"""Putting what SPT chose into a model, and merging it (He et al., ICCV 2023, arXiv 2303.08566)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from filtrun.methods.peft.branches import leave, stay_behind
from filtrun.methods.peft.spt_allocation import Allocation
from filtrun.methods.peft.spt_layers import SparseLinear, SparseTensor, Structured
from filtrun.methods.peft.spt_slots import Tensors
from filtrun.surgery import NORMS, base_tensor, behaves, put_behind, put_into, take_off, take_out, write


@dataclass(frozen=True)
class Module:
    """What stands in for many entries of a matrix: "lora" or "adapter" of some rank, and its dropout rates."""

    kind: str
    rank: int
    dropout: float = 0.0
    drop_path: float = 0.0


@dataclass
class Part:
    """Something put into `owner`: behind it under `name` (with a `hook` where it leaves again), or (with the `order` of
    the owner's parameters before) in its tensor `name`."""

    owner: nn.Module
    name: str
    module: Any
    hook: Any = None
    order: list[str] | None = None


def whole_vectors(found: Tensors, chosen: Allocation) -> list[nn.Parameter]:
    """The parameters that train as they are: whole vectors that are a tensor of their own."""
    return [
        found.parameters[slot.tensor]
        for slot in found.slots
        if slot.name in chosen.vectors and slot.stop - slot.start == len(found.parameters[slot.tensor])
    ]


def marked_entries(found: Tensors, chosen: Allocation) -> dict[str, Tensor]:
    """Tensor's name -> flat positions of the entries that train one by one, those of vectors in a joint bias too."""
    marks: dict[str, list[Tensor]] = {}
    for slot in found.slots:
        tensor = found.parameters[slot.tensor]
        if slot.name in chosen.entries:
            at = chosen.entries[slot.name].to(tensor.device, torch.int64) + slot.start * tensor[0].numel()
        elif slot.name in chosen.vectors and slot.stop - slot.start < len(tensor):
            at = torch.arange(slot.start, slot.stop, device=tensor.device)
        else:
            continue
        marks.setdefault(slot.tensor, []).append(at)
    return {name: torch.cat(at) for name, at in marks.items()}


def put_parts(found: Tensors, chosen: Allocation, module: Module, skip_norms: bool = False) -> list[Part]:
    """Let the chosen entries and modules act in the model; returns what was put in, in order.

    `skip_norms` leaves out the entries of norms.
    """
    parts = _put_entries(found, marked_entries(found, chosen), skip_norms)
    for slot in found.slots:
        if slot.name not in chosen.structured:
            continue
        owner, _ = found.owners[slot.tensor]
        projection = slot.tensor in found.projections  # as in the official code: no dropout, an adapter beside it
        dropout = 0.0 if projection else module.dropout
        made = Structured(
            owner, module.kind, module.rank, slot.start, slot.stop, dropout, module.drop_path, projection
        )  # fmt: skip
        made.to(found.parameters[slot.tensor].device).train(owner.training)
        name = "spt" + slot.name.partition(":")[2]
        if module.kind == "lora":
            parts.append(Part(owner, name, made, put_behind(owner, name, made)))
        else:
            parts.append(Part(owner, name, stay_behind(owner, made, name)))
    return parts


def _put_entries(found: Tensors, marks: Mapping[str, Tensor], skip_norms: bool) -> list[Part]:
    parts = []
    for name, at in marks.items():
        owner, attribute = found.owners[name]
        if behaves(owner, (nn.Linear,)):
            if attribute == "bias" and f"{name.removesuffix('bias')}weight" in marks:
                continue  # comes with the weight
            bias = marks.get(f"{name.removesuffix('weight')}bias") if attribute == "weight" else at
            made: Any = SparseLinear(owner, at if attribute == "weight" else None, bias)  # type: ignore[arg-type]
            parts.append(Part(owner, "spt_entries", made, put_behind(owner, "spt_entries", made)))
        elif not skip_norms or not isinstance(owner, NORMS):
            tensor = base_tensor(owner, attribute)
            assert tensor is not None
            made = SparseTensor(tensor, at)
            parts.append(Part(owner, attribute, made, order=put_into(owner, attribute, made)))
    return parts


@torch.no_grad()
def merge_parts(parts: Sequence[Part]) -> list[Part]:
    """Add changes of entries and LoRA products to their tensors; returns the parts that stay (adapters)."""
    for part in reversed(parts):
        if part.order is not None:
            _add(take_out(part.owner, part.name, part.module, part.order), part.module.index, part.module.delta)
        elif part.hook is not None:
            take_off(part.owner, part.name, part.hook)
            if isinstance(part.module, SparseLinear):
                for attribute, index, delta in part.module.changes():
                    _add(base_tensor(part.owner, attribute), index, delta)
            else:
                _add_product(base_tensor(part.owner, "weight"), part.module)
    return [part for part in parts if part.hook is None and part.order is None]


def remove_parts(parts: Sequence[Part]) -> None:
    """Take parts out again, without merging them."""
    for part in reversed(parts):
        if part.order is not None:
            take_out(part.owner, part.name, part.module, part.order)
        elif part.hook is not None:
            take_off(part.owner, part.name, part.hook)
        else:
            leave(part.owner, part.module)


def _add(tensor: nn.Parameter | None, index: Tensor, delta: Tensor) -> None:
    if tensor is not None:
        write(tensor, tensor.double().flatten().index_add(0, index, delta.double()).view_as(tensor))


def _add_product(weight: nn.Parameter | None, module: Structured) -> None:
    if weight is not None:
        rows: Any = weight[module.start : module.stop]
        write(rows, rows.double() + module.delta().view(rows.shape))
