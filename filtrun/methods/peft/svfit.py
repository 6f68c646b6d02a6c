"""SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values (2024, arXiv 2409.05926).

Each weight is taken apart once, W = U diag(sigma) V^T; the singular vectors and the tail stay frozen and only the r
largest singular values train: W' = U_r diag(sigma') V_r^T + W_e. In the end W' takes the place of W.

No official code was found; this follows the abstract and public summaries. "99 % of the matrix's information" is read
as the share of the squared singular values (option `energy_kind`). What is computed is W x + U_r ((sigma' - sigma) *
(V_r^T x)): the same, equal to W x to the bit at the start, without a second copy of W, and all it keeps for the
backward pass is r numbers per position. Singular values may become negative. `directions` gives the comparisons: the
smallest singular values, or random orthonormal directions, at the same count.

Alone, on any model:

>>> svfit = SVFit(rank=16).attach(model)    # doctest: +SKIP
>>> ...                                     # train the parameters that require a gradient
>>> svfit.merge()                           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def energy_rank(singular: Tensor, energy: float, kind: str = "squared") -> int:
    """The smallest r whose r largest singular values hold the share `energy` of all; 0 for a weight of zeros.

    Args:
        singular: (k,), not increasing.
        energy: in (0, 1].
        kind: "squared" counts sigma^2, "sum" counts sigma.
    """
    parts = singular.double()
    parts = parts.square() if kind == "squared" else parts
    sums = parts.cumsum(0)
    if not len(sums) or sums[-1] == 0:
        return 0
    return min(int((sums < energy * sums[-1]).sum()) + 1, len(sums))


def svd_split(weight: Tensor, rank: int | None, directions: str = "top", energy: float = 0.99,
              energy_kind: str = "squared") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(U (rows, r), sigma (r,), V^T (r, columns)) with sigma_k = u_k^T W v_k, of a weight with one row per output.

    Args:
        weight: (rows, ...); the further dimensions are flattened to columns.
        rank: r, cut to min(rows, columns); None: as many as hold `energy` (see `energy_rank`).
        directions: "top" or "bottom" singular vectors, or "random" orthonormal ones (from torch's global generator).
    """
    matrix = weight.detach().flatten(1).double()
    u, singular, vh = torch.linalg.svd(matrix, full_matrices=False)
    r = energy_rank(singular, energy, energy_kind) if rank is None else min(rank, len(singular))
    if directions == "random":
        u = torch.linalg.qr(torch.randn(matrix.shape[0], r, dtype=torch.double).to(u.device))[0]
        vh = torch.linalg.qr(torch.randn(matrix.shape[1], r, dtype=torch.double).to(u.device))[0].T
        singular = ((u.T @ matrix) * vh).sum(1)
    part = slice(len(singular) - r, None) if directions == "bottom" else slice(r)
    return tuple(t.to(weight.dtype).contiguous() for t in (u[:, part], singular[part], vh[part]))  # type: ignore[return-value]


