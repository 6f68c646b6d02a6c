"""Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy.

ICCV 2023, arXiv 2307.16867; official code JieShibo/PETL-ViT, folder ``binary_adapter``. Adapters without biases whose
weights the forward pass sees in 1 (to 8) bits while ordinary numbers train behind them: next to the MLPs as in
AdaptFormer, s up(dropout(relu(down(x)))), or as LoRA on the queries and values of attention, s up(dropout(down(x))).
What is kept are the codes, eight one-bit weights in a byte, and mean and standard deviation of each matrix: a stored
run and the official file format hold exactly `stored_bytes` bytes of values. LoRA is merged at the end, AdaptFormer is
not (a ReLU is in the way).

Where this differs from the official code, on purpose: a matrix whose size is no multiple of 8 / bits keeps its last
byte; networks without transformer blocks get the adapters next to their spatial convolutions; a binary head starts from
the base's head.

Alone, on any model:

>>> adapters = BinaryAdapter(bits=1, dim=32).attach(model)  # doctest: +SKIP
>>> ...                                                     # train the parameters that require a gradient
>>> adapters.save("adapter.bin", model)                     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.errors import UserError
from filtrun.method import Method, parent_of, train_head
from filtrun.methods.peft.adapter import find_places
from filtrun.methods.peft.binary_weights import (
    QuantisedConv,
    QuantisedLinear,
    dump,
    load,
    packed_size,
    quantised_layers,
)
from filtrun.methods.peft.branches import Bottleneck, beside_mlp, on_rows, stay_behind
from filtrun.methods.peft.places import Projection, projections
from filtrun.options import check_options, opt
from filtrun.surgery import base_tensor, put_behind, take_off, write

if TYPE_CHECKING:
    from filtrun.context import Run


def start(up: nn.Module, bits: int) -> None:
    """`up` starts normal (deviation 1e-3, cut at 2e-3): zeros cannot be standardised, so only 32 bits start there."""
    weight: Any = up.weight
    if bits == 32:
        nn.init.zeros_(weight)
    else:
        nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3)


def make_linear(inputs: int, outputs: int, bits: int) -> nn.Linear:
    """A linear layer without bias in `bits` bits, 32 for an ordinary one."""
    return nn.Linear(inputs, outputs, bias=False) if bits == 32 else QuantisedLinear(inputs, outputs, bits)


def make_conv(inputs: int, outputs: int, bits: int, stride: Any = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias in `bits` bits, 32 for an ordinary one."""
    if bits == 32:
        return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return QuantisedConv(inputs, outputs, bits, stride)


def seen(layer: Any) -> Tensor:
    """The weight a layer applies, quantised or not."""
    return layer.seen() if hasattr(layer, "seen") else layer.weight


