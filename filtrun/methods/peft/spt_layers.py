"""What SPT puts into a model: changes of single entries, and low-rank modules beside or behind a layer.

Follows ``model/vision_transformer_timm.py`` of ziplab/SPT (He et al., ICCV 2023, arXiv 2303.08566).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.methods.peft.branches import drop_path, on_rows
from filtrun.surgery import plain_type


def sparse_product(x: Tensor, delta: Tensor, rows: Tensor, cols: Tensor, place: Tensor) -> Tensor:
    """x D^T for the rows of a matrix D that has entries only where rows and columns of a few cross.

    The backward pass keeps the needed input features only, and never forms the gradient of the whole matrix.

    Args:
        x: (..., in).
        delta: (k,) the entries.
        rows, cols: the rows (R,) and columns (C,) that have any.
        place: (k,) position of each entry in the flattened (R, C).

    Returns:
        (..., R).
    """
    small = torch.zeros(len(rows) * len(cols), dtype=delta.dtype, device=delta.device)
    small = small.index_put((place,), delta).view(len(rows), len(cols))
    return F.linear(x[..., cols], small)


def crossings(index: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, cols, place) of `sparse_product` for flat positions `index` (k,) in a matrix with `columns` columns."""
    rows, row = torch.unique(index // columns, return_inverse=True)
    cols, col = torch.unique(index % columns, return_inverse=True)
    return rows, cols, row * len(cols) + col


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Tensor,
    bias_delta: Tensor | None = None, bias_index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (W + D)^T + b + d: a linear layer of which only the entries D (at `index` of the flattened W) and d train.

    Args:
        x: (..., in); weight: (out, in); bias: (out,) or None; delta and index: (k,); bias_delta and bias_index: (m,).

    Returns:
        (..., out).
    """
    rows, cols, place = crossings(index, weight.shape[1])
    y = F.linear(x, weight, bias).index_add(-1, rows, sparse_product(x, delta, rows, cols, place))
    if bias_delta is not None and bias_index is not None:
        y = y + torch.zeros(y.shape[-1], dtype=y.dtype, device=y.device).index_add(0, bias_index, bias_delta)
    return y


class SparseLinear(nn.Module):
    """Trained changes of single entries of an ``nn.Linear``, zero at the start; acts behind the layer."""

    index: Tensor
    rows: Tensor
    cols: Tensor
    place: Tensor
    bias_index: Tensor

    def __init__(self, layer: nn.Linear, index: Tensor | None, bias_index: Tensor | None) -> None:
        super().__init__()
        like = layer.weight if layer.weight.is_floating_point() else torch.empty(0)
        none = torch.empty(0, dtype=torch.int64, device=like.device)
        index, bias_index = none if index is None else index, none if bias_index is None else bias_index
        for name, value in zip(("rows", "cols", "place"), crossings(index, layer.in_features), strict=True):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("bias_index", bias_index, persistent=False)
        self.delta = nn.Parameter(like.new_zeros(len(index))) if len(index) else None
        self.bias_delta = nn.Parameter(like.new_zeros(len(bias_index))) if len(bias_index) else None

    def behind(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The layer's output with changed entries."""
        if self.delta is not None:
            added = sparse_product(inputs[0], self.delta, self.rows, self.cols, self.place)
            output = output.index_add(-1, self.rows, added.to(output.dtype))
        if self.bias_delta is not None:
            full = torch.zeros(output.shape[-1], dtype=self.bias_delta.dtype, device=output.device)
            output = output + full.index_add(0, self.bias_index, self.bias_delta).to(output.dtype)
        return output

    def changes(self) -> list[tuple[str, Tensor, Tensor]]:
        """(tensor of the layer, flat positions, what is added there)."""
        pairs = (("weight", self.index, self.delta), ("bias", self.bias_index, self.bias_delta))
        return [(name, index, delta) for name, index, delta in pairs if delta is not None]


class SparseTensor(nn.Module):
    """Trained changes of single entries of any tensor, zero at the start; acts on what the layer sees of it."""

    index: Tensor

    def __init__(self, tensor: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.delta = nn.Parameter(tensor.new_zeros(len(index)))

    def forward(self, tensor: Tensor) -> Tensor:
        with torch.autocast(tensor.device.type, enabled=False):
            return tensor.flatten().index_add(0, self.index, self.delta).view_as(tensor)


class Structured(nn.Module):
    """A low-rank module of a layer: LoRA beside it, or a bottleneck with GELU behind it.

    LoRA adds up(down(dropout(x))) to the outputs `start` to `stop`; an adapter h + up(gelu(down(dropout(h)))) changes
    the layer's output h there, or with `parallel` adds up(gelu(down(dropout(x)))), as the official code does for the
    projection of attention. `path` is the rate of stochastic depth on the branch. `up` is zero at the start.
    """

    def __init__(
        self, layer: Any, kind: str, rank: int, start: int, stop: int, dropout: float, path: float,
        parallel: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.start, self.stop, self.dropout, self.path = kind, start, stop, dropout, path
        self.parallel = parallel or kind == "lora"
        outputs, bias = stop - start, kind == "adapter"
        self.linear = isinstance(layer, nn.Linear)
        if self.linear:
            inputs = layer.in_features if self.parallel else outputs
            self.down: nn.Module = nn.Linear(inputs, rank, bias=bias)
            self.up: nn.Module = nn.Linear(rank, outputs, bias=bias)
        else:
            conv: Any = plain_type(layer)
            same = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            if self.parallel:
                mode = layer.padding_mode
                self.down = conv(layer.in_channels, rank, layer.kernel_size, bias=False, padding_mode=mode, **same)
            else:
                self.down = conv(outputs, rank, 1, bias=bias)
            self.up = conv(rank, outputs, 1, bias=bias)
        down, up = self.down, self.up
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # type: ignore[arg-type]
        nn.init.zeros_(up.weight)  # type: ignore[arg-type]
        if bias:
            nn.init.zeros_(up.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.dropout(x, self.dropout, self.training))
        return drop_path(self.up(F.gelu(h) if self.kind == "adapter" else h), self.path, self.training)

    def behind(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The layer's output with the branch added."""
        if not self.linear:
            return output + self(inputs[0] if self.parallel else output)
        read = (lambda part: inputs[0]) if self.parallel else (lambda part: part)
        return on_rows(output, self.start, self.stop, lambda part: part + self(read(part)))

    def delta(self) -> Tensor:
        """What LoRA adds to its rows of the weight, as a matrix (rows, columns), in double precision."""
        up: Any = self.up.weight
        down: Any = self.down.weight
        return up.double().flatten(1) @ down.double().flatten(1)
