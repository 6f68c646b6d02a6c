"""SNELL: Expanding Sparse Tuning for Low Memory Usage (NeurIPS 2024, arXiv 2411.01800; official code ssfgunner/SNELL).

Beside each frozen linear layer acts a sparse update S of high rank, made of two thin matrices: a distance kernel
between their rows, of which only the largest magnitudes survive. Neither S nor the indices
of its entries are stored: it is made anew in the forward and again in the backward pass. In the end S is added to the
weight.

The paper subtracts the threshold from the survivors, the official code multiplies them by their magnitude; the code's
rule is the default (`sparsify`), so that an update starts small and grows with the square of the kernel. A joint layer
for queries, keys and values gets one update for each, as the official code separates the three. The official code
leaves out dropout before the attention's output layer and shares one draw among queries, keys and values; here every
layer draws its own. Convolutions, which the paper does not treat, are adapted as matrices (out, in x k x k).

Alone, on any model:

>>> snell = SNELL(rank=8, sparsity=0.9).attach(model)    # doctest: +SKIP
>>> ...                                                  # train the parameters that require a gradient
>>> snell.merge()                                        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.cost import saved_for_backward
from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.methods.peft.branches import drop_path
from filtrun.methods.peft.kernel_update import BLOCK, KERNELS, RULES, KernelUpdate, recomputed
from filtrun.methods.peft.places import JOINT
from filtrun.options import check_options, opt
from filtrun.surgery import (
    CONVS,
    base_tensor,
    behaves,
    check_targets,
    check_trains,
    choose,
    matrices,
    put_behind,
    put_into,
    take_off,
    take_out,
    write,
)  # fmt: skip

if TYPE_CHECKING:
    from filtrun.context import Run

KINDS: dict[str, tuple[type[nn.Module], ...]] = {"linear": (nn.Linear, nn.MultiheadAttention), "conv": CONVS}


class SparseBranch(nn.Module):
    """The update of one weight, applied beside its layer (`behind`) or added to it (`forward`).

    Args:
        parts: updates of equal inputs that lie side by side in the weight (three for a joint qkv layer).
        shape: of the weight, (out, in) or (out, in / groups, *kernel).
        conv: stride, padding, dilation and groups of a convolution; None for a linear layer.
        recompute: whether the backward pass computes the update anew instead of keeping what made it.
    """

    def __init__(self, parts: list[KernelUpdate], shape: torch.Size, conv: dict[str, Any] | None, dropout: float,
                 path: float, recompute: bool) -> None:  # fmt: skip
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.shape, self.conv = shape, conv
        self.dropout, self.path, self.recompute = dropout, path, recompute

    def factors(self) -> list[Tensor]:
        """The thin matrices, in turn for inputs and outputs of each part."""
        return [q for part in self.parts for q in cast(KernelUpdate, part).parameters()]

    def build(self, factors: list[Tensor], known: list[list[Tensor]] | None = None) -> Tensor:
        """The update in the shape of the weight."""
        made: list[Any] = [*self.parts]
        if self.recompute and known is not None and self.shape.numel() > BLOCK:
            blocks = [part.rows(factors[2 * i], factors[2 * i + 1], known[i]) for i, part in enumerate(made)]
            return torch.cat([rows for part in blocks for rows in part]).view(self.shape)
        updates = [
            part.build(factors[2 * i], factors[2 * i + 1], None if known is None else known[i])
            for i, part in enumerate(made)
        ]
        return torch.cat(updates, dim=1).T.reshape(self.shape)

    def delta(self) -> Tensor:
        """The update as it is now, in the shape of the weight."""
        return self.build(self.factors())

    def forward(self, weight: Tensor) -> Tensor:
        factors, known = self.factors(), [[] for _ in self.parts]  # type: ignore[var-annotated]

        def make(*factors: Tensor) -> Tensor:
            return self.build(list(factors), known)

        return weight + (recomputed(make, *factors) if self.recompute else make(*factors))

    def behind(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The layer's output plus that of the update; in training with dropout before and stochastic depth behind."""
        x, keep, known = inputs[0], None, [[] for _ in self.parts]  # type: ignore[var-annotated]
        if self.training and self.dropout:
            keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.dropout)

        def branch(x: Tensor, keep: Tensor | None, *factors: Tensor) -> Tensor:
            weight = self.build(list(factors), known)
            if keep is not None:
                x = x * keep / (1 - self.dropout)
            if self.conv is None:
                return F.linear(x, weight)
            return (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3](x, weight, **self.conv)

        added = (recomputed(branch, x, keep, *self.factors()) if self.recompute else
                 branch(x, keep, *self.factors()))  # fmt: skip
        return output + drop_path(added, self.path, self.training)


@dataclass
class _Place:
    """One adapted weight: behind `layer` (`hook`), or inside it."""

    name: str
    layer: nn.Module
    tensor: str
    part: SparseBranch
    hook: Any = None
    order: list[str] | None = None


