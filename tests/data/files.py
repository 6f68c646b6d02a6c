"""Write random image sets in every layout the readers accept."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def arrays(shape=(3, 32, 32), train=50, test=20, classes=10, seed=0):
    """{"train": (images uint8 (N, C, H, W), labels int64), "test": ...}; the labels cycle through the classes."""
    rng = np.random.default_rng(seed)
    return {
        part: (rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % classes)
        for part, n in (("train", train), ("test", test))
    }


def old_pickle(batch: dict, protocol: int = 2) -> bytes:
    return pickle.dumps(batch, protocol=protocol)


class _Python2Pickler(pickle._Pickler):
    """Writes what Python 2 with an old NumPy wrote, as the official files were: byte strings, numpy.core."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, obj):
        blob = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack("<i", len(blob)) + blob)
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_bytes


def python2_pickle(batch: dict) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(batch)
    return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def python_files(sets, key="labels", protocol=2) -> dict[str, bytes]:
    images, labels = sets["train"]
    rows = images.reshape(len(images), -1)
    files = {}
    for i, part in enumerate(np.array_split(np.arange(len(rows)), 5), start=1):
        files[f"data_batch_{i}"] = old_pickle({b"data": rows[part], key.encode(): labels[part].tolist()}, protocol)
    images, labels = sets["test"]
    files["test_batch"] = old_pickle({"data": images.reshape(len(images), -1), key: labels.tolist()}, protocol)
    return files


def python100_files(sets) -> dict[str, bytes]:
    return {
        part: old_pickle({"data": x.reshape(len(x), -1), "fine_labels": y.tolist(), "coarse_labels": (y // 5).tolist()})
        for part, (x, y) in sets.items()
    }


def binary_files(sets) -> dict[str, bytes]:
    def records(images, labels):
        return np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], 1).tobytes()

    images, labels = sets["train"]
    files = {
        f"data_batch_{i}.bin": records(images[part], labels[part])
        for i, part in enumerate(np.array_split(np.arange(len(images)), 5), start=1)
    }
    return files | {"test_batch.bin": records(*sets["test"])}


def binary100_files(sets) -> dict[str, bytes]:
    return {
        f"{part}.bin": np.concatenate(
            [(y // 5)[:, None].astype(np.uint8), y[:, None].astype(np.uint8), x.reshape(len(x), -1)], 1
        ).tobytes()
        for part, (x, y) in sets.items()
    }


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files(sets, zipped=False) -> dict[str, bytes]:
    files = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        images, labels = sets[part]
        files[f"{name}-images-idx3-ubyte"] = idx(images[:, 0])
        files[f"{name}-labels-idx1-ubyte"] = idx(labels)
    return {f"{name}.gz": gzip.compress(blob) for name, blob in files.items()} if zipped else files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in files.items():
        (folder / name).write_bytes(blob)
    return folder


def write_tar(path: Path, folder: str, files: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, blob in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
        for info in extra or []:
            tar.addfile(info)
    return path


def image(pixels: np.ndarray) -> Image.Image:
    """uint8 (C, H, W) -> a grey or RGB picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def write_tree(folder: Path, images: np.ndarray, labels: np.ndarray, names) -> Path:
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names[label] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(pixels).save(path)
    return folder
