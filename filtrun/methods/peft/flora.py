"""FLoRA: Low-Rank Core Space for N-dimension (arXiv 2405.14739; official code SJTU-DeepVisionLab/FLoRA).

The change of an N-dimensional weight is a Tucker product, DeltaW = s G x_1 A^1 x_2 A^2 ... x_N A^N: a small core and
one thin factor for each dimension, so that a convolution's kernel keeps its four axes instead of being flattened into
a matrix. Core zero and factors Kaiming-normal at the start (a = sqrt 3); the product is added to the weight at the end.

Where this differs from the official code, on purpose: factors follow the shape of the weight, so grouped and depth-wise
convolutions work (there the input factor has the wrong size); merging exists (there it is a to-do); ranks are cut to
the size of their dimension. The scale s multiplies the product as it is: there is no division by the rank.

For a linear layer the product is A_out G^T A_in^T: LoRA with a square core between the two thin matrices.

Alone, on any model:

>>> flora = FLoRA(rank=16, targets="conv").attach(model)  # doctest: +SKIP
>>> ...                                                   # train the parameters that require a gradient
>>> flora.merge()                                         # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.options import check_options, opt
from filtrun.surgery import (
    CONVS,
    base_tensor,
    behaves,
    check_targets,
    check_trains,
    layers_of,
    pick,
    put_behind,
    put_into,
    take_off,
    take_out,
    write,
)

if TYPE_CHECKING:
    from filtrun.context import Run

KINDS: dict[str, tuple[type[nn.Module], ...]] = {"linear": (nn.Linear,), "conv": CONVS}
BESIDE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose product runs as a branch of its own; the others see a changed weight."""


