"""Nested state to and from safetensors: tensors into one file, the rest as JSON beside them; no pickle anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filtrun.errors import RunFailure, UserError

_TENSOR = "__tensor__"
_INT_KEYS = "__int_keys__"


def flatten(tree: Any, tensors: dict[str, Any], path: str = "") -> Any:
    """Replace every tensor in `tree` (dicts, lists, tuples, JSON values) by its name in `tensors`, which is filled.

    Raises TypeError for a value that is neither.
    """
    import torch

    if isinstance(tree, torch.Tensor):
        name = path or "value"
        tensors[name] = tree.detach().contiguous().cpu()
        return {_TENSOR: name}
    if isinstance(tree, Mapping):
        whole = {key: flatten(value, tensors, f"{path}/{_plain(key)}".lstrip("/")) for key, value in tree.items()}
        if whole and all(isinstance(key, int) for key in whole):  # JSON would turn them into strings
            return {_INT_KEYS: {str(key): value for key, value in whole.items()}}
        return whole
    if isinstance(tree, (list, tuple)):
        return [flatten(value, tensors, f"{path}/{i}" if path else str(i)) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"state at {path!r} is a {type(tree).__name__}, not a tensor or a JSON value")


def _plain(key: Any) -> str:
    return str(key).replace("%", "%25").replace("/", "%2F")  # {"a/b": x} and {"a": {"b": y}} are two tensors


def unflatten(tree: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of `flatten` (tuples come back as lists)."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _INT_KEYS in tree:
            return {int(key): unflatten(value, tensors) for key, value in tree[_INT_KEYS].items()}
        return {key: unflatten(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    return tree


def save_tree(path: Path, tree: Any, **metadata: str) -> None:
    """Write a nested state to one safetensors file, at once or not at all.

    Raises RunFailure when the disk is full or the folder cannot be written; an earlier file stays as it was.
    """
    write_packed(path, pack_tree(tree, **metadata))


def pack_tree(tree: Any, **metadata: str) -> tuple[dict[str, Any], str]:
    """(tensors by name, what goes with them as JSON): a copy of a nested state on the CPU, `write_packed`'s argument.

    What happens to the state afterwards does not reach it.
    """
    tensors: dict[str, Any] = {}
    # one key: several would be written in a random order, and equal runs should leave equal files
    packed = json.dumps({"tree": flatten(tree, tensors), **metadata}, sort_keys=True)
    return {name: t.clone() for name, t in tensors.items()}, packed  # safetensors refuses tensors that share memory


def write_packed(path: Path, packed: tuple[dict[str, Any], str]) -> None:
    """Write what `pack_tree` gave to one safetensors file, at once or not at all; RunFailure as in `save_tree`."""
    from safetensors.torch import save_file

    tensors, told = packed
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, str(work), metadata={"filtrun": told})
        os.chmod(work, 0o666 & ~umask())  # the library makes files that nobody else can read
        os.replace(work, path)
    except Exception as error:
        work.unlink(missing_ok=True)
        raise RunFailure(f"{path} could not be written: {error}") from error


def umask() -> int:
    """The permission bits this process leaves out of the files it makes."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def load_tree(path: Path) -> tuple[Any, dict[str, str]]:
    """Read what `save_tree` wrote: (state, metadata). Raises UserError for a file that is missing or no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            metadata = json.loads((stream.metadata() or {})["filtrun"])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
        return unflatten(metadata.pop("tree"), tensors), metadata
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is missing, cut short or no state of filtrun: {error}") from error
