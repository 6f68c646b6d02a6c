"""Training BatchNorm and Only BatchNorm: On the Expressive Power of Random Features in CNNs (ICLR 2021, arXiv
2003.00152; official code facebookresearch/open_lth).

Every weight stays at its random start and only the scale gamma and shift beta of the batch norms train; running
statistics follow the data as usual. At a start from nothing gamma is drawn from U(0, 1) and beta is zero, as in the
paper; a pre-trained base keeps its own (`init`). `control` gives the paper's comparisons: two random weights per
channel (as many numbers), the output layer, everything.

Alone, on any model with batch norm:

>>> bn = BNOnly(init="uniform").attach(model)    # doctest: +SKIP
>>> ...                                          # train the parameters that require a gradient
>>> share_below(bn.gammas, 0.01)                 # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.errors import UserError, closest
from filtrun.method import Method
from filtrun.options import check_options, opt
from filtrun.sparse_entries import ScatterEntries, owners_of

if TYPE_CHECKING:
    from filtrun.context import Run

INITS = ("auto", "keep", "uniform", "ones", "oneone", "positivenegative")


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Every batch norm with a scale and a shift, in definition order."""
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [m for m in found if m.weight is not None and m.bias is not None]


@torch.no_grad()
def init_batch_norm(module: nn.Module, kind: str) -> None:
    """Set gamma and beta anew, as the official code's initialisers of these names do.

    Args:
        kind: "uniform" gamma ~ U(0, 1), beta 0; "ones" (their ``fixed``) 1 and 0; "oneone" 1 and 1;
            "positivenegative" gamma ~ U(-1, 1), beta 0.
    """
    norm: Any = module
    norm.bias.fill_(1.0 if kind == "oneone" else 0.0)
    if kind in ("ones", "oneone"):
        norm.weight.fill_(1.0)
    else:  # drawn on the CPU: the same numbers on every device
        drawn = torch.rand(norm.weight.shape).to(norm.weight)
        norm.weight.copy_(drawn * 2 - 1 if kind == "positivenegative" else drawn)


def share_below(gammas: Iterable[Tensor], cut: float) -> float:
    """Share of all channels with |gamma| < cut: features that are switched off."""
    flat = torch.cat([g.detach().flatten() for g in gammas])
    return (flat.abs() < cut).float().mean().item()


def random_entries(weight: Tensor, per_channel: int) -> Tensor:
    """Bool mask of a weight's shape: `per_channel` random entries in every output channel (all, if it has fewer)."""
    scores = torch.rand(weight.shape[0], weight[0].numel())
    chosen = scores.topk(min(per_channel, scores.shape[1]), dim=1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True).view(weight.shape).to(weight.device)