def tucker_delta(core: Tensor, factors: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """The Tucker product with its first two axes exchanged, as a weight.

    Args:
        core: (r_1, ..., r_N), N of at least 2.
        factors: N matrices (dim_n, r_n), in the order input channels, output channels, kernel axes.
        scale: factor s of the product.

    Returns:
        (dim_2, dim_1, dim_3, ..., dim_N): output channels first.
    """
    delta = core
    for factor in factors:  # each turn takes the first axis and puts the new one last
        delta = torch.tensordot(delta, factor, dims=([0], [1]))
    return scale * delta.transpose(0, 1)


def ranks_for(shape: Sequence[int], rank: int, rank_out: int | None, kernel_rank: int) -> list[int]:
    """Ranks (r_1, ..., r_N) of a weight (out, in, kernel...), none above its dimension: in, out, kernel axes."""
    wanted = [rank, rank if rank_out is None else rank_out, *[kernel_rank] * (len(shape) - 2)]
    return [min(r, d) for r, d in zip(wanted, [shape[1], shape[0], *shape[2:]], strict=True)]


class TuckerUpdate(nn.Module):
    """Core and factors of one weight (out, in, kernel...); a branch beside its layer, or a change of what it sees."""

    def __init__(
        self, weight: Tensor, ranks: Sequence[int], scale: float, dropout: float, layer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.beside = (layer,)  # in a tuple: the layer is no part of this module
        dims = [weight.shape[1], weight.shape[0], *weight.shape[2:]]
        self.scale, self.dropout = scale, dropout
        self.core = nn.Parameter(weight.new_zeros(tuple(ranks)))
        made = [nn.Parameter(weight.new_empty(d, r)) for d, r in zip(dims, ranks, strict=True)]
        self.factors = nn.ParameterList(made)
        for factor in made:
            nn.init.kaiming_normal_(factor, a=math.sqrt(3))

    def delta(self, keep: Tensor | None = None) -> Tensor:
        """The product, shaped as the weight; `keep` (in,) scales the input channels."""
        factors = list(self.factors)
        if keep is not None:
            factors[0] = factors[0] * keep[:, None]
        with torch.autocast(self.core.device.type, enabled=False):
            return tucker_delta(self.core, factors, self.scale)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight; dropout acts on input channels of the whole batch at once."""
        keep = None
        if self.dropout and self.training:
            keep = F.dropout(torch.ones_like(self.factors[0][:, 0]), self.dropout)
        return weight + self.delta(keep)

    def behind(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """What the layer gives plus the product applied to its input, with the layer's stride, padding and groups.

        `module` is the layer, or what another method has wrapped it in.
        """
        layer: Any = self.beside[0]
        x = F.dropout(inputs[0], self.dropout, self.training)
        if isinstance(layer, nn.Linear):
            return output + F.linear(x, self.delta())
        return output + layer._conv_forward(x, self.delta(), None)


@dataclass
class _Place:
    """One adapted weight: `hook` of the branch behind `layer`, or `order` of its parameters before the change."""

    name: str
    layer: nn.Module
    part: TuckerUpdate
    hook: Any = None
    order: list[str] | None = None


@dataclass
class FLoRA(Method):
    """Train a Tucker product beside each chosen weight, then add it to the weight (arXiv 2405.14739)."""

    rank: int = opt(16, "rank of the input axis (and of the output axis)", low=1, source="example.py: 16, 16, 2, 2")
    rank_out: int | None = opt(None, "rank of the output axis; null: the same", low=1, source="example.py")
    kernel_rank: int = opt(2, "rank of each axis of a kernel", low=1, source="example.py")
    scale: float = opt(4.0, "factor s of the product", low=0, source="example.py")
    dropout: float = opt(0.01, "dropout on the input of the product", low=0, high=0.99, source="example.py")
    targets: Any = opt("all", "layers to adapt: all, linear, conv, attention, a name, the end of one, a regular "
                       "expression, or a list of these", source="example.py: conv2d")  # fmt: skip
    head: bool = opt(True, "train the classification head itself instead of adapting it, as PEFT protocols do",
                     source="VPT code")  # fmt: skip

    trains: ClassVar = "part"
    paper: ClassVar[str] = "FLoRA, arXiv 2405.14739 (2024)"

    def __post_init__(self) -> None:
        check_targets(self.targets, KINDS, "method.flora.targets")
        check_options(self, "method.flora")
        self.places: list[_Place] = []

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, skip: Collection[nn.Parameter] = ()) -> FLoRA:
        """Freeze `model` and put trainable products into it; returns self. `skip`: tensors of layers to leave alone."""
        model.requires_grad_(False)
        self._insert(self.layers(model, skip))
        return self

    def layers(
        self, model: nn.Module, skip: Collection[nn.Parameter] = (), weights: Mapping[str, nn.Parameter] | None = None
    ) -> dict[str, nn.Module]:
        """Base name -> layer to adapt. Raises UserError when there is none."""
        left = {id(p) for p in skip}
        found = pick(model, layers_of(model, KINDS, weights), self.targets, KINDS, "method.flora.targets")
        found = {n: m for n, m in found.items() if not any(id(p) in left for p in m.parameters())}
        if not found:
            raise UserError(f"method.flora.targets={self.targets!r} leaves no layer to adapt beside the trained head")
        return found

    def _insert(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            weight = base_tensor(layer, "weight")
            assert weight is not None
            ranks = ranks_for(weight.shape, self.rank, self.rank_out, self.kernel_rank)
            part = TuckerUpdate(weight, ranks, self.scale, self.dropout, layer).train(layer.training)
            if behaves(layer, BESIDE):
                self.places.append(_Place(name, layer, part, hook=put_behind(layer, "flora", part)))
            else:
                self.places.append(_Place(name, layer, part, order=put_into(layer, "weight", part)))

    @torch.no_grad()
    def merge(self) -> None:
        """Add every product to its weight; the cores and factors are gone."""
        for place in reversed(self.places):
            part = place.part.double()
            if place.order is None:
                take_off(place.layer, "flora", place.hook)
                weight = base_tensor(place.layer, "weight")
            else:
                weight = take_out(place.layer, "weight", place.part, place.order)
            if weight is not None:
                write(weight, weight.double() + part.delta())
        self.places = []

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(layer's name, what would be added to its weight) for every adapted layer."""
        for place in self.places:
            yield place.name, place.part.delta().detach()

    def parameters(self) -> list[nn.Parameter]:
        """All cores and factors."""
        return [p for place in self.places for p in place.part.parameters()]

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        layers = self.layers(run.model, run.task.head(run.model) if self.head else (), run.weights)
        run.claim(self, [p for m in layers.values() if (p := base_tensor(m, "weight")) is not None], "merge")
        self._insert(layers)
        if self.head:
            train_head(run)

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        check_trains(run, self, self.parameters())
        return []

    def finish(self, run: Run) -> None:
        self.merge()

    def verify(self, run: Run) -> None:
        """Raise ValueError unless every product, unfolded along any axis, has at most that axis's rank."""
        for place in self.places:
            core, delta = place.part.core, place.part.delta().detach().double()
            for axis, allowed in zip((1, 0, *range(2, delta.ndim)), core.shape, strict=True):
                rank = int(torch.linalg.matrix_rank(delta.movedim(axis, 0).flatten(1), rtol=1e-5))
                if rank > allowed:
                    raise ValueError(f"the product of {place.name} has rank {rank} along axis {axis}, not {allowed}")

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {
            "rank": self.rank if self.rank_out is None else self.rank_out,
            "kernel_rank": self.kernel_rank,
            "adapted_weights": len(self.places),
            "adapter_params": sum(p.numel() for p in self.parameters()),
        }
