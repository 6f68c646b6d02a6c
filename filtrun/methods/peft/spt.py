"""SPT: Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning (ICCV 2023 oral, arXiv 2303.08566; code ziplab/SPT).

Before training, the squared gradient of every entry is summed over a few batches of the task; the tau most sensitive
entries are marked, tau being what brings the number of trained parameters closest to the budget. A matrix with many of
them gets a LoRA module (or a bottleneck adapter) in their place, a vector with many is trained as a whole, elsewhere
exactly the marked entries train, as changes that start at zero. Head and class token always train; patch embedding,
stem and position embeddings never do. In the end changes and LoRA products are added to the weights; adapters stay.

Where this differs from the official code, on purpose:

- Marked entries of norms train too; there they are counted and stay frozen (``official_skip_norms=true`` gives that).
- Budget and grid are not tied to ViT-B's size: a budget below 1 is a share of the model.
- The gradient of the entries is a product of the needed rows and columns; there it is the diagonal of a (k, k) product.
- In a joint ``qkv`` layer queries, keys and values are three matrices, as the code's separate layers are.
- A matrix smaller than its module keeps its entries.

Alone, on any model:

>>> spt = SPT(budget=0.01).attach(model, batches, F.cross_entropy)  # doctest: +SKIP
>>> ...                                                   # train the parameters that require a gradient
>>> spt.merge()                                                     # doctest: +SKIP
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.methods.peft import spt_allocation as allocation
from filtrun.methods.peft.places import class_tokens
from filtrun.methods.peft.spt_parts import Module, Part, merge_parts, put_parts, remove_parts, whole_vectors
from filtrun.methods.peft.spt_slots import Tensors, find_tensors
from filtrun.options import check_options, opt
from filtrun.surgery import check_trains

if TYPE_CHECKING:
    from filtrun.context import Run

STRUCTURED = ("lora", "adapter", "none")


def sensitivity(losses: Iterable[Tensor], parameters: dict[str, nn.Parameter], reduce: Any = None) -> dict[str, Tensor]:
    """The sum over losses (one for each batch, a scalar each) of the squared gradient of every entry (eq. 4).

    Gradients are those of the batch's mean loss; a parameter a loss does not depend on adds nothing. `reduce` averages
    a gradient over processes.
    """
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                found[name] += (gradient if reduce is None else reduce(gradient)).square()
    return found


@dataclass
class SPT(Method):
    """Train the most sensitive entries, vectors and low-rank modules (He et al., arXiv 2303.08566)."""

    budget: float = opt(0.01, "trained parameters beside the head: below 1 a share of the model, else their number",
                        low=0, source="paper: 0.2 to 1.0 of 86 million")  # fmt: skip
    structured: str = opt("lora", "what stands in for many marked entries of a matrix", choices=STRUCTURED,
                          source="paper: both; --structured_type")  # fmt: skip
    rank: int = opt(8, "rank of LoRA, or width of an adapter", low=1, source="configs: low_rank_dim")
    alpha: float = opt(10.0, "a matrix gets a module when 1/alpha of the module's size is marked", low=1,
                       source="configs")  # fmt: skip
    beta: float = opt(5.0, "a vector trains as a whole when 1/beta of it is marked", low=1, source="engine.py")
    criterion: str = opt("sensitivity", "which entries are marked: the most sensitive, random ones or the least "
                         "sensitive", choices=("sensitivity", "random", "lowest"),
                         source="paper, section 3.2; the others are controls")  # fmt: skip
    tau_step: float | None = opt(None, "steps in which tau is sought: below 1 a share, else a number; null: budget/20",
                                 low=0, source="engine.py: 0.02 million")  # fmt: skip
    sensitivity_batches: int = opt(8, "batches for the sensitivity, at most", low=1, source="engine.py")
    sensitivity_batch: int = opt(32, "images in each", low=1, source="configs")
    dropout: float = opt(0.1, "dropout on the input of a module", low=0, high=0.99, source="code")
    drop_path: float = opt(0.1, "stochastic depth of a module", low=0, high=0.99, source="code")
    class_token: bool = opt(True, "also train the class token, where there is one", source="code")
    official_skip_norms: bool = opt(False, "count marked entries of norms but keep them frozen",
                                    source="an addition; true: as the official code")  # fmt: skip
    head: bool = opt(True, "also train the classification head", source="code")

    trains: ClassVar = "part"
    paper: ClassVar[str] = "SPT, arXiv 2303.08566 (ICCV 2023)"

    def __post_init__(self) -> None:
        check_options(self, "method.spt")
        self.parts: list[Part] = []
        self.whole: list[nn.Parameter] = []
        self.chosen: allocation.Allocation | None = None
        self._tensors: Tensors | None = None
        self._seconds = 0.0
        self._in_optimizer = False

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(
        self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor],
        skip: Collection[nn.Parameter] | None = None,
    ) -> SPT:  # fmt: skip
        """Score `model` on batches of (x, y) by loss(model(x), y), freeze it and make what was chosen trainable.

        Args:
            skip: tensors that train in any case and do not compete; None: those of the classification head.

        Returns:
            self. Raises UserError when nothing can be chosen.
        """
        if skip is None:
            from filtrun.models.checkpoint import head_of

            skip = list(head_of(model)[1].parameters())
        taken = itertools.islice(batches, self.sensitivity_batches)
        self._choose(model, skip, lambda: (loss(model(x), y) for x, y in taken))
        model.requires_grad_(False)
        self._insert()
        for parameter in skip:
            parameter.requires_grad_(True)
        return self

    def _choose(
        self, model: nn.Module, skip: Collection[nn.Parameter], losses: Callable[[], Iterable[Tensor]],
        reduce: Any = None,
    ) -> None:  # fmt: skip
        """Score the tensors, find tau and decide what trains."""
        started = time.perf_counter()
        found = self._tensors = find_tensors(model, skip, self.structured, self.rank)
        self._tokens = class_tokens(model) if self.class_token else []
        total = sum(p.numel() for p in model.parameters())
        size = sum(p.numel() for p in found.parameters.values())
        budget = round(self.budget * total) if self.budget < 1 else int(self.budget)
        extra = sum(p.numel() for p in self._tokens)
        if not found.slots or not 0 < budget - extra:
            raise UserError(
                f"method.spt.budget={self.budget:g} is {budget} parameters, of which the class token takes {extra}; "
                f"{type(model).__name__} has {size} to choose from"
            )
        if self.criterion == "random":
            scores = {name: torch.rand_like(p) for name, p in found.parameters.items()}
        else:
            scores = self._scores(model, found.parameters, losses, reduce)
        step = None if self.tau_step is None else self.tau_step * (total if self.tau_step < 1 else 1)
        places = allocation.rank_entries(allocation.slices(scores, found.slots))
        taus = allocation.tau_grid(budget, None if step is None else max(1, round(step)), size)
        tau = allocation.choose_tau(found.slots, places, budget, taus, self.alpha, self.beta, extra)
        self.chosen = allocation.allocate(found.slots, places, tau, self.alpha, self.beta)
        self._seconds = time.perf_counter() - started

    def _scores(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], losses: Callable[[], Iterable[Tensor]], reduce: Any
    ) -> dict[str, Tensor]:
        """The sensitivity in training mode; afterwards the model is as it was, batch statistics too."""
        flags = {p: p.requires_grad for p in model.parameters()}
        buffers = {b: b.clone() for b in model.buffers()}
        training = model.training
        model.requires_grad_(True).train()
        try:
            with torch.enable_grad():
                found = sensitivity(losses(), parameters, reduce)
        finally:
            model.train(training)
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
        sign = -1 if self.criterion == "lowest" else 1
        return {name: sign * score for name, score in found.items()}

    def _insert(self) -> None:
        """Put the chosen parts into the model."""
        assert self.chosen is not None and self._tensors is not None
        module = Module(self.structured, self.rank, self.dropout, self.drop_path)
        self.parts = put_parts(self._tensors, self.chosen, module, self.official_skip_norms)
        self.whole = [*whole_vectors(self._tensors, self.chosen), *self._tokens]
        for parameter in self.whole:
            parameter.requires_grad_(True)

    def merge(self) -> None:
        """Add the changes of entries and the LoRA products to the weights; adapters stay."""
        self.parts = merge_parts(self.parts)

    def parameters(self) -> list[nn.Parameter]:
        """All that trains beside the head."""
        return [*(p for part in self.parts for p in part.module.parameters()), *self.whole]

    # -- hooks -----------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        from filtrun.data.loader import epoch_batches

        assert run.train_split is not None
        world, rank = run.fabric.world_size, run.fabric.global_rank
        batches = itertools.islice(
            epoch_batches(run.train_split, self.sensitivity_batch, seed=run.seed, epoch=0, device=run.device, rank=rank,
                          world=world), self.sensitivity_batches)  # fmt: skip
        net, shared = run.net, dict(run.shared)
        run.net = run.model
        head = run.task.head(run.model)
        try:
            self._choose(run.model, head, lambda: (run.task.loss(run, b) for b in batches),
                         None if world == 1 else lambda g: run.reduce(g, "mean"))  # fmt: skip
        finally:
            run.net = net
            run.shared.clear()  # what the loss keeps there belongs to this network, not to the wrapped one
            run.shared.update(shared)

    def edit_model(self, run: Run) -> None:
        self._insert()
        self._claim(run)
        if self.head:
            train_head(run)

    def _claim(self, run: Run) -> None:
        assert self._tensors is not None and self.chosen is not None
        names = {*self.chosen.structured, *self.chosen.entries, *self.chosen.vectors}
        merged = {slot.tensor for slot in self._tensors.slots if slot.name in names}
        whole = {id(p) for p in self.whole}
        parameters = [self._tensors.parameters[name] for name in merged]
        run.claim(self, [p for p in parameters if id(p) not in whole], "merge")
        run.claim(self, self.whole)

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        self._in_optimizer = True
        check_trains(run, self, self.parameters())
        return []

    def finish(self, run: Run) -> None:
        self.merge()

    def state_dict(self) -> dict[str, Any]:
        if self.chosen is None:
            return {}
        made, places = self.chosen, list(self.chosen.entries.values())
        lists = {"structured": made.structured, "vectors": made.vectors}
        entries = {  # one tensor for all: names would take more room than positions
            "names": list(made.entries),
            "counts": [len(at) for at in places],
            "positions": torch.cat(places).to(torch.int32) if places else torch.empty(0, dtype=torch.int32),
        }
        return {"tau": made.tau, "total": made.total, **lists, "entries": entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        parts = state["entries"]["positions"].to(torch.int64).cpu().split(state["entries"]["counts"])
        entries = dict(zip(state["entries"]["names"], parts, strict=True))
        saved = allocation.Allocation(state["tau"], state["total"], state["structured"], state["vectors"], entries)
        assert self.chosen is not None
        here = {name: at.cpu() for name, at in self.chosen.entries.items()}
        if saved.same(allocation.Allocation(0, 0, self.chosen.structured, self.chosen.vectors, here)):
            return
        if self._in_optimizer:  # another machine rounds otherwise, so that other entries came out on top
            raise UserError("method.spt: the saved run chose other parameters than this machine does: start it again")
        remove_parts(self.parts)
        for parameter in self.whole:
            parameter.requires_grad_(False)
        self.chosen = saved
        self._insert()

    def report(self, run: Run) -> dict[str, float | int | str]:
        assert self.chosen is not None
        return {
            "tau": self.chosen.tau,
            "adapter_params": sum(p.numel() for p in self.parameters()),
            "structured_matrices": len(self.chosen.structured),
            "whole_vectors": len(self.chosen.vectors),
            "single_entries": sum(len(at) for at in self.chosen.entries.values()),
            "selection_seconds": self._seconds,
        }
