"""Read weights from files into any module, and find or replace a classifier's head.

Only tensors are read: safetensors files, and PyTorch files through ``torch.load(weights_only=True)``, which refuses
pickled code.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from filtrun.errors import UserError

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts put the state dict of a checkpoint
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel / DDP and torch.compile put before every name
HEAD_NAMES = ("linear", "head", "fc", "classifier", "logits")


def read_state(path: str | os.PathLike[str], nested: bool = False) -> dict[str, torch.Tensor]:
    """Read the state dict in a weights file, on the CPU.

    A state dict under one of the keys "state_dict", "model" or "model_state_dict" is taken out, and a "module." or
    "_orig_mod." that stands before every name is cut off.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.th``, ``.bin``, ``.ckpt`` written by ``torch.save``.
        nested: the file holds state dicts by name; their tensors come as ``name.tensor``.

    Raises:
        UserError: the file is missing, is a folder, has another suffix, is damaged, or holds more than tensors.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"weights file {path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a weights file")
    if path.suffix == ".safetensors":
        state: object = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        state = _read_torch(path)
    else:
        allowed = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise UserError(f"{path} is not a weights file: its suffix is {path.suffix!r}, allowed are {allowed}")
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if nested and isinstance(state, Mapping) and all(isinstance(part, Mapping) for part in state.values()):
        state = {f"{name}.{key}": tensor for name, part in state.items() for key, tensor in part.items()}
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict: expected names with tensors, also under {', '.join(WRAPPERS)}")
    return _without_prefixes({str(name): tensor for name, tensor in state.items()})


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file or is truncated ({error})") from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise UserError(
                f"{path} holds pickled objects besides tensors; loading it could run code, so it is refused\n"
                "save its state_dict() alone, best as .safetensors"
            ) from error
        raise UserError(f"{path} is not a PyTorch weights file or is truncated") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} is not a PyTorch weights file or is truncated") from error


def _without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in (*PREFIXES, *PREFIXES):  # twice: either may stand outside the other
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state


def load_weights(model: nn.Module, path: str | os.PathLike[str], strict: bool = True, head: bool = False) -> list[str]:
    """Copy the weights in a file into `model`, in place; the model is unchanged when this raises.

    Args:
        model: any module; it stays on its device and in its dtype.
        path: see `read_state`.
        strict: every name of the model must be in the file and the other way round. If False, names on one side only
            are passed over, as long as some are shared; shapes must still agree.
        head: leave the classification head (see `head_of`) as it is where the file's has another shape or is absent.

    Returns:
        Names of the model that the file did not set, in order: empty if all were set.

    Raises:
        UserError: what `read_state` raises, missing or unexpected names, no shared name, or shapes that differ.
    """
    state, own = read_state(path), model.state_dict()
    names = _head_names(model) if head else set()
    fresh = {name for name in names if name not in state or state[name].shape != own[name].shape}
    state = {name: tensor for name, tensor in state.items() if name not in fresh}
    # files from before PyTorch 1.0 have no batch counters
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in fresh | optional]
    unexpected = [name for name in state if name not in own]
    if len(unexpected) == len(state) or (strict and (missing or unexpected)):
        parts = [_count("missing", missing)] * bool(missing) + [_count("unexpected", unexpected)] * bool(unexpected)
        raise UserError(f"{path} does not fit {type(model).__name__}: {'; '.join(parts)}")
    wrong = [name for name, tensor in state.items() if name in own and tensor.shape != own[name].shape]
    if wrong:
        first = wrong[0]
        hint = "\nload with head=True to start the head afresh" if set(wrong) <= _head_names(model) else ""
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {_count('of another shape', wrong)}; {first} is "
            f"{list(state[first].shape)} in the file, {list(own[first].shape)} in the model{hint}"
        )
    model.load_state_dict(state, strict=False)
    return [name for name in own if name not in state and name not in optional]


def _count(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _head_names(model: nn.Module) -> set[str]:
    """State names of the classification head; none if the model has no head."""
    try:
        name, module = head_of(model)
    except UserError:
        return set()
    return {f"{name}.{key}" if name else key for key in module.state_dict()}


def head_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Find the classification head: its dotted name and the module that makes the logits.

    In this order: what the model itself says (``get_classifier()``, as timm models do), an attribute called linear,
    head, fc, classifier or logits (the last linear layer in it, if it has several), the last linear layer of all.

    Raises:
        UserError: for a denoiser, or if there is no linear layer.
    """
    if hasattr(model, "time_input"):
        raise UserError(f"{type(model).__name__} is a denoiser: it has no classification head")
    names = {module: name for name, module in model.named_modules()}
    says: Any = getattr(model, "get_classifier", None)
    found = says() if callable(says) else None
    if isinstance(found, nn.Module) and found in names and _is_head(found):
        return names[found], found
    for part in (*(getattr(model, name, None) for name in HEAD_NAMES), model):
        heads = [module for module in part.modules() if _is_head(module)] if isinstance(part, nn.Module) else []
        if heads:
            return names[heads[-1]], heads[-1]
    raise UserError(f"{type(model).__name__} has no linear layer that could be its classification head")


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def replace_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Put a fresh head with `num_classes` outputs in place of the model's, in place, and return it.

    It has the old one's kind, inputs, bias, device and dtype, and torch's default initialisation. An attribute
    ``num_classes`` of the model follows.

    Raises:
        UserError: `num_classes` is below 1, or see `head_of`.
    """
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes} is out of range; allowed is [1, inf]")
    name, head = head_of(model)
    old: Any = head
    new: nn.Module
    if isinstance(head, nn.Conv2d):
        new = nn.Conv2d(head.in_channels, num_classes, 1, bias=head.bias is not None)
    else:
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    new = new.to(device=old.weight.device, dtype=old.weight.dtype)
    parent, _, last = name.rpartition(".")
    if not last:
        raise UserError(f"{type(model).__name__} is itself the head; wrap it in a Sequential to replace it")
    setattr(model.get_submodule(parent), last, new)
    if hasattr(model, "num_classes"):
        setattr(model, "num_classes", num_classes)  # noqa: B010 (Module's __setattr__ is typed for tensors)
    return new