class LowRank(nn.Module):
    """s up(dropout(down(x))), added to the outputs `start` to `stop` of the layer it stands next to."""

    def __init__(self, down: nn.Module, up: nn.Module, scale: float, dropout: float, start: int, stop: int) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.scale, self.dropout, self.start, self.stop = scale, dropout, start, stop

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(F.dropout(self.down(x), self.dropout, self.training))

    def behind(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The layer's output with the product added to its rows."""
        return on_rows(output, self.start, self.stop, lambda part: part + self(inputs[0]))

    def delta(self) -> Tensor:
        """What the product adds to those rows of the weight, in double precision."""
        return self.scale * seen(self.up).double() @ seen(self.down).double()


@dataclass
class BinaryAdapter(Method):
    """Train adapters whose weights have one bit (or 2, 4, 8, 32) each, and store them so (Jie et al., 2307.16867)."""

    bits: int = opt(1, "bits of an adapter's weight; 32: ordinary numbers", choices=(1, 2, 4, 8, 32), source="main.py")
    dim: int = opt(32, "width of the bottleneck", low=1, source="main.py; the paper also has 1")
    form: str = opt("adaptformer", "adapters next to the MLPs, or low-rank products on queries and values",
                    choices=("adaptformer", "lora"), source="main.py")  # fmt: skip
    scale: float = opt(1.0, "factor s of an adapter's output", source="main.py; 0.01 to 100 by data set in configs/")
    dropout: float = opt(0.1, "dropout on the narrow features", low=0, high=0.99, source="adaptformer.py")
    place: str = opt("auto", "adaptformer: next to the MLPs of blocks or to spatial convolutions; auto: MLPs if any",
                     choices=("auto", "mlp", "conv"),
                     source="paper: mlp; conv is an addition of this package")  # fmt: skip
    head: bool = opt(True, "also train the classification head", source="main.py")
    binary_head: bool = opt(False, "the head without bias in one bit", source="main.py: bihead")

    trains: ClassVar = "part"
    identity_at_start: ClassVar[bool] = False
    paper: ClassVar[str] = "Binary Adapter, arXiv 2307.16867 (ICCV 2023)"

    def __post_init__(self) -> None:
        check_options(self, "method.binary_adapter")
        if self.binary_head and not self.head:
            raise UserError("method.binary_adapter.binary_head=true trains the head: head=false does not go with it")
        self.branches: list[nn.Module] = []
        self.low_rank: list[tuple[Projection, LowRank, str, Any]] = []
        self.head_layer: nn.Linear | None = None

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> BinaryAdapter:
        """Freeze `model`, put trainable adapters into it and make its head trainable; returns self.

        Raises UserError when the model has no place for them, or no head where one is to train.
        """
        from filtrun.models.checkpoint import head_of

        model.requires_grad_(False)
        self._find(model)
        self._insert(model)
        if self.binary_head:
            self._quantise_head(model)
        if self.head:
            head_of(model)[1].requires_grad_(True)
        return self

    def _find(self, model: nn.Module) -> None:
        if self.form == "adaptformer":
            self._blocks, self._convs = find_places(model, self.place, "binary_adapter")
            return
        self._projections = projections(model, "qv")
        if not self._projections:
            raise UserError(
                f"method.binary_adapter.form=lora needs attention with linear queries and values, which "
                f"{type(model).__name__} has not; use form=adaptformer"
            )

    def _insert(self, model: nn.Module) -> None:
        if self.form == "adaptformer":
            self.branches = [beside_mlp(block, self._beside_mlp) for block in self._blocks.values()]
            self.branches += [stay_behind(conv, self._beside_conv(conv)) for conv in self._convs.values()]
            return
        for place in self._projections:
            down = make_linear(place.module.in_features, self.dim, self.bits)
            up = make_linear(self.dim, place.stop - place.start, self.bits)
            start(up, self.bits)
            part = LowRank(down, up, self.scale, self.dropout, place.start, place.stop)
            part.to(place.module.weight.device).train(place.module.training)
            name = f"binary_{place.role}"
            self.low_rank.append((place, part, name, put_behind(place.module, name, part)))
            self.branches.append(part)

    def _beside_mlp(self, width: int) -> Bottleneck:
        return self._branch(make_linear(width, self.dim, self.bits), make_linear(self.dim, width, self.bits))

    def _beside_conv(self, conv: nn.Conv2d) -> Bottleneck:
        down = make_conv(conv.in_channels, self.dim, self.bits, conv.stride)
        return self._branch(down, make_conv(self.dim, conv.out_channels, self.bits))

    def _branch(self, down: nn.Module, up: nn.Module) -> Bottleneck:
        start(up, self.bits)
        return Bottleneck(down, up, scale=self.scale, dropout=self.dropout)

    def _quantise_head(self, model: nn.Module) -> None:
        """Put a one-bit layer that starts from the head's weight in the head's place."""
        from filtrun.models.checkpoint import head_of

        name, head = head_of(model)
        if not isinstance(head, nn.Linear):
            raise UserError(f"method.binary_adapter.binary_head needs a linear head, not {type(head).__name__}")
        made = QuantisedLinear(head.in_features, head.out_features, 1).to(head.weight.device)
        with torch.no_grad():
            made.weight.copy_(head.weight)
        parent, attribute = parent_of(model, name)
        setattr(parent, attribute, made.train(head.training))
        self.head_layer = made

    @torch.no_grad()
    def merge(self) -> None:
        """Fix the coded weights, and add low-rank products to the weights of their layers."""
        for branch in self.branches:
            for layer in quantised_layers(branch):
                layer.fix()
        if isinstance(self.head_layer, QuantisedLinear):
            self.head_layer.fix()
        for place, part, name, hook in reversed(self.low_rank):
            take_off(place.module, name, hook)
            weight = base_tensor(place.module, "weight")
            if weight is not None:
                rows = slice(place.start, place.stop)
                write(weight[rows], weight[rows].double() + part.delta())  # type: ignore[arg-type]
        self.low_rank = []

    def save(self, path: Path | str, model: nn.Module) -> None:
        """Write adapters and head in the official format: `stored_bytes` bytes, no header."""
        Path(path).write_bytes(dump(model, self._floats(model)))

    def load(self, path: Path | str, model: nn.Module) -> None:
        """Read what `save` (or the official code) wrote. Raises UserError when it does not fit the model."""
        load(model, self._floats(model), Path(path).read_bytes())

    def _floats(self, model: nn.Module) -> list[Tensor]:
        """The tensors stored as 4-byte numbers: those of a head that is not binary, and of 32-bit adapters."""
        from filtrun.models.checkpoint import head_of

        plain = [p for b in self.branches for p in b.parameters()] if self.bits == 32 else []
        return [*plain, *(head_of(model)[1].parameters() if self.head and not self.binary_head else ())]

    def adapter_bytes(self) -> int:
        """Bytes of the adapters as stored: ceil(n bits / 8) and 8 for each matrix of n weights, or 4 n at 32 bits."""
        sizes = [p.numel() for branch in self.branches for p in branch.parameters()]
        return sum(4 * n if self.bits == 32 else packed_size(n, self.bits) for n in sizes)

    # -- hooks -----------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        self._find(run.model)  # before other methods put layers of their own into it

    def edit_model(self, run: Run) -> None:
        if self.form == "lora":
            weights = [base_tensor(place.module, "weight") for place in self._projections]
            run.claim(self, [w for w in weights if w is not None], "merge")
        self._insert(run.model)
        head = run.task.head(run.model) if self.head else []
        if head and self.binary_head:
            run.claim(self, head)
            self._quantise_head(run.model)
        elif self.binary_head:
            raise UserError("method.binary_adapter.binary_head=true needs a classifier; use task=classify")
        if self.head:
            train_head(run)

    def finish(self, run: Run) -> None:
        self.merge()

    def _head_bytes(self, head: Sequence[nn.Parameter]) -> int:
        if self.binary_head:
            return packed_size(head[0].numel(), 1)
        return 4 * sum(p.numel() for p in head) if self.head else 0

    def verify(self, run: Run) -> None:
        """Raise ValueError unless coded matrices have 2^bits values at most and take the bytes that are stated."""
        for layer in quantised_layers(run.model):
            if len(layer.seen().unique()) > 2**layer.bits:
                raise ValueError(f"a matrix of {layer.bits} bits has {len(layer.seen().unique())} values")
        head = run.task.head(run.model)
        stored = len(dump(run.model, [p for p in head if self.head and not self.binary_head]))
        stated = (0 if self.bits == 32 else self.adapter_bytes()) + self._head_bytes(head)
        if stored != stated:
            raise ValueError(f"{stored} bytes are stored, not {stated}")

    def report(self, run: Run) -> dict[str, float | int | str]:
        head = self._head_bytes(run.task.head(run.model))
        return {
            "adapter_bits": self.bits,
            "bottleneck": self.dim,
            "adapters": len(self.branches),
            "adapter_params": sum(p.numel() for branch in self.branches for p in branch.parameters()),
            "adapter_bytes": self.adapter_bytes(),
            "stored_value_bytes": self.adapter_bytes() + head,
        }
