"""MaskSparsity: Pruning-aware Sparse Regularization for Network Pruning (Jiang et al., 2022, arXiv 2201.06776).

Machine Intelligence Research 2023, doi 10.1007/s11633-022-1353-0; official code CASIA-IVA-Lab/MaskSparsity
(``netslim/sparse.py``, ``netslim/prune.py``). Network slimming weighs on every batch norm scale; here it runs once to
say which channels are doomed, and then a second training penalises those alone, so that the channels that stay learn
undisturbed and the ones that go are near zero. Four phases: global sparsity, mask, masked sparsity from the dense
weights again, removal and fine-tuning.

Where this differs from the official code, on purpose: a residual group whose vote would remove all its channels keeps
the strongest one (there the layer would be empty). Option-A ResNets lose inner channels only.

Alone, on any model with batch norms, in a few lines (`images` finds the layers that share channels):

>>> method = MaskSparsity(); method.attach(model, images[:1])  # doctest: +SKIP
>>> loss.backward(); method.regularise(); optimizer.step()  # first training: all scales  # doctest: +SKIP
>>> method.choose(model, images[:1])  # load the dense weights, train again: now doomed only  # doctest: +SKIP
>>> method.prune(model, images[:1])  # then fine-tune with a new optimizer  # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.errors import Unfit, UserError
from filtrun.methods.pruning.base import Pruning, total_steps
from filtrun.methods.pruning.bn_penalty import add_penalty
from filtrun.methods.pruning.channel_groups import Group
from filtrun.methods.pruning.forward_inputs import example_inputs
from filtrun.methods.pruning.removal import from_hex, tensors_of, to_hex
from filtrun.methods.pruning.scale_masks import energy_threshold, group_keep, mean_scales, voters
from filtrun.methods.pruning.slim import Channels
from filtrun.options import opt
from filtrun.trainer import Phase

if TYPE_CHECKING:
    from filtrun.context import Run


@dataclass
class MaskSparsity(Pruning):
    """Sparse regularisation of the channels that a first sparse training has marked, then their removal.

    The threshold is absolute, as in the paper; `macs` instead finds the one that removes a given share of the
    multiply-adds, so that methods can be compared at equal cost.
    """

    s: float = opt(5e-4, "weight of the penalty on the scales, in both sparse phases", low=0, source="mask_sparsity.sh")
    threshold: float = opt(0.01, "channels with a scale at most this go (rule th)", low=0, source="prune.sh")
    rule: str = opt("th", "threshold as given, or by each layer's energy", choices=("th", "energy"), source="prune.sh")
    energy: float = opt(1e-4, "share of a layer's squared scales that may go (rule energy)", low=0, high=1,
                        source="netslim/prune.py")  # fmt: skip
    macs: float | None = opt(None, "share of the multiply-adds to remove; null: by the rule", low=0, high=1)
    penalty: str = opt("l1", "penalty on the scales", choices=("l1", "l2", "smooth_l1"), source="config.py")
    residual: bool = opt(True, "also prune channels that residual sums share, by vote", source="prune.sh")
    restart: str = opt("dense", "weights the masked phase starts from: those the run began with, or the sparse ones",
                       choices=("dense", "sparse"), source="paper")  # fmt: skip
    global_share: float = opt(0.3, "share of the steps in the global sparsity phase", low=0, high=1)
    masked_share: float = opt(0.4, "share of the steps in the masked phase; the rest is fine-tuning", low=0, high=1)
    finetune_lr: float | None = opt(None, "learning rate of fine-tuning; null: the trainer's", low=0,
                                    source="ImageNet: 5e-4 after 0.1")  # fmt: skip
    ignore: list[str] = opt([], "layers whose channels stay")

    paper: ClassVar[str] = "MaskSparsity, arXiv 2201.06776 (Machine Intelligence Research 2023)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_share + self.masked_share > 1:
            raise UserError(
                f"masked_share={self.masked_share} and global_share={self.global_share} must not add up to more than 1"
            )
        self.scales: dict[str, nn.Parameter] = {}
        self.doomed: dict[str, Tensor] | None = None  # None: all scales are penalised
        self.start: dict[str, Tensor] = {}
        self.numbers: dict[str, float] = {}

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, *inputs: Any, **named: Any) -> MaskSparsity:
        """Find the scales that are penalised: those of the channels that could be removed. Returns self."""
        self.model = model
        modules = dict(model.named_modules())
        groups = self.groups(Channels(model, *inputs, kwargs=named, ignore=self.ignore))
        self.scales = {p.layer: cast(nn.Parameter, modules[p.layer].weight) for g in groups for p in g.norms}
        if not self.scales:
            raise Unfit("masksparsity needs channels with a batch norm behind them, and this model has none to remove")
        return self

    def groups(self, channels: Channels) -> list[Group]:
        """The groups this method may prune: with a batch norm, and residual ones only if asked for."""
        return [g for g in channels.groups if g.norms and (self.residual or len(voters(g)) == 1)]

    def regularise(self, lr: float = 0.0) -> None:
        """Add the penalty to the scales' gradients: to all before `choose`, to those of doomed channels after it."""
        for name, gamma in self.scales.items():
            if self.doomed is None or name in self.doomed:
                add_penalty(gamma, self.s, None if self.doomed is None else self.doomed[name], self.penalty, lr)

    def keeps(self, channels: Channels) -> list[Tensor]:
        """Keep vector (size,) of every group of `channels`, by the scales as they are now."""
        if self.macs is None:
            return self._keeps(channels, None)
        dense = channels.layer_macs()
        goal = (1 - self.macs) * sum(dense.values())
        levels = torch.cat([g.scales(part) for g in self.groups(channels) for part in voters(g)]).unique().tolist()
        low, high = 0, len(levels) - 1
        while low < high:  # the smallest threshold that saves enough; the largest, where none does
            middle = (low + high) // 2
            drop = [(~keep).nonzero().flatten() for keep in self._keeps(channels, levels[middle])]
            low, high = (low, middle) if channels.macs(drop, dense) <= goal else (middle + 1, high)
        return self._keeps(channels, levels[low])

    def _keeps(self, channels: Channels, threshold: float | None) -> list[Tensor]:
        mine = {group.name for group in self.groups(channels)}
        found = []
        for group in channels.groups:
            if group.name not in mine:
                found.append(torch.ones(group.size, dtype=torch.bool))
                continue
            limits = [self._limit(group.scales(part)) if threshold is None else threshold for part in voters(group)]
            found.append(group_keep(group, limits))
        return found

    def _limit(self, scales: Tensor) -> float:
        return self.threshold if self.rule == "th" else energy_threshold(scales, self.energy)

    def choose(self, model: nn.Module, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Mark the doomed channels by the scales as they are; returns keep vectors by batch norm, of those with any."""
        channels = Channels(model, *inputs, kwargs=named, ignore=self.ignore)
        keeps = self.keeps(channels)
        self.numbers |= mean_scales(channels.groups, keeps, "_when_marked")
        self.doomed = {}
        for group, keep in zip(channels.groups, keeps, strict=True):
            for part in group.norms if not keep.all() else []:
                gone = torch.zeros_like(self.scales[part.layer], dtype=torch.bool)
                gone[part.index] = ~keep[part.root].to(gone.device)
                self.doomed[part.layer] = gone
        return {name: ~gone for name, gone in self.doomed.items()}

    def prune(self, model: nn.Module, *inputs: Any, **named: Any) -> MaskSparsity:
        """Remove the channels whose scales are at or below the threshold now; returns self."""
        channels = Channels(model, *inputs, kwargs=named, ignore=self.ignore)
        keeps = self.keeps(channels)
        self.numbers["channels"] = sum(len(keep) for keep in keeps)
        self.numbers["channels_left"] = sum(int(keep.sum()) for keep in keeps)
        self.numbers |= mean_scales(channels.groups, keeps)
        with self.naming_others():
            removal = channels.remove([(~keep).nonzero().flatten() for keep in keeps])
        self.take_out(model, removal)
        return self

    # -- hooks -------------------------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        super().prepare(run)
        args, kwargs = example_inputs(run)
        self.attach(run.model, *args, **kwargs)
        self.claim_channels(run, Channels(run.model, *args, kwargs=kwargs, ignore=self.ignore).groups)

    def edit_model(self, run: Run) -> None:
        for gamma in self.scales.values():  # also beside a method that freezes the rest
            gamma.requires_grad_(True)

    def phases(self, run: Run) -> list[Phase] | None:
        total = total_steps(run)
        first, second = int(self.global_share * total), int(self.masked_share * total)
        if self.restart == "dense":
            self.start = {name: t.detach().clone() for name, t in tensors_of(run.model).items()}
        return [
            Phase("global sparsity", first), Phase("masked sparsity", second),
            Phase("fine-tune", total - first - second, self.finetune_lr),
        ]  # fmt: skip

    def start_phase(self, run: Run) -> None:
        assert run.phase is not None
        if run.phase.name == "masked sparsity":
            args, kwargs = example_inputs(run)
            self.choose(run.model, *args, **kwargs)
            with torch.no_grad():
                for name, tensor in tensors_of(run.model).items():
                    if name in self.start:
                        tensor.copy_(self.start[name])
            runner.refit(run)
        elif run.phase.name == "fine-tune":
            args, kwargs = example_inputs(run)
            self.prune(run.model, *args, **kwargs)
            self.start = {}
            runner.refit(run)
            self.judge(run)

    def after_backward(self, run: Run) -> None:
        if run.phase is not None and run.phase.name.endswith("sparsity"):
            self.regularise(run.optimizer.param_groups[0]["lr"])

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {**super().report(run), **self.numbers}

    def state_dict(self) -> dict[str, Any]:
        doomed = None if self.doomed is None else {name: to_hex(gone) for name, gone in self.doomed.items()}
        return {**super().state_dict(), "doomed": doomed, "numbers": self.numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.numbers = dict(state["numbers"])
        self.doomed = None
        if state["doomed"] is not None:
            self.doomed = {name: from_hex(t).to(self.scales[name].device) for name, t in state["doomed"].items()}
