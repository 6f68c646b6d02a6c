"""Where SPT puts its trainable parameters: which entries, which vectors, which matrices.

Mathematics of "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning" (He et al., ICCV 2023, arXiv 2303.08566;
official code ziplab/SPT, ``engine.py``). All entries compete by their score; the tau best are marked. A matrix with
many marked entries gets a low-rank module in their place, a vector with many is trained as a whole, and in all other
tensors exactly the marked entries train.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """A tensor whose entries compete, or the rows of one that belong together (the queries of a joint projection).

    Args:
        name: its own name (``blocks.0.attn.qkv.weight:q``).
        tensor: the name of the tensor it is part of; `start` and `stop` are its rows there (along the first axis).
        vector: whether it may be trained as a whole.
        module_size: parameters of the low-rank module that may stand in for its entries; None where there is none.
    """

    name: str
    tensor: str
    start: int
    stop: int
    vector: bool = False
    module_size: int | None = None


@dataclass
class Allocation:
    """What trains: names of slots with a module (`structured`), of slots trained whole (`vectors`), and of the others
    the positions of their marked entries in the flattened slot (`entries`, int64, ascending); `total` parameters."""

    tau: int
    total: int
    structured: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    entries: dict[str, Tensor] = field(default_factory=dict)

    def same(self, other: Allocation) -> bool:
        """Whether both let the same parameters train."""
        lists = self.structured == other.structured and self.vectors == other.vectors
        keys = self.entries.keys() == other.entries.keys()
        return lists and keys and all(torch.equal(e, other.entries[n]) for n, e in self.entries.items())


def lora_size(inputs: int, outputs: int, rank: int, kernel: int = 1) -> int:
    """Parameters of a low-rank product beside a matrix (outputs, inputs * kernel): r (in kernel + out)."""
    return rank * (inputs * kernel + outputs)


def adapter_size(inputs: int, outputs: int, rank: int) -> int:
    """Parameters of a bottleneck with biases from `inputs` to `outputs` features: r (in + out) + r + out."""
    return rank * (inputs + outputs) + rank + outputs


def rank_entries(scores: Sequence[Tensor]) -> list[Tensor]:
    """The place of every entry among those of all tensors, 0 for the highest score; int64 (n,) for each.

    Of equal scores the one that comes first is ahead.
    """
    flat = torch.cat([s.flatten() for s in scores])
    order = torch.sort(flat, descending=True, stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return list(places.split([s.numel() for s in scores]))


def kind_of(slot: Slot, size: int, marked: int, alpha: float, beta: float) -> str:
    """ "structured", "vector" or "entries" for a slot of `size` entries of which `marked` are marked.

    A matrix gets a module when its marked entries are at least 1 / alpha of the module's parameters; a vector trains as
    a whole when at least 1 / beta of it is marked (section 3.3, and ``structured_vector`` of the code).
    """
    if slot.vector:
        return "vector" if marked >= size / beta else "entries"
    return "structured" if slot.module_size is not None and marked >= slot.module_size / alpha else "entries"


def count_parameters(
    slots: Sequence[Slot], sizes: Sequence[int], marked: Sequence[int], alpha: float, beta: float
) -> int:
    """Parameters that train when so many entries of each slot are marked."""
    total = 0
    for slot, size, n in zip(slots, sizes, marked, strict=True):
        kind = kind_of(slot, size, n, alpha, beta)
        total += {"vector": size, "structured": slot.module_size or 0, "entries": n}[kind]
    return total


def allocate(slots: Sequence[Slot], places: Sequence[Tensor], tau: int, alpha: float, beta: float) -> Allocation:
    """What trains when the `tau` best entries are marked; `places` is what `rank_entries` gave for the slots."""
    made = Allocation(tau, 0)
    for slot, place in zip(slots, places, strict=True):
        marks = (place < tau).nonzero().flatten()
        kind = kind_of(slot, len(place), len(marks), alpha, beta)
        if kind == "structured":
            made.structured.append(slot.name)
            made.total += slot.module_size or 0
        elif kind == "vector":
            made.vectors.append(slot.name)
            made.total += len(place)
        elif len(marks):
            made.entries[slot.name] = marks
            made.total += len(marks)
    return made


def choose_tau(
    slots: Sequence[Slot], places: Sequence[Tensor], budget: int, taus: Iterable[int], alpha: float, beta: float,
    extra: int = 0,
) -> int:  # fmt: skip
    """The tau of `taus` whose number of trained parameters, plus `extra`, is closest to `budget`; of equals the last.

    The number is no steady function of tau (a module replaces more or fewer entries), so all are tried.
    """
    ordered, sizes = [place.sort().values for place in places], [len(place) for place in places]
    best, gap = 0, math.inf
    for tau in taus:
        marked = [int(torch.searchsorted(place, tau)) for place in ordered]
        far = abs(count_parameters(slots, sizes, marked, alpha, beta) + extra - budget)
        if far <= gap:
            best, gap = tau, far
    return best


def tau_grid(budget: int, step: int | None, entries: int) -> list[int]:
    """The numbers of marked entries to try: 1 to 79 steps, cut at `entries`.

    The code goes to 1.58 million in steps of 20,000 for budgets around 0.4 million parameters; without `step` it is
    that grid, scaled: a twentieth of the budget.
    """
    width = budget / 20 if step is None else step
    return sorted({min(entries, max(1, math.ceil(k * width))) for k in range(1, 80)})


def slices(scores: Mapping[str, Tensor], slots: Sequence[Slot]) -> list[Tensor]:
    """The scores of every slot, cut out of those of its tensor."""
    return [scores[slot.tensor][slot.start : slot.stop] for slot in slots]