class SingularValues(nn.Module):
    """The trained singular values of one weight; U, V^T and the values at the start are buffers that are not stored."""

    u: Tensor
    vh: Tensor
    start: Tensor

    def __init__(self, u: Tensor, singular: Tensor, vh: Tensor, layer: nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        made: Any = layer
        self.conv = (
            {"stride": made.stride, "padding": made.padding, "dilation": made.dilation} if factors(layer) == 2 else None
        )
        self.sigma = nn.Parameter(singular.clone())
        for name, tensor in (("u", u), ("vh", vh), ("start", singular.clone())):
            self.register_buffer(name, tensor, persistent=False)

    def delta(self) -> Tensor:
        """U_r diag(sigma' - sigma) V_r^T in the shape of the weight."""
        return ((self.u * (self.sigma - self.start)) @ self.vh).view(self.shape)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is rounded once, by the layer that uses it
            return weight + self.delta()

    def behind(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The layer's output plus U_r ((sigma' - sigma) * (V_r^T x))."""
        moved = self.sigma - self.start
        if self.conv is None:
            return output + F.linear(F.linear(inputs[0], self.vh) * moved.to(output.dtype), self.u)
        spatial = len(self.shape) - 2
        conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        hidden = conv(inputs[0], self.vh.view(-1, *self.shape[1:]), **self.conv)
        hidden = hidden * moved.to(output.dtype).view(-1, *[1] * spatial)
        return output + conv(hidden, self.u.view(*self.u.shape, *[1] * spatial))

    def fingerprint(self) -> Tensor:
        """Eight numbers that change when the singular vectors do, and not when a pair of them changes sign."""
        k = torch.arange(1, len(self.sigma) + 1, device=self.u.device, dtype=torch.double)
        probe = torch.cos(torch.arange(self.vh.shape[1], device=self.u.device, dtype=torch.double))
        rows = (self.u.double() * k) @ (self.vh.double() @ probe)
        weights = torch.sin(torch.arange(8 * len(rows), device=rows.device, dtype=torch.double)).view(8, -1)
        return (weights @ rows).cpu()


def factors(layer: nn.Module) -> int:
    """1: a plain linear layer, 2: a plain convolution (both take the update as two thin products), 0: other layers."""
    if behaves(layer, (nn.Linear,)):
        return 1
    made: Any = layer
    return 2 if behaves(layer, CONVS[:3]) and made.groups == 1 and made.padding_mode == "zeros" else 0


@dataclass
class _Place:
    """One adapted weight: behind `layer` (`hook`), or inside it."""

    name: str
    layer: nn.Module
    tensor: str
    part: SingularValues
    hook: Any = None
    order: list[str] | None = None


@dataclass
class SVFit(Method):
    """Train the largest singular values of each weight, then write the sum back into it (arXiv 2409.05926)."""

    rank: int | None = opt(None, "singular values trained per weight; null: as many as hold `energy`", low=1,
                           source="abstract: over 99 % of the information")  # fmt: skip
    energy: float = opt(0.99, "share of the spectrum the trained values hold, if rank is null", low=1e-6, high=1,
                        source="abstract")  # fmt: skip
    energy_kind: str = opt("squared", "what the share is of: squared singular values, or their sum",
                           choices=("squared", "sum"), source="our reading")  # fmt: skip
    directions: str = opt("top", "which directions train: the largest or smallest singular values, or random ones",
                          choices=("top", "bottom", "random"), source="abstract: top")  # fmt: skip
    compute: str = opt("factored", "two thin products beside the layer, or the whole weight anew in every step",
                       choices=("factored", "merged"), source="an addition: both compute the same")  # fmt: skip
    targets: Any = opt("all", "layers to adapt: all, linear, conv, attention, a name, the end of one, a regular "
                       "expression, or a list of these", source="LoRA's: query and value")  # fmt: skip
    head: bool = opt(True, "train the classification head itself instead of adapting it, as PEFT protocols do",
                     source="VPT code")  # fmt: skip

    trains: ClassVar = "part"
    paper: ClassVar[str] = "SVFit, arXiv 2409.05926 (2024)"

    def __post_init__(self) -> None:
        check_targets(self.targets, KINDS, "method.svfit.targets")
        check_options(self, "method.svfit")
        self.places: list[_Place] = []

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, skip: Collection[nn.Parameter] = ()) -> SVFit:
        """Freeze `model` and make singular values trainable; returns self. `skip`: tensors of layers to leave alone."""
        model.requires_grad_(False)
        self._insert(self.layers(model, skip))
        return self

    def layers(
        self, model: nn.Module, skip: Collection[nn.Parameter] = (), weights: Mapping[str, nn.Parameter] | None = None
    ) -> dict[str, nn.Module]:
        """Base name -> layer to adapt. Raises UserError when there is none."""
        return choose(model, self.targets, KINDS, "method.svfit.targets", skip, weights)

    def _insert(self, layers: Mapping[str, nn.Module]) -> None:
        for name, owner, tensor, weight in matrices(layers):
            u, singular, vh = svd_split(weight, self.rank, self.directions, self.energy, self.energy_kind)
            if not len(singular):
                continue  # a weight of zeros, at rank null
            part = SingularValues(u, singular, vh, owner, weight.shape)
            place = _Place(name, owner, tensor, part)
            if self.compute == "factored" and factors(owner):
                place.hook = put_behind(owner, "svfit", part)
            else:
                place.order = put_into(owner, tensor, part)
            self.places.append(place)
        if not self.places:
            raise UserError(f"method.svfit.targets={self.targets!r}: all of these weights are zero, nothing to train")

    @torch.no_grad()
    def merge(self) -> None:
        """Write every changed weight back; the trained singular values are gone."""
        for place in reversed(self.places):
            if place.hook is not None:
                take_off(place.layer, "svfit", place.hook)
                weight = base_tensor(place.layer, place.tensor)
            else:
                weight = take_out(place.layer, place.tensor, place.part, place.order or [])
            if weight is not None:
                write(weight, weight.double() + place.part.double().delta())
        self.places = []

    def parameters(self) -> list[nn.Parameter]:
        """The trained singular values of every weight."""
        return [place.part.sigma for place in self.places]

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        layers = self.layers(run.model, run.task.head(run.model) if self.head else (), run.weights)
        run.claim(self, [weight for *_, weight in matrices(layers)], "merge")
        self._insert(layers)
        if self.head:
            train_head(run)

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        check_trains(run, self, self.parameters())
        return [{"params": self.parameters(), "weight_decay": 0.0}]  # decay would pull the base's own spectrum to zero

    def finish(self, run: Run) -> None:
        self.merge()

    def state_dict(self) -> dict[str, Any]:
        return {"basis": {place.name: place.part.fingerprint() for place in self.places}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for place in self.places:
            saved, own = state["basis"].get(place.name), place.part.fingerprint()
            if saved is None or (saved.cpu() - own).norm() > 1e-3 * own.norm():
                raise UserError(
                    f"method.svfit: the singular vectors of {place.name} are not those the stored values belong to "
                    "(another base, rank or SVD routine)"
                )

    def verify(self, run: Run) -> None:
        """Raise ValueError unless every update has at most the rank it should."""
        for place in self.places:
            rank = int(torch.linalg.matrix_rank(place.part.delta().detach().flatten(1).double(), rtol=1e-5))
            if rank > len(place.part.sigma):
                raise ValueError(f"the update of {place.name} has rank {rank}, not {len(place.part.sigma)}")

    def report(self, run: Run) -> dict[str, float | int | str]:
        ranks = [len(place.part.sigma) for place in self.places]
        moved = [((p.part.sigma - p.part.start).norm() / p.part.start.norm()).item() for p in self.places]
        return {
            "adapted_weights": len(ranks),
            "adapter_params": sum(ranks),
            "mean_rank": sum(ranks) / len(ranks),
            "spectrum_change": sum(moved) / len(moved),
        }
