"""SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation.

ICLR 2025, arXiv 2409.06633; official code sjtuplayer/SaRA (``optim/adamw.py`` keeps gradients of the chosen entries
only, ``optim/adamw2.py`` masks dense ones). Only the entries of the pre-trained weights below a threshold are trained,
a nuclear norm keeps them of low rank, and half-way the entries that have grown past the threshold are frozen.

Where this differs from the official code, on purpose:

- The official fast path writes |p| into the network for one forward pass after each selection, so the adapted model
  is not the base at the start; here the sign is kept (``official_sign_quirk=true`` gives theirs).
- Its nuclear-norm term is back-propagated into a frozen tensor and has no effect; here it acts on the trained entries,
  as in ``adamw2.py`` and the paper.
- ``progressive_iter=-1`` crashes both variants; here null means never.
- Gradient accumulation raises there and clipping does nothing; here both work (on the gradient of the chosen entries).

Alone, on any model, in one line (the returned AdamW also does the low-rank term and the re-selection):

>>> optimizer = SaRA(threshold=2e-3, lambda_rank=5e-4, progressive_iter=2500).optimizer(model)  # doctest: +SKIP

Kept in a variable, the SaRA object also has ``detach()``, which leaves a plain model with the trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.context import mix_seed
from filtrun.errors import UserError
from filtrun.method import Method
from filtrun.options import check_options, opt
from filtrun.sparse_entries import DenseEntries, ScatterEntries, owners_of

if TYPE_CHECKING:
    from filtrun.context import Run

MIN_ENTRIES = 100
"""The low-rank term leaves out tensors with at most this many chosen entries (``adamw2.py``)."""


def select_below(weight: Tensor, threshold: float) -> Tensor:
    """The entries of `weight` (any shape) whose magnitude is strictly below `threshold`: a bool mask (eq. 4)."""
    return weight.detach().abs() < threshold


def threshold_for(weights: Iterable[Tensor], fraction: float) -> float:
    """The threshold below which `fraction` of all entries of `weights` lie (up to ties)."""
    magnitudes = torch.cat([w.detach().abs().flatten().float() for w in weights])
    count = min(int(round(fraction * magnitudes.numel())), magnitudes.numel() - 1)
    return magnitudes.kthvalue(count + 1).values.item()  # the smallest one that is not chosen


def auto_lr(threshold: float) -> float:
    """The official learning rate 1e-3 exp(-350 threshold): 4.97e-4 at 2e-3."""
    return 1e-3 * math.exp(-350 * threshold)


def nuclear_subgradient(matrix: Tensor) -> Tensor:
    """Sub-gradient U V^T of the nuclear norm (the sum of singular values) of `matrix` (m, n) = U S V^T (eq. 7)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


