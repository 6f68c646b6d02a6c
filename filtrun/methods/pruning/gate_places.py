"""Where per-sample gates go: one forward pass of a model, watched, gives its conv + norm + activation units and says
which gates decide whether a channel of a layer's input can be anything but zero.

Calls of functions are seen too, so activations and sums need not be modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
KEEPING = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "dropout", "dropout2d", "clone",
           "contiguous", "__getitem__", "interpolate", "to", "float"}  # fmt: skip
RECTIFIERS = {"relu": "relu", "relu_": "relu", "relu6": "relu6", "silu": "silu", "gelu": "gelu",
              "hardswish": "hardswish"}  # fmt: skip


@dataclass
class Unit:
    """A convolution, its norm and what comes next; `gated` is the module behind which its gate acts.

    `positions` counts the pixels of its output in the forward that was watched."""

    name: str
    conv: nn.Conv2d
    gated: nn.Module
    activation: str
    input_node: int
    node: int
    positions: int


@dataclass
class Flow:
    """How channels run through a model: a list of nodes in the order they were computed.

    A node is ``("all", C)``, ``("same", node)``, ``("sum", a, b)``, ``("pad", node, before, after)``,
    ``("cat", nodes)`` or ``("gate", unit)``.
    """

    nodes: list[tuple[Any, ...]] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)

    def needed(self, wanted: Sequence[int]) -> list[int]:
        """The nodes that `wanted` depend on, in order."""
        found, stack = set(), list(wanted)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += self._parents(node)
        return sorted(found)

    def _parents(self, node: int) -> list[int]:
        kind, *rest = self.nodes[node]
        if kind == "cat":
            return list(rest[0])
        return [] if kind in ("all", "gate") else rest[: 2 if kind == "sum" else 1]

    def alive(self, keeps: Sequence[Tensor], nodes: Sequence[int]) -> dict[int, Tensor]:
        """Node -> (N, C) bool: channels that may differ from zero, by the gates' `keeps` (N, C)."""
        found: dict[int, Tensor] = {}
        for node in nodes:
            kind, *rest = self.nodes[node]
            if kind == "gate":
                found[node] = keeps[rest[0]]
            elif kind == "all":
                found[node] = keeps[0].new_ones(len(keeps[0]), rest[0])
            elif kind == "same":
                found[node] = found[rest[0]]
            elif kind == "sum":
                found[node] = found[rest[0]] | found[rest[1]]
            elif kind == "cat":
                found[node] = torch.cat([found[n] for n in rest[0]], 1)
            else:
                found[node] = torch.nn.functional.pad(found[rest[0]], (rest[1], rest[2]))
        return found


