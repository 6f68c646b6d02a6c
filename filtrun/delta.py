"""What a run stores of its model: the tensors it changed, with the hash of the base they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.pack import load_tree, save_tree

if TYPE_CHECKING:
    from filtrun.context import Run

FILE = "model.safetensors"


def changed(model: nn.Module, base_buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trainable parameters, and buffers that are new or differ from the base's."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state and (name not in base_buffers or not torch.equal(buffer.cpu(), base_buffers[name])):
            tensors[name] = buffer.detach()
    return tensors


def save_delta(run: Run, folder: Path, base_sha256: str) -> Path:
    """Write ``model.safetensors`` of an edited, not yet finished model."""
    tensors = changed(run.model, run.shared.get("base_buffers", {}))
    methods = {m.slug: m.state_dict() for m in run.methods}
    path = folder / FILE
    save_tree(path, {"tensors": tensors, "methods": methods}, base_sha256=base_sha256, saved_by="filtrun")
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
    for name, tensor in state["tensors"].items():
        if name not in own or own[name].shape != tensor.shape:
            has = tuple(own[name].shape) if name in own else "no such tensor"
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model has {has}")
        with torch.no_grad():
            own[name].copy_(tensor)


def describe(path: Path) -> dict[str, Any]:
    """Names and shapes in a stored delta, for people."""
    state, metadata = load_tree(path)
    shapes = {name: list(tensor.shape) for name, tensor in state["tensors"].items()}
    return {"base_sha256": metadata.get("base_sha256"), "tensors": json.loads(json.dumps(shapes))}