@dataclass
class SaRA(Method):
    """Train the smallest weights of a pre-trained model, all others staying bit-identical.

    Exactly one of `threshold` and `fraction` is used; with neither, ``fraction=0.15`` (the paper speaks of the
    smallest 10-20 %). An absolute threshold depends on the scale of the weights: 2e-3 fits Stable Diffusion and may
    choose 1 % or 30 % of a small network.
    """

    threshold: float | None = opt(None, "train the entries with magnitude below this", low=0, source="readme: 2e-3")
    fraction: float | None = opt(None, "train this share of all entries, the smallest ones", low=0, high=1,
                                 source="abstract: 10-20 %")  # fmt: skip
    progressive_iter: float | None = opt(
        0.5, "re-select after this many steps (below 1: this share of the run); null for never", low=0,
        source="finetune.sh: 2500 of 5005",
    )  # fmt: skip
    lambda_rank: float = opt(5e-4, "weight of the nuclear norm", low=0, source="finetune.sh")
    rank_min_dim: int = opt(64, "matrices with a side up to this are left out of the nuclear norm", low=0,
                            source="optim/adamw.py")  # fmt: skip
    rank_layers_per_step: int = opt(1, "matrices regularised in each step, drawn at random", low=1,
                                    source="optim/adamw.py")  # fmt: skip
    memory: str = opt("scatter", "gradients of the chosen entries only, or masked dense ones",
                      choices=("scatter", "dense"),
                      source="official code: both")  # fmt: skip
    reset_moments: bool | None = opt(
        None, "at re-selection forget the optimizer's moments and skip that update; null: as the official code, "
        "yes for scatter and no for dense",
        source="optim/adamw.py: yes; optim/adamw2.py: no",
    )  # fmt: skip
    lr: float | None = opt(None, "learning rate; null: 1e-3 exp(-350 threshold), or the trainer's with fraction", low=0,
                           source="optim/adamw.py")  # fmt: skip
    official_sign_quirk: bool = opt(False, "show the network |p| until the first update after each selection",
                                    source="an addition; true: as optim/adamw.py")  # fmt: skip

    trains: ClassVar = "part"
    paper: ClassVar[str] = "SaRA, arXiv 2409.06633 (ICLR 2025)"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.fraction is not None:
            raise UserError(
                f"method.sara takes one of threshold={self.threshold} and fraction={self.fraction}; make one null"
            )
        if self.official_sign_quirk and self.memory == "dense":
            raise UserError("method.sara.official_sign_quirk=true is what memory=scatter does; dense keeps the sign")
        check_options(self, "method.sara")
        self.entries: list[ScatterEntries] = []
        self.updates = 0
        self.switched = False
        self._quirk = self.official_sign_quirk
        self._follows = False
        self._stale = True
        self._versions = -1

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> SaRA:
        """Choose the entries of `model` and make them the only thing that trains; returns self.

        Raises UserError when no entry is below the threshold.
        """
        owners = owners_of(model)
        parameters = dict(model.named_parameters())
        if self.threshold is None:
            self.by_fraction = True
            share = 0.15 if self.fraction is None else self.fraction
            self.theta = threshold_for(parameters.values(), share)
        else:
            self.by_fraction, self.theta = False, self.threshold
        kind = ScatterEntries if self.memory == "scatter" else DenseEntries
        model.requires_grad_(False)
        self.total = sum(p.numel() for p in parameters.values())
        for name, parameter in parameters.items():
            mask = select_below(parameter, self.theta)
            if mask.any():
                self.entries.append(kind(name, parameter, mask, owners[id(parameter)]))
        if not self.entries:
            smallest = min(p.detach().abs().min().item() for p in parameters.values())
            raise UserError(f"method.sara.threshold={self.theta} chooses nothing: no weight is below {smallest:.3g}")
        self.trainable = sum(int(e.mask().sum()) for e in self.entries)
        self._hook = model.register_forward_pre_hook(lambda *_: self.sync())
        self.sync()
        return self

    def optimizer(self, model: nn.Module, total_steps: int | None = None, **options: Any) -> torch.optim.AdamW:
        """Attach to `model` and return an AdamW that applies the whole method; `options` go to AdamW.

        Defaults are the official ones: betas (0.9, 0.999), eps 1e-8, weight decay 1e-2, learning rate by threshold.
        A `progressive_iter` below 1 is a share of `total_steps`; UserError when that is not given.
        """
        after = self.progressive_iter
        if after is not None and 0 < after < 1:
            if total_steps is None:
                raise UserError(f"progressive_iter={after} is a share of the run: pass total_steps=N or a whole number")
            after = round(after * total_steps)
        self.attach(model)
        options.setdefault("lr", self.learning_rate(1e-3))
        adamw = torch.optim.AdamW([e.values for e in self.entries], **options)
        adamw.register_step_pre_hook(lambda made, *_: self.before_update(made, after))
        adamw.register_step_post_hook(lambda *_: self.after_update())
        self._follows = True
        return adamw

    def detach(self) -> None:
        """Put ordinary parameters with the trained values back into the model; this object is done with it."""
        self._hook.remove()
        for entry in self.entries:
            entry.restore()
        self.entries = []

    def learning_rate(self, default: float) -> float:
        """The rate to train with; `default` is used where the official rule does not apply (fraction)."""
        if self.lr is not None:
            return self.lr
        return default if self.by_fraction else auto_lr(self.theta)

    def sync(self) -> None:
        """Bring the dense tensors up to date with the trained entries; called before every forward of the model.

        Nothing is written where nothing changed. An optimizer that does not say when it steps (fused ones leave no
        trace in the version counter either) may do so after any forward with gradients: then every such forward, and
        the one after it, writes.
        """
        training = torch.is_grad_enabled() and not self._follows
        versions = sum(e.values._version for e in self.entries)
        if training or self._stale or versions != self._versions:
            for entry in self.entries:  # this one is not under no_grad itself: it asks whether its caller is
                entry.sync(magnitude=self._quirk)
        self._stale = training
        self._versions = sum(e.values._version for e in self.entries)

    @torch.no_grad()
    def before_update(self, optimizer: Any, switch_after: float | None, seed: int = 0) -> None:
        """What happens between backward and the update: re-selection when it is time, then the low-rank term."""
        if self._quirk:  # the network saw |p|: the chain rule has a sign
            for entry in self.entries:
                if entry.values.grad is not None:
                    entry.values.grad.mul_(entry.values.sign())
            self._quirk = False
        skip = False
        if switch_after is not None and not self.switched and self.updates >= switch_after:
            skip = self.reselect(optimizer)
        if self.lambda_rank and not skip:
            self.add_low_rank_gradient(mix_seed(seed, self.updates))
        self.updates += 1
        self._stale = True

    def after_update(self) -> None:
        """What happens after the update: the dense tensors follow, entries that do not train get their value back."""
        self._stale = True
        self.sync()

    @torch.no_grad()
    def reselect(self, optimizer: Any) -> bool:
        """Freeze the entries that have left the band |p| < threshold; True when this step's update is to be skipped."""
        self.switched = True
        for entry in self.entries:
            entry.sync()
            entry.freeze(select_below(entry.values.flatten(), self.theta) & entry.mask().take(entry.index))
            entry.sync()  # the value they keep is the one before the update
        reset = self.memory == "scatter" if self.reset_moments is None else self.reset_moments
        if reset:
            for entry in self.entries:
                optimizer.state.pop(entry.values, None)
                entry.values.grad = None
            self._quirk = self.official_sign_quirk
        return reset

    def low_rank_entries(self) -> list[ScatterEntries]:
        """The matrices the low-rank term may act on: 2-D, both sides above `rank_min_dim`."""
        return [e for e in self.entries if e.dense.ndim == 2 and min(e.dense.shape) > self.rank_min_dim]

    @torch.no_grad()
    def add_low_rank_gradient(self, seed: int) -> None:
        """Add lambda U V^T of a random matrix's chosen entries to their gradient (step 3 of the official update)."""
        eligible = self.low_rank_entries()
        order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in order[: self.rank_layers_per_step]:
            entry, mask = eligible[i], eligible[i].mask()
            if int(mask.sum()) > MIN_ENTRIES:
                current = torch.zeros_like(entry.dense).put_(entry.index, entry.values.detach()) * mask
                entry.add_grad(self.lambda_rank * nuclear_subgradient(current) * mask)

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        run.claim(self, run.weights.values())
        self.attach(run.model)
        self._follows = True

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        rate = self.learning_rate(run.trainer.lr)
        return [{"params": [e.values for e in self.entries], "lr": rate}]

    def after_backward(self, run: Run) -> None:
        after = self.progressive_iter
        if after is not None and after < 1:
            after = round(after * sum(p.steps for p in run.phases))
        self.before_update(getattr(run.optimizer, "optimizer", run.optimizer), after, run.seed)

    def after_step(self, run: Run) -> None:
        self.after_update()

    def before_eval(self, run: Run) -> None:
        self.sync()  # a loaded state takes the frozen values now, before averaged weights are swapped in

    def finish(self, run: Run) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        active = {e.name: e.active for e in self.entries} if self.switched else {}
        counts = {"updates": self.updates, "switched": self.switched, "theta": self.theta, "quirk": self._quirk}
        return {**counts, "active": active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["theta"] != self.theta:
            raise UserError(f"method.sara: saved with threshold {state['theta']}, but this base gives {self.theta}")
        self.updates, self.switched = state["updates"], state["switched"]
        self._quirk, self._stale = state["quirk"], True
        for entry in self.entries:
            if entry.name in state["active"]:
                entry.freeze(state["active"][entry.name])

    def report(self, run: Run) -> dict[str, float | int | str]:
        active = sum(int(e.mask().sum()) for e in self.entries)
        return {
            "threshold": self.theta,
            "selected_weights": self.trainable,
            "selected_share": self.trainable / self.total,
            "trained_after_reselection": active,
            "low_rank_matrices": len(self.low_rank_entries()) if self.lambda_rank else 0,
        }
