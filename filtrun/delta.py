"""What a run stores of its model: the tensors it changed, with the hash of the base they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from filtrun.bits import pack_zeros, unpack_zeros
from filtrun.errors import UserError
from filtrun.pack import load_tree, save_tree

if TYPE_CHECKING:
    from filtrun.context import Run

FILE = "model.safetensors"


def packing(model: nn.Module) -> list[Any]:
    """The modules that store their own parameters in fewer bits.

    They have ``packed()``, which gives uint8 (`packed_bytes`,), and ``unpack(data)``, after which their output is bit
    for bit what it was.
    """
    return [m for m in model.modules() if hasattr(type(m), "packed_bytes")]


def changed(model: nn.Module, base_buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trainable parameters but those of `packing` modules, and buffers that are new or differ from the base's."""
    inside = {id(p) for m in packing(model) for p in m.parameters(recurse=False)}
    named = model.named_parameters()
    tensors = {name: p.detach() for name, p in named if p.requires_grad and id(p) not in inside}
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state and (name not in base_buffers or not torch.equal(buffer.cpu(), base_buffers[name])):
            tensors[name] = buffer.detach()
    return tensors


def save_delta(run: Run, folder: Path, base_sha256: str) -> Path:
    """Write ``model.safetensors`` of an edited, not yet finished model."""
    tensors = changed(run.model, run.shared.get("base_buffers", {}))
    packed = {name: pack_zeros(tensor) for name, tensor in tensors.items()}
    methods = {m.slug: m.delta_state() for m in run.methods}
    state = {"tensors": packed, "methods": methods}
    if parts := [m.packed().cpu() for m in packing(run.model)]:
        state["packed"] = torch.cat(parts)  # one entry for all: a name for each would take more room than the bits
    path = folder / FILE
    save_tree(path, state, base_sha256=base_sha256, saved_by="filtrun")
    return path


def load_delta(run: Run, path: Path, base_sha256: str) -> None:
    """Put stored tensors into a model that the same methods have edited.

    Raises UserError when the base is another one than the delta was trained on, or the tensors do not fit.
    """
    state, metadata = load_tree(path)
    if metadata.get("base_sha256") != base_sha256:
        raise UserError(
            f"{path} belongs to another base: its hash is {str(metadata.get('base_sha256'))[:12]}, "
            f"this base has {base_sha256[:12]}"
        )
    for method in run.methods:
        method.load_state_dict(state["methods"].get(method.slug, {}))
    own: dict[str, Any] = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    for name, packed in state["tensors"].items():
        tensor = unpack_zeros(packed)
        if name not in own or own[name].shape != tensor.shape:
            has = tuple(own[name].shape) if name in own else "no such tensor"
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model has {has}")
        with torch.no_grad():
            own[name].copy_(tensor)
    data, modules = state.get("packed", torch.empty(0, dtype=torch.uint8)), packing(run.model)
    if len(data) != sum(m.packed_bytes for m in modules):
        raise UserError(f"{path}: its {len(data)} bytes of packed tensors do not fit the model")
    for module, part in zip(modules, data.split([m.packed_bytes for m in modules]), strict=True):
        module.unpack(part)


def describe(path: Path) -> dict[str, Any]:
    """Names and shapes in a stored delta, for people."""
    state, metadata = load_tree(path)
    shapes = {name: list(unpack_zeros(packed).shape) for name, packed in state["tensors"].items()}
    return {"base_sha256": metadata.get("base_sha256"), "tensors": json.loads(json.dumps(shapes))}