def normalised_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of every convolution, the layers whose channels batch norm scales."""
    convs = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    return {f"{name}.weight".lstrip("."): m.weight for name, m in convs.items() if isinstance(m.weight, nn.Parameter)}


@dataclass
class BNOnly(Method):
    """Train the scales and shifts of batch norm, and only them (Frankle, Schwab, Morcos, arXiv 2003.00152)."""

    control: str = opt("bn", "what trains: bn; or for comparison random2 (two random weights per channel of every "
                       "convolution), output (the head alone), all", choices=("bn", "random2", "output", "all"),
                       source="paper")  # fmt: skip
    head: bool = opt(False, "also train the classification head", source="paper: frozen; trained too in a comparison")
    also: list[str] = opt([], "further tensors that train: names, ends of names or regular expressions",
                          source="official code: others_frozen_exceptions, for shortcut convolutions")  # fmt: skip
    init: str = opt("auto", "start of gamma and beta; auto: uniform for a base from scratch, else as they are",
                    choices=INITS, source="official code: uniform")  # fmt: skip
    cut: float = opt(0.01, "a channel whose |gamma| is below this counts as switched off", low=0,
                     source="ours; the paper's value could not be checked")  # fmt: skip

    trains: ClassVar = "part"
    identity_at_start: ClassVar = False
    paper: ClassVar[str] = "Training BatchNorm and Only BatchNorm, arXiv 2003.00152 (ICLR 2021)"

    def __post_init__(self) -> None:
        check_options(self, "method.bn_only")
        if self.control == "all":
            self.trains = "all"  # type: ignore[assignment, misc]
        self.norms: list[nn.Module] = []
        self.entries: list[ScatterEntries] = []
        self.below_at_start = 0.0
        self._measured: tuple[int, float] | None = None
        self._hook: Any = None

    @property
    def gammas(self) -> list[nn.Parameter]:
        """The scales of all batch norms."""
        return [n.weight for n in self.norms]  # type: ignore[misc]

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, head: Iterable[nn.Parameter] = (), scratch: bool = False) -> BNOnly:
        """Freeze `model` but for what trains; returns self.

        Args:
            head: the parameters of the classification head.
            scratch: whether the model is fresh, for ``init="auto"``.

        Raises:
            UserError: no batch norm, or a name in `also` that matches nothing.
        """
        model.requires_grad_(False)
        self._insert(model, list(head), scratch)
        return self

    def _insert(self, model: nn.Module, head: list[nn.Parameter], scratch: bool) -> None:
        self.norms = batch_norms(model)
        if not self.norms:
            raise UserError(
                f"method=bn_only trains batch norm, but {type(model).__name__} has none with a scale and a shift; use "
                "model=resnet20, vgg16_bn, mobilenetv2, or a model of timm that has it"
            )
        if self.control == "output" and not head:
            raise UserError("method.bn_only.control=output needs a model with a classification head; use task=classify")
        kind = ("uniform" if scratch else "keep") if self.init == "auto" else self.init
        if kind != "keep":
            for norm in self.norms:
                init_batch_norm(norm, kind)
        self.below_at_start = share_below(self.gammas, self.cut)
        parameters = dict(model.named_parameters())
        if self.control == "all":
            model.requires_grad_(True)
        for parameter in (*self._chosen(parameters), *head):
            parameter.requires_grad_(True)
        if self.control == "random2":
            self._train_random(model, parameters)

    def _chosen(self, parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
        found = [p for n in self.norms for p in (n.weight, n.bias)] if self.control == "bn" else []
        for text in self.also:
            try:
                pattern = re.compile(text)
            except re.error as error:
                raise UserError(f"method.bn_only.also={text!r} is no regular expression: {error}") from error
            matches = [p for n, p in parameters.items() if n == text or n.endswith(f".{text}") or pattern.fullmatch(n)]
            if not matches:
                raise UserError(f"method.bn_only.also={text!r} matches no tensor{closest(text, parameters)}")
            found += matches
        return found  # type: ignore[return-value]

    def _train_random(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        owners, names = owners_of(model), {id(p): n for n, p in parameters.items()}
        for name, weight in normalised_weights(model).items():
            if id(weight) in names and not weight.requires_grad:
                self.entries.append(ScatterEntries(name, weight, random_entries(weight, 2), owners[id(weight)]))
        self._hook = model.register_forward_pre_hook(self._sync)

    def _sync(self, *_: Any) -> None:
        for entry in self.entries:
            entry.sync()

    def detach(self) -> None:
        """Put ordinary parameters back where single entries trained."""
        if self._hook is not None:
            self._hook.remove()
        for entry in self.entries:
            entry.restore().requires_grad_(False)
        self.entries = []

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        head = run.task.head(run.model) if self.head or self.control in ("output", "all") else []
        self._insert(run.model, head, scratch=run.config.get("model", {}).get("base") == "scratch")
        kept = {id(p) for p in head}
        claimed: list[Any] = [p for n in self.norms for p in (n.weight, n.bias)] if self.control != "all" else []
        claimed += [entry.parameter for entry in self.entries]
        run.claim(self, [p for p in claimed if id(p) not in kept])

    def after_step(self, run: Run) -> None:
        self._sync()

    def finish(self, run: Run) -> None:
        self.detach()

    def report(self, run: Run) -> dict[str, float | int | str]:
        found: dict[str, float | int | str] = {
            "bn_params": sum(p.numel() for n in self.norms for p in (n.weight, n.bias)),  # type: ignore[operator, misc]
            "gamma_below_cut": share_below(self.gammas, self.cut),
            "gamma_below_cut_at_start": self.below_at_start,
        }
        accuracy = self._accuracy_without(run)
        return found if accuracy is None else {**found, "accuracy_without_disabled": accuracy}

    @torch.no_grad()
    def _accuracy_without(self, run: Run) -> float | None:
        """Accuracy with every gamma below the cut set to zero; None where it is not evaluated."""
        if run.task.kind != "classify" or not run.trainer.evaluate:
            return None
        version = sum(g._version for g in self.gammas)
        if self._measured is None or self._measured[0] != version:
            with run.evaluating():  # inside: averaged weights may have come in
                kept = [g.detach().clone() for g in self.gammas]
                for gamma in self.gammas:
                    gamma.masked_fill_(gamma.abs() < self.cut, 0)
                accuracy = run.task.evaluate(run)["accuracy"]
                for gamma, old in zip(self.gammas, kept, strict=True):
                    gamma.copy_(old)
            self._measured = sum(g._version for g in self.gammas), accuracy
        return self._measured[1]
