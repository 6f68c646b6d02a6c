"""Groups of coupled channels, of torch-pruning's dependency graph: which layers make, normalise and read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from filtrun.errors import UserError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm,)
SEPARATE = (*LAYERS, *NORMS, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
"""Modules with tensors that treat every channel by itself, or sum over channels: zero in means as good as absent."""


def library() -> Any:
    """The torch-pruning package. Raises UserError when the extra is not installed."""
    try:
        import torch_pruning
    except ImportError as error:
        raise UserError("removing channels needs torch-pruning: pip install 'filtrun[pruning]'") from error
    return torch_pruning


@dataclass
class Part:
    """One layer's share in a group: its channels `index` (M,) are the group's channels `root` (M,).

    `inherits` marks a norm behind a depthwise convolution, whose channels are those of the layer before.
    """

    layer: str
    module: nn.Module
    side: str
    index: Tensor
    root: Tensor
    inherits: bool = False


@dataclass
class Group:
    """Channels that can only go together, in all layers that make, normalise or read them.

    Attributes:
        name: the layer whose outputs they are counted by.
        size: how many there are.
        parts: the layers; side ``out`` makes or normalises the channels, ``in`` reads them.
    """

    name: str
    size: int
    parts: list[Part]
    raw: Any = None

    @property
    def norms(self) -> list[Part]:
        """The batch norms with a scale among the parts."""
        return [p for p in self.parts if isinstance(p.module, NORMS) and p.module.weight is not None]

    def scales(self, part: Part) -> Tensor:
        """|gamma| (size,) of a batch norm of the group, in the group's order of channels; 0 where it has none."""
        gamma = torch.zeros(self.size)
        gamma[part.root] = part.module.weight.detach().abs().float().cpu()[part.index]  # type: ignore[union-attr, operator]
        return gamma


def group_of(raw: Any, graph: Any, names: Mapping[nn.Module, str]) -> Group | None:
    """A group of torch-pruning as ours; None when removing its channels would not equal zeroing them.

    Args:
        raw: the group.
        graph: torch-pruning's DependencyGraph it is of.
        names: module -> its name, of the traced model.
    """
    parts = []
    split = any(type(item.dep.target.module).__name__ in ("_SplitOp", "_UnbindOp") for item in raw)
    for item in raw:
        module, dep = item.dep.target.module, item.dep
        makes = graph.is_out_channel_pruning_fn(dep.handler)
        if isinstance(module, nn.Parameter) or (makes and not dep.target.outputs):
            return None  # a bare tensor over channels, or the model's output
        if module not in names:
            continue  # an operation without tensors
        if not isinstance(module, SEPARATE) and any(True for _ in module.parameters(recurse=False)):
            return None
        index, root = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        if makes and not split and isinstance(module, LAYERS) and len(index) != graph.get_out_channels(module):
            return None  # a shortcut joins different channel counts
        behind = any(depthwise(node.module) for node in dep.target.inputs)
        parts.append(Part(names[module], module, "out" if makes else "in", index, root, behind))
    return Group(parts[0].layer, len(raw[0].idxs), parts, raw)


def depthwise(module: Any) -> bool:
    """Whether a convolution treats every channel by itself."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def mixes_channels(module: nn.Module) -> bool:
    """Whether a module is attention, whose heads share channels in ways that no single one can leave."""
    return isinstance(module, nn.MultiheadAttention) or "attention" in type(module).__name__.lower()
