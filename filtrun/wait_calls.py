"""The calls of torch that say where a tensor is made or moved, or read it as memory of the host; for `filtrun.waits`.

Each has the arguments (watch, mode, function, its arguments, its named ones) and does the call.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from filtrun.wait_rules import DEVICE, HOST, storage_of, tensors_in

if TYPE_CHECKING:
    from filtrun.waits import Watch


class Functions(TorchFunctionMode):
    """Sees calls with Python's arguments: where tensors are made and moved, and what reads them as host memory."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, watch = kwargs or {}, self.watch
        special = _SPECIAL.get(func)
        if special is not None:
            return special(watch, self, func, args, kwargs)
        if kwargs.get("generator") is not None:
            _check_generator(watch, func, args, kwargs)
        if isinstance(func, types.FunctionType):
            return _hidden(watch, func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not tensors_in((args, kwargs)):
            device = kwargs.get("device")  # torch's core does not tell apart what it makes for itself on the CPU
            watch.put(out, device is not None and torch.device(device).index == DEVICE.index)
        return out


def _device_of(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    return DEVICE if watch.on_device(args[0]) else HOST


def _move(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """``to`` and ``cpu``: a copy where the place changes, and only there."""
    tensor, *rest = args
    before = watch.on_device(tensor)
    target: Any = HOST if func is torch.Tensor.cpu else kwargs.get("device")
    if func is torch.Tensor.to and rest:
        target = rest[0] if not isinstance(rest[0], torch.dtype) else target
    if isinstance(target, Tensor):
        after = bool(watch.on_device(target))
        rest, kwargs = [target.dtype, *rest[1:]], {k: v for k, v in kwargs.items() if k != "device"}
    elif target is None or _within_torch(target):
        return func(*args, **kwargs)
    else:
        device = torch.device(target)
        after = device.index == DEVICE.index
        if func is torch.Tensor.to:
            rest = [HOST, *rest[1:]] if rest and not isinstance(rest[0], torch.dtype) else rest
            kwargs = {**kwargs, **({"device": HOST} if "device" in kwargs else {})}
    if before is not None and before != after and (before or not _non_blocking(func, rest, kwargs)):
        watch.note("waits", f"copy to the {'device' if after else 'host'}")
    out = func(tensor, *rest, **kwargs)
    if before != after:
        out = out.clone() if storage_of(out) is storage_of(tensor) else out
        watch.put(out, after)
    return out


def _within_torch(target: Any) -> bool:
    """Whether torch's own code asks for the CPU: it has that from tensors, whose place its core does not know."""
    return target == HOST and sys._getframe(3).f_globals.get("__name__", "").startswith("torch.")


def _non_blocking(func: Any, rest: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    flags = [value for value in rest if isinstance(value, bool)]
    return bool(kwargs.get("non_blocking") or (flags and flags[0]))


def _from_host(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.tensor`` and the like: made on the host, then copied where `device` says."""
    source, device = args[0], kwargs.get("device")
    out = func(*args, **kwargs)
    if device is None:
        inside = isinstance(source, Tensor) and watch.on_device(source)
    else:
        inside = torch.device(device).index == DEVICE.index
    if isinstance(source, Tensor) and watch.on_device(source) is not None:
        if bool(watch.on_device(source)) != bool(inside):
            watch.note("waits", f"copy to the {'device' if inside else 'host'}")
            out = out.clone() if storage_of(out) is storage_of(source) else out
    elif inside:
        watch.note("waits", f"{func.__name__} of values of the host")
    watch.put(out, bool(inside))
    return out


def _new_tensor(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    device = kwargs.get("device")
    inside = watch.on_device(args[0]) if device is None else torch.device(device).index == DEVICE.index
    if inside:
        watch.note("waits", "new_tensor of values of the host")
    watch.put(out, inside)
    return out


def _as_memory(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    if watch.on_device(args[0]):
        watch.note("reads", func.__name__)
    return func(*args, **kwargs)


def _as_list(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    if watch.on_device(args[0]):
        watch.note("waits", "tolist")
    return func(*args, **kwargs)


def _deep_copy(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)  # copies a storage out of the sight of both modes
    watch.put(out, watch.on_device(args[0]))
    return out


def _set_item(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    watch._fills = not isinstance(args[2], Tensor)  # a number is written by a kernel
    try:
        return func(*args, **kwargs)
    finally:
        watch._fills = False


def _backward(watch: Watch, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """With the mode on, so that what a custom function does in its backward is seen: torch's own goes in without it."""
    if len(args) > 1 or any(kwargs.values()):
        return _hidden(watch, func, args, kwargs)
    with mode:
        ones = torch.ones_like(args[0])
        torch.autograd.Variable._execution_engine.run_backward(
            (args[0],), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    return None


def _hidden(watch: Watch, func: Any, args: Any, kwargs: Any) -> Any:
    """A call of torch's Python code, in which the function mode is off."""
    watch.hidden += 1
    try:
        return func(*args, **kwargs)
    finally:
        watch.hidden -= 1


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _device_of,  # type: ignore[attr-defined]
    torch.Tensor.to: _move,
    torch.Tensor.cpu: _move,
    torch.tensor: _from_host,
    torch.as_tensor: _from_host,
    torch.asarray: _from_host,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.numpy: _as_memory,
    torch.Tensor.__array__: _as_memory,
    torch.Tensor.tolist: _as_list,
    torch.Tensor.__deepcopy__: _deep_copy,
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.backward: _backward,
}


def generator_class(plain: type) -> type:
    class Generator(plain):  # type: ignore[misc, valid-type]
        """A generator that knows whether it is the device's."""

        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, device)
            made._asked = torch.device(device)
            return made

        @property
        def device(self) -> torch.device:
            return DEVICE if self._asked.index == DEVICE.index else HOST

    return Generator


def _check_generator(watch: Watch, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Draws must be made where their generator lies."""
    device = kwargs.get("device")
    if device is not None:
        inside: bool | None = torch.device(device).index == DEVICE.index
    else:
        inside = watch.on_device(args[0]) if args and isinstance(args[0], Tensor) else False
    if inside is not None and inside != (kwargs["generator"].device.index == DEVICE.index):
        watch.note("mixes", f"{func.__name__} with a generator of the other")
