"""The tensors of a model that compete for SPT's parameters (He et al., ICCV 2023, arXiv 2303.08566, ``engine.py``).

All weights and biases of linear layers, convolutions and norms do. Not: the head (it trains in any case), tokens,
position and other embeddings, the layers that read the image, and tensors that two layers share.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from filtrun.methods.peft.places import image_layers, projections
from filtrun.methods.peft.spt_allocation import Slot, adapter_size, lora_size
from filtrun.sparse_entries import owners_of
from filtrun.surgery import CONVS, NORMS, behaves

PLAIN_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OUTPUTS = ("proj", "out_proj", "o_proj")


@dataclass(frozen=True)
class Tensors:
    """The competing tensors by name, who holds each (module, attribute), their slots, and which of them are weights of
    the output projection of attention."""

    parameters: dict[str, nn.Parameter]
    owners: dict[str, tuple[nn.Module, str]]
    slots: list[Slot]
    projections: frozenset[str]


def find_tensors(model: nn.Module, skip: Collection[nn.Parameter], structured: str, rank: int) -> Tensors:
    """The competing tensors of a model.

    Args:
        skip: parameters that do not compete.
        structured: "lora", "adapter" or "none": which module a matrix may get, of rank (or width) `rank`.
    """
    out = {id(p) for p in skip} | {id(p) for layer in image_layers(model) for p in layer.parameters()}
    owners, joint = owners_of(model), _joint(model)
    outputs = _output_projections(model)
    parameters, holders, slots, after = {}, {}, [], set()
    for name, parameter in model.named_parameters():
        held = owners[id(parameter)]
        owner, attribute = held[0]
        fits = isinstance(owner, (nn.Linear, nn.MultiheadAttention, *CONVS, *NORMS)) or parameter.ndim == 1
        if id(parameter) in out or len(held) > 1 or not fits or parameter.ndim == 0:
            continue
        parameters[name], holders[name] = parameter, (owner, attribute)
        if id(owner) in outputs:
            after.add(name)
        for role, start, stop in joint.get(id(owner), [("", 0, len(parameter))]):
            own = f"{name}:{role}" if role else name
            if parameter.ndim == 1:
                slots.append(Slot(own, name, start, stop, vector=True))
                continue
            size = _module_size(owner, stop - start, structured, rank, id(owner) in outputs)
            if attribute != "weight" or size is None or size >= parameter[start:stop].numel():
                size = None
            slots.append(Slot(own, name, start, stop, module_size=size))
    return Tensors(parameters, holders, slots, frozenset(after))


def _module_size(layer: nn.Module, outputs: int, structured: str, rank: int, projection: bool) -> int | None:
    """Parameters of the low-rank module of a layer; None when it cannot have one."""
    if structured == "none":
        return None
    if behaves(layer, (nn.Linear,)):
        inputs: int = layer.in_features  # type: ignore[assignment]
        if structured == "lora":
            return lora_size(inputs, outputs, rank)
        return adapter_size(inputs if projection else outputs, outputs, rank)
    if behaves(layer, PLAIN_CONVS) and layer.groups == 1:
        kernel = layer.weight[0, 0].numel()  # type: ignore[index, operator, union-attr]
        if structured == "lora":
            return lora_size(layer.in_channels, outputs, rank, kernel)  # type: ignore[arg-type]
        return adapter_size(outputs, outputs, rank)
    return None


def _joint(model: nn.Module) -> dict[int, list[tuple[str, int, int]]]:
    """Id of a joint projection -> (role, first row, end) of each of its parts."""
    found: dict[int, list[tuple[str, int, int]]] = {}
    for part in projections(model):
        if part.stop - part.start < part.module.out_features:
            found.setdefault(id(part.module), []).append((part.role, part.start, part.stop))
    return found


def _output_projections(model: nn.Module) -> set[int]:
    """Ids of the linear layers behind attention: next to queries and values under a usual name."""
    attention = {id(part.module) for part in projections(model)}
    found = set()
    for module in model.modules():
        if any(id(child) in attention for child in module.children()):
            for name, child in module.named_children():
                first = next(iter(child.children()), None) if name == "to_out" else child
                if (name in OUTPUTS or name == "to_out") and isinstance(first, nn.Linear):
                    found.add(id(first))
    return found