@dataclass
class SNELL(Method):
    """Train kernelised, sparsified low-rank updates, then add them to the weights (Shen et al., arXiv 2411.01800)."""

    rank: int = opt(8, "rank r of the thin matrices, even; each has r / 2 columns per half", low=2,
                    source="scripts: 8, 16, 32")  # fmt: skip
    sparsity: float = opt(0.9, "share of each update that is zero; 0: the dense kernel", low=0, high=0.9999,
                          source="scripts: 0 to 0.995 by data set, 0.9 for CIFAR-100")  # fmt: skip
    kernel: str = opt("distance", "how the thin matrices make a matrix; linear: of rank r", choices=KERNELS,
                      source="paper")  # fmt: skip
    sparsify: str = opt("code", "what survivors are: code K |K|, soft sign(K) (|K| - threshold), hard K",
                        choices=RULES, source="official code; paper: soft")  # fmt: skip
    scale: float = opt(0.1, "factor of the kernel", source="official code")
    dropout: float = opt(0.1, "dropout on the input of an update", low=0, high=0.99, source="official code")
    drop_path: float = opt(0.1, "share of samples without the update, in training", low=0, high=0.99,
                           source="official code")  # fmt: skip
    recompute: bool = opt(True, "make updates anew in the backward pass instead of keeping them: less memory",
                          source="paper")  # fmt: skip
    targets: Any = opt("auto", "layers to adapt: auto (linear ones; convolutions where there are none but the head), "
                       "all, linear, conv, attention, a name, the end of one, a regular expression, or a list of these",
                       source="paper: all linear layers of the blocks")  # fmt: skip
    head: bool = opt(True, "train the classification head itself instead of adapting it", source="official code")

    trains: ClassVar = "part"
    identity_at_start: ClassVar = False
    paper: ClassVar[str] = "SNELL, arXiv 2411.01800 (NeurIPS 2024)"

    def __post_init__(self) -> None:
        check_targets(self.targets, KINDS, "method.snell.targets")
        check_options(self, "method.snell")
        if self.rank % 2:
            raise UserError(f"method.snell.rank={self.rank} must be even: half of it makes each distance")
        self.places: list[_Place] = []

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, skip: Collection[nn.Parameter] = ()) -> SNELL:
        """Freeze `model` and put trainable updates into it; returns self. `skip`: tensors of layers to leave alone."""
        model.requires_grad_(False)
        self._insert(self.layers(model, skip))
        return self

    def layers(
        self, model: nn.Module, skip: Collection[nn.Parameter] = (), weights: Mapping[str, nn.Parameter] | None = None
    ) -> dict[str, nn.Module]:
        """Base name -> layer to adapt. Raises UserError when there is none."""
        if self.targets != "auto":
            return choose(model, self.targets, KINDS, "method.snell.targets", skip, weights)
        found = choose(model, "all", KINDS, "method.snell.targets", skip, weights)
        return {n: m for n, m in found.items() if isinstance(m, KINDS["linear"])} or found

    def _insert(self, layers: Mapping[str, nn.Module]) -> None:
        for name, owner, tensor, weight in matrices(layers):
            made: Any = owner
            plain = behaves(owner, CONVS[:3]) and made.padding_mode == "zeros"
            conv = {k: getattr(owner, k) for k in ("stride", "padding", "dilation", "groups")} if plain else None
            rows, columns = weight.shape[0], weight[0].numel()
            layer = name.removesuffix(f".{tensor}").rpartition(".")[2]
            count = 3 if tensor == "in_proj_weight" else len(JOINT.get(layer, "x"))
            count = count if rows % count == 0 else 1
            parts = [
                KernelUpdate(columns, rows // count, self.rank, self.sparsity, self.sparsify, self.kernel, self.scale,
                             weight.detach())
                for _ in range(count)
            ]  # fmt: skip
            part = SparseBranch(parts, weight.shape, conv, self.dropout, self.drop_path, self.recompute)
            place = _Place(name, owner, tensor, part.train(owner.training))
            if plain or behaves(owner, (nn.Linear,)):
                place.hook = put_behind(owner, "snell", part)
            else:
                place.order = put_into(owner, tensor, part)
            self.places.append(place)

    @torch.no_grad()
    def merge(self) -> None:
        """Add every update to its weight; the thin matrices are gone."""
        for place in reversed(self.places):
            delta = place.part.delta()
            if place.hook is not None:
                take_off(place.layer, "snell", place.hook)
                weight = base_tensor(place.layer, place.tensor)
            else:
                weight = take_out(place.layer, place.tensor, place.part, place.order or [])
            if weight is not None:
                write(weight, weight.double() + delta.double())
        self.places = []

    def parameters(self) -> list[nn.Parameter]:
        """The thin matrices of all updates."""
        return [p for place in self.places for p in place.part.parameters()]

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        layers = self.layers(run.model, run.task.head(run.model) if self.head else (), run.weights)
        run.claim(self, [weight for *_, weight in matrices(layers)], "merge")
        self._insert(layers)
        if self.head:
            train_head(run)

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        check_trains(run, self, self.parameters())
        return []

    def finish(self, run: Run) -> None:
        self.merge()

    @torch.no_grad()
    def verify(self, run: Run) -> None:
        """Raise ValueError unless at least the stated share of every update is exactly zero."""
        for place in self.places:
            for part in place.part.parts:
                update = part()
                zeros = int((update == 0).sum())
                if zeros < int(self.sparsity * (update.numel() - 1)):
                    raise ValueError(f"{zeros} of {update.numel()} entries of the update of {place.name} are zero")

    def report(self, run: Run) -> dict[str, float | int | str]:
        with torch.no_grad():
            updates = [part() for place in self.places for part in place.part.parts]
            ranks = [int(torch.linalg.matrix_rank(u.double())) for u in updates]
            zeros = sum(int((u == 0).sum()) for u in updates)
        return {
            "factor_rank": self.rank,
            "update_rank": sum(ranks) / len(ranks),
            "update_sparsity": zeros / sum(u.numel() for u in updates),
            "adapted_weights": len(self.places),
            "adapter_params": sum(p.numel() for p in self.parameters()),
            "saved_bytes_kept_updates": self._saved_bytes(run),
        }

    def _saved_bytes(self, run: Run) -> int:
        """What ``cost.saved_bytes`` would be if updates were kept for the backward pass instead of made anew."""
        for place in self.places:
            place.part.recompute = False
        with run.evaluating(), torch.enable_grad():
            found = saved_for_backward(lambda: run.task.probe(run), run.model)
        for place in self.places:
            place.part.recompute = self.recompute
        return found
