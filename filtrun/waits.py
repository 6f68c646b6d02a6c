"""Where a step would wait for a GPU, found on a CPU: a rehearsal in which every tensor knows where it would lie.

The device that stands for the GPU is `DEVICE`, the CPU under an index. What is made there, moved there or computed from
such tensors lies there; what is made without a device, or on ``torch.device("cpu")``, lies on the host. All arithmetic
is the CPU's, so numbers are what they are without.

>>> with Watch() as watch:  # doctest: +SKIP
...     x = model.to(DEVICE)(images.to(DEVICE))
...     x.mean().item()
>>> print(*watch.events, sep="\\n")  # doctest: +SKIP
my_package.my_module:12 main: item waits for the device (step 0)

What other threads do is not seen, and branches for CUDA tensors alone (``is_cuda``) are not taken.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from filtrun.wait_calls import Functions, generator_class
from filtrun.wait_rules import COPIES, DEVICE, HOST, READS, mixable, reads_mask, storage_of, tensors_in

__all__ = ["DEVICE", "HOST", "Event", "Watch"]


@dataclass(frozen=True)
class Event:
    """One thing that a GPU would not do as the CPU does.

    `kind`: ``waits``, the host waits for the device; ``mixes``, an operation has tensors of both, an error on CUDA;
    ``reads``, a device tensor is read as memory of the host (``numpy``), an error too. `function` in line `line` of
    `module` is the code outside torch that did it; `step` what the watch's `step` was.
    """

    kind: str
    operation: str
    module: str
    line: int
    function: str
    step: int

    @property
    def place(self) -> str:
        """``module:line function``."""
        return f"{self.module}:{self.line} {self.function}"

    def __str__(self) -> str:
        told = {"waits": "waits for the device", "mixes": "mixes devices", "reads": "reads a device tensor as host's"}
        return f"{self.place}: {self.operation} {told[self.kind]} (step {self.step})"


class Watch:
    """Context manager that notes an `Event` for each wait inside it, and for each operation that mixes devices.

    Attributes:
        events: what was seen, in order.
        step: set it to whatever the events should say they belong to.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.step = 0
        self._modes: tuple[Functions, _Operations] = Functions(self), _Operations(self)
        self._fills = False
        self.hidden = 0  # depth of calls in which nobody sees what devices Python asks for

    def __enter__(self) -> Watch:
        self._generator, torch.Generator = torch.Generator, generator_class(torch.Generator)  # type: ignore[misc, assignment]
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        torch.Generator = self._generator  # type: ignore[misc, assignment]

    # -- where tensors lie ---------------------------------------------------------------------------------------------
    def on_device(self, tensor: Tensor) -> bool | None:
        """Whether a tensor lies on the device; None where it was made out of sight."""
        return getattr(storage_of(tensor), "filtrun_on_device", None)

    def put(self, tensor: Tensor, device: bool | None) -> None:
        """Say where a tensor (and all that shares its memory) lies."""
        storage = storage_of(tensor)
        if storage is not None:
            storage.filtrun_on_device = device

    def note(self, kind: str, operation: str) -> None:
        """Add an event at the line of code that runs now."""
        self.events.append(Event(kind, operation, *_caller(), self.step))

    # -- what torch does -----------------------------------------------------------------------------------------------
    def did(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Note what one operation of torch's core means on a GPU, and where its results lie."""
        name = func._schema.name.removeprefix("aten::")
        tensors = tensors_in((args, kwargs))
        places = [self.on_device(t) for t in tensors]
        if True in places:
            self._judge(name, func._overloadname, args, kwargs, tensors, places)
        known = (
            {id(storage_of(t)) for t in tensors} if name != "lift_fresh" else set()
        )  # Python's values become a tensor
        device = self._result_place(name, kwargs, tensors, places)
        for made in tensors_in(out):
            if id(storage_of(made)) not in known:
                self.put(made, device)

    def _judge(
        self,
        name: str,
        overload: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        places: list[Any],
    ) -> None:
        told = {"_local_scalar_dense": "item"}.get(name, name)
        whole = {place for t, place in zip(tensors, places, strict=True) if t.ndim and place is not None}
        if name in READS or f"{name}.{overload}" in READS:
            self.note("waits", told)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices, inside = [t for t in args[1] if t is not None], self.on_device(args[0])
            values = [t for t in args[2:3] if t.ndim]
            if reads_mask(name, indices, args):
                self.note("waits", f"{name} with a mask")
            elif inside and any(self.on_device(t) is False for t in indices):
                self.note("waits", f"{name} with indices of the host")
            elif inside is False or (inside and any(self.on_device(t) is False for t in values)):
                self.note("mixes", name)
        elif name in COPIES:
            if False in places and not self._fills and not COPIES[name](args, kwargs):
                self.note("waits", f"{name} between host and device")
        elif whole == {True, False} and not self.hidden and not mixable(name):
            self.note("mixes", name)

    def _result_place(self, name: str, kwargs: dict[str, Any], tensors: list[Tensor], places: list[Any]) -> bool | None:
        device = kwargs.get("device")
        if name == "lift_fresh":
            return None if self.hidden else False
        if device is None and tensors:
            whole = [place for t, place in zip(tensors, places, strict=True) if t.ndim] or places
            return True if True in whole else None if None in whole else (True if True in places else False)
        return True if device is not None and device.index == DEVICE.index else None


class _Operations(TorchDispatchMode):
    """Sees every operation of torch's core, those of the backward pass too."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.watch.did(func, args, kwargs, out)
        return out


_BETWEEN = sys.stdlib_module_names | {"torch", "numpy", "lightning_fabric", "lightning_utilities"}
"""Packages that only pass on what somebody else asked for."""


def _caller() -> tuple[str, int, str]:
    """(module, line, function) of the innermost code that is neither this module's nor of such a package."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _passes_on(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame.f_globals.get("__name__", ""), frame.f_lineno, frame.f_code.co_qualname


def _passes_on(module: str) -> bool:
    return module in (__name__, Functions.__module__) or module.partition(".")[0] in _BETWEEN - {"__main__"}