class _Watch(TorchFunctionMode):
    """Notes, for every tensor of four dimensions, the node that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self.node_of: dict[int, int] = {}
        self.alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self.acts: dict[int, tuple[int, str]] = {}  # first activation that reads a node
        self.sums: dict[int, int] = {}  # sum that reads a node

    def add(self, tensor: Tensor, node: tuple[Any, ...]) -> int:
        self.flow.nodes.append(node)
        self.flow.channels.append(tensor.shape[1])
        self.alive.append(tensor)
        self.node_of[id(tensor)] = len(self.flow.nodes) - 1
        return len(self.flow.nodes) - 1

    def node(self, tensor: Tensor) -> int:
        found = self.node_of.get(id(tensor))
        return self.add(tensor, ("all", tensor.shape[1])) if found is None else found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        options = dict(kwargs or {})
        before = [self.node(a) if _is_map(a) else None for a in args]
        joined = [self.node(a) for a in args[0]] if name in ("cat", "concat") and all(map(_is_map, args[0])) else None
        out = func(*args, **options)
        if not _is_map(out) or name in ("__get__", "detach"):
            return out
        kind = RECTIFIERS.get(name)
        if name in ("hardtanh", "hardtanh_"):
            low, high = (options.get(k, args[i] if len(args) > i else d) for i, k, d in
                         ((1, "min_val", -1.0), (2, "max_val", 1.0)))  # fmt: skip
            kind = "relu6" if (low, high) == (0, 6) else None
        first = before[0] if before else None
        same_width = first is not None and self.flow.channels[first] == out.shape[1]
        if joined is not None and (args[1] if len(args) > 1 else options.get("dim", 0)) in (1, -3):
            self.add(out, ("cat", tuple(joined)))
        elif kind is not None and first is not None:
            self.acts.setdefault(first, (self.add(out, ("same", first)), kind))
        elif name in SUMS and len(before) > 1 and first is not None and before[1] is not None and (
            args[0].shape == args[1].shape
        ):  # fmt: skip
            summed = self.add(out, ("sum", first, before[1]))
            for part in (first, before[1]):
                self.sums.setdefault(part, summed)
        elif name == "pad" and first is not None and _plain_pad(args, options):
            sides = [*(args[1] if len(args) > 1 else options["pad"]), 0, 0, 0, 0][4:6]
            self.add(out, ("pad", first, *sides))
        elif name in KEEPING and same_width and (name != "__getitem__" or _keeps_channels(args[1])):
            self.add(out, ("same", first))
        else:
            self.add(out, ("all", out.shape[1]))
        return out


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _keeps_channels(index: Any) -> bool:
    return isinstance(index, tuple) and len(index) == 4 and all(i == slice(None) for i in index[:2])


def _plain_pad(args: Any, options: Mapping[str, Any]) -> bool:
    sides = args[1] if len(args) > 1 else options.get("pad", [])
    mode = args[2] if len(args) > 2 else options.get("mode", "constant")
    value = args[3] if len(args) > 3 else options.get("value")
    return mode == "constant" and not value and len(sides) <= 6 and min([0, *sides[4:]]) >= 0


def find_units(model: nn.Module, forward: Callable[[], Any], after_block: bool = False) -> tuple[list[Unit], Flow]:
    """The units of `model` that `forward` runs through, in that order, and how their channels flow.

    A unit is a plain convolution whose output goes into a batch norm, both used once. Its activation is what reads the
    norm's output; where nothing does, it is the identity. The projection of a shortcut (its input is another
    convolution's too, and it has no activation) is left alone.

    Args:
        after_block: a norm whose output is added to a shortcut and then activated is gated behind that activation.
    """
    convs: dict[int, tuple[str, nn.Conv2d, int]] = {}
    norms: list[tuple[nn.Module, int, int, int]] = []
    returned: dict[int, list[nn.Module]] = {}
    uses: dict[nn.Module, int] = {}
    readers: dict[int, int] = {}
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch()
    opened: list[tuple[nn.Module, list[int]]] = []

    def enter(module: nn.Module, args: Any) -> None:
        opened.append((module, [watch.node(a) for a in args if _is_map(a)]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        _, read = opened.pop()
        uses[module] = uses.get(module, 0) + 1
        if not _is_map(output):
            return
        node = watch.node(output)
        returned.setdefault(node, []).append(module)
        if isinstance(module, nn.Conv2d) and read:
            convs[node] = (names[module], module, read[0])
            readers[read[0]] = readers.get(read[0], 0) + 1
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and read:
            norms.append((module, read[0], node, output.shape[2] * output.shape[3]))

    hooks = [m.register_forward_pre_hook(enter) for m in model.modules()]
    hooks += [m.register_forward_hook(leave) for m in model.modules()]
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), watch:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    units: list[Unit] = []
    flow = watch.flow
    for norm, source, node, size in norms:
        if source not in convs:
            continue
        name, conv, read = convs[source]
        if uses[norm] > 1 or uses[conv] > 1:
            continue
        act = watch.acts.get(node)
        if act is None and node in watch.sums and readers[read] > 1:
            continue
        unit = Unit(name, conv, norm, act[1] if act else "identity", read, node, size)
        later = watch.acts.get(watch.sums.get(node, -1))
        if after_block and act is None and later is not None:
            places = [m for m in returned.get(later[0], []) if uses[m] == 1]
            if places:  # the module gives out the activated sum: the target sees it as it is
                unit = Unit(name, conv, places[0], "identity", read, later[0], size)
        flow.nodes[unit.node] = ("gate", len(units))
        units.append(unit)
    return units, flow
