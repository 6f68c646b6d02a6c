"""Read the pickles of the official CIFAR python version without running any code they may hold.

A pickle may name any importable function and have it called. Here the only names that resolve are NumPy's array
constructors, and they resolve to the small classes below, which take raw bytes and a plain number type; anything else
ends the reading.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from filtrun.errors import UserError

_PLAIN = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"} | {"b1"}


class _Refused(Exception):
    """The pickle asks for something that a batch of images does not need."""


class _DType:
    """Stands for numpy.dtype: a number type by code, byte order from the state."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        code = code.decode("ascii", "replace") if isinstance(code, bytes) else code
        if code not in _PLAIN:
            raise _Refused(f"array type {str(code)[:20]!r} is not a plain number")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.order = order if order in ("<", ">") else "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for the empty array that NumPy's pickles make first and fill with their state."""

    value: np.ndarray | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran, raw = state[-4:]
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray)):
        raise _Refused("array without raw bytes or number type")
    return np.frombuffer(bytes(raw), dtype.numpy()).reshape(shape, order="F" if order in ("F", b"F") else "C")


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, ()).item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes into old pickle protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
        raise _Refused(f"encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): bytes,
    ("__builtin__", "bytes"): bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"it asks for {module}.{name}, which no image batch needs") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("it refers to outside objects")


def read_pickle(blob: bytes, where: str) -> dict[str, Any]:
    """The dictionary in `blob`: str keys; values numbers, strings, bytes, lists, dicts and NumPy arrays.

    Raises:
        UserError: the pickle asks for anything else, is cut off, or holds no dictionary; `where` names the file.
    """
    try:
        loaded = _Restricted(io.BytesIO(blob), encoding="bytes").load()
    except _Refused as error:
        raise UserError(f"{where}: refused as a pickle of images: {error}") from error
    except Exception as error:  # a broken pickle can fail in any opcode, with any error
        raise UserError(f"{where}: truncated or corrupt pickle ({type(error).__name__})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{where}: a pickle of {type(loaded).__name__}, not of an image batch")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value.value
        if isinstance(value, _Array)
        else value
        for key, value in loaded.items()
    }
