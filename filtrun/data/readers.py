"""One function for each file format: bytes in, checked arrays out (uint8 (N, C, H, W) images, int64 (N,) labels)."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np

from filtrun.data.images import decode_all, image_files, readable, subfolders
from filtrun.data.unpickle import read_pickle
from filtrun.errors import UserError, closest

Shape = tuple[int, int, int]
_MOST = 10_000_000  # images in one idx file; a larger count comes from a broken header


def from_python(blob: bytes, where: str, shape: Shape, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """An official CIFAR python batch: a pickled dict with ``data`` uint8 (N, C*H*W) and a list of labels.

    Source of the format: https://www.cs.toronto.edu/~kriz/cifar.html
    """
    batch = read_pickle(blob, where)
    data, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != np.prod(shape):
        raise UserError(f"{where}: 'data' is not an array of 8-bit rows of {int(np.prod(shape))} values")
    labels = np.asarray(labels) if isinstance(labels, (list, np.ndarray)) else None
    if labels is None or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}: {label_key!r} is not a list of class ids")
    if len(labels) != len(data):
        raise UserError(f"{where} has {len(data)} images but {len(labels)} labels")
    return data.reshape(-1, *shape), labels.astype(np.int64)


def from_binary(blob: bytes, where: str, shape: Shape, label_bytes: int, label: int) -> tuple[np.ndarray, np.ndarray]:
    """An official CIFAR binary batch: records of `label_bytes` label bytes, then C*H*W pixel bytes.

    Source of the format: https://www.cs.toronto.edu/~kriz/cifar.html
    """
    record = label_bytes + int(np.prod(shape))
    if not blob or len(blob) % record:
        raise UserError(
            f"{where}: {len(blob)} bytes are no whole number of {record}-byte records; truncated or corrupt"
        )
    rows = np.frombuffer(blob, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, *shape), rows[:, label].astype(np.int64)


def from_idx(path: Path, dims: int) -> np.ndarray:
    """An idx file (.gz or not) of unsigned bytes with `dims` dimensions, as an array of that shape.

    Source of the format: http://yann.lecun.com/exdb/mnist/ (big-endian: magic 0x0800 + dims, sizes, bytes)
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with readable(path), cast("IO[bytes]", opener(path, "rb")) as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or struct.unpack(">I", head[:4])[0] != 0x0800 + dims:
                raise UserError(f"{path} is not an idx file of bytes with {dims} dimensions")
            sizes = struct.unpack(f">{dims}I", head[4:])
            if sizes[0] > _MOST or any(side > 4096 for side in sizes[1:]):
                raise UserError(f"{path}: corrupt header, sizes {sizes}")
            count = int(np.prod(sizes))
            body = file.read(count + 1)
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or corrupt ({error})") from error
    if len(body) != count:
        state = f"has {len(body)} of" if len(body) < count else "goes on after its"
        raise UserError(f"{path} {state} {count} bytes; truncated or corrupt")
    return np.frombuffer(body, np.uint8).reshape(sizes)


def from_npz(path: Path, shape: Shape) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """An npz with ``images`` and ``labels`` ("train") and, if there, ``test_images`` and ``test_labels`` ("test").

    Images are uint8 (N, H, W, C), or (N, H, W) for grey ones; labels are integers (N,) or (N, 1).
    """
    try:
        with readable(path), np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is not an npz file")
            keys = set(file.files)
            names = {"train": ("images", "labels"), "test": ("test_images", "test_labels")}
            parts = [part for part, pair in names.items() if part == "train" or keys & set(pair)]
            for key in (key for part in parts for key in names[part]):
                if key not in keys:
                    hint = closest(key, keys)
                    raise UserError(f"{path} has no array {key!r}, only {', '.join(sorted(keys)) or 'none'}{hint}")
            arrays = {part: (file[names[part][0]], file[names[part][1]]) for part in parts}
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, struct and NumPy all have their own
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is truncated, corrupt or not a plain npz ({reason})") from error
    return {part: _plain(*pair, f"{path} ({part})", shape) for part, pair in arrays.items()}


def _plain(images: np.ndarray, labels: np.ndarray, where: str, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4:
        form = "uint8 (N, H, W) or (N, H, W, C)"
        raise UserError(f"{where}: images must be {form}, not {images.dtype} {images.shape}")
    if images.shape[-1] != shape[0]:
        raise UserError(f"{where}: images have {images.shape[-1]} channels in the last place, not {shape[0]}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}: labels must be integers (N,), not {labels.dtype} {labels.shape}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64)


def from_tree(folder: Path, shape: Shape, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Image files in ``folder/CLASS/``, where CLASS is a class name or its number; by class, then by file name."""
    with readable(folder):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing; the tree needs train/CLASS/ and test/CLASS/ with image files")
    ids = _class_ids(folder, classes)
    paths, labels = [], []
    for name, c in sorted(ids.items(), key=lambda item: item[1]):
        files = image_files(folder / name)
        paths += files
        labels += [c] * len(files)
    images = decode_all(paths, *shape, convert=False).numpy()
    return images, np.asarray(labels, np.int64)


def _class_ids(folder: Path, classes: Sequence[str]) -> dict[str, int]:
    """The class id of each subfolder, by name (case and punctuation aside) or, if none is a name, by number."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    names = {plain(name): c for c, name in enumerate(classes)}
    found = subfolders(folder)
    if not found:
        raise UserError(f"{folder} has no class folders")
    ids: dict[str, int] = {}
    for name in found:
        c = names.get(plain(name))
        if c is None and name.isdecimal() and int(name) < len(classes):
            c = int(name)
        if c is None:
            raise UserError(f"{folder / name} is not a class name or number of this set{closest(name, classes)}")
        if c in ids.values():
            raise UserError(f"{folder} has two folders for class {c} ({classes[c]})")
        ids[name] = c
    return ids
