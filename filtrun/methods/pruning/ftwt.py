"""FTWT: Fire Together Wire Together, dynamic pruning with self-supervised mask prediction.

Elkerdawy, Elhoushi, Zhang and Ray, CVPR 2022 (arXiv 2110.08232); official code selkerdawy/FTWT. Every convolution with
batch norm gets a tiny predictor that guesses, from the layer's input, which of its filters will fire for this sample;
the others are multiplied by zero. What it should have guessed follows from the layer's own output, so it is taught by
plain binary classification, and the number of operations left can be told before training.

The gate has no gradient: the task's loss never trains a predictor. In decoupled mode the predictors' loss trains
nothing else; in joint mode it also reaches the layers before. If one filter holds more than `r` of the sum of peaks,
the target drops all filters. Gated outputs are computed and then zeroed: nothing gets faster by itself, and the record
says how many multiply-adds could be left out, by two rules:

- ``flops_official``: the paper's counter. A layer pays for the filters kept in the gated layer before it, also where a
  residual sum fills the others again, and a depthwise layer pays nothing unless all are kept: too low for ResNets and
  MobileNets (``gt_after_block=true`` gates behind the sum instead).
- ``flops_executable``: only channels that no branch can fill are skipped.

Where this differs from the official code: the mask loss stops at a share of the optimizer steps instead of whole
epochs; at ``r < 0`` gates are open (there predictors are only taught to open them); reductions are shares of the gated
layers' own operations, without biases and classifier. As there, predictors are stepped by an SGD of their own, without
schedule, weight decay or clipping, whatever `trainer.optimizer` is. The projection of a shortcut is not gated.

Alone, on any model with batch norms, in two lines (``gates.optimizer()`` steps the predictors):

>>> gates = FTWT(r=0.9).attach(model, images[:1])  # doctest: +SKIP
>>> loss = F.cross_entropy(model(images), labels) + gates.mask_loss()  # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.cost import operations
from filtrun.errors import Unfit, UserError, closest
from filtrun.method import Method
from filtrun.methods.pruning import gates
from filtrun.methods.pruning.base import SCORING_EPOCH
from filtrun.methods.pruning.forward_inputs import example_inputs
from filtrun.methods.pruning.gate_count import GateCounter
from filtrun.methods.pruning.gate_places import find_units
from filtrun.methods.pruning.gate_sgd import load_momenta, loss_scale, momenta_of, step_apart
from filtrun.methods.pruning.gates import Gate, MaskPredictor
from filtrun.options import check_options, opt

if TYPE_CHECKING:
    from filtrun.context import Run

CHILD = "mask_gate"


@dataclass
class FTWT(Method):
    """Per-sample filter gates whose predictors learn from the layers' own outputs (arXiv 2110.08232)."""

    r: float = opt(0.9, "mass: share of a sample's sum of peaks to keep; uniform: share of the filters to drop; "
                   "below 0: all gates open", low=-1, high=1, source="README: 0.8 to 0.92 on CIFAR")  # fmt: skip
    gt_type: str = opt("mass", "how targets are chosen", choices=("mass", "uniform"), source="cifar.py")
    mode: str = opt("decoupled", "joint: the mask loss also trains the layers before", choices=("decoupled", "joint"),
                    source="cifar.py")  # fmt: skip
    pool: str = opt("avg", "pooling in the predictor; max as the paper draws it", choices=("avg", "max"),
                    source="utils/layers.py")  # fmt: skip
    embedding: int = opt(-1, "inputs of a predictor, about; -1: one per channel", low=-1, source="cifar.py")
    softmax: bool = opt(True, "softmax over the pooled inputs", source="cifar.py")
    head_init: str = opt("random", "ones: predictors that start with all gates open", choices=("random", "ones"),
                         source="cifar.py; there ones are trained for 500 batches")  # fmt: skip
    gt_after_block: bool = opt(False, "gate a residual block behind its sum", source="cifar.py")
    weight: float = opt(1.0, "weight of the mask loss", low=0, source="cifar.py")
    cooldown: float = opt(0.5, "share of the steps with the mask loss", low=0, high=1, source="cifar.py")
    mask_lr: float = opt(0.1, "learning rate of the predictors' own SGD, never scheduled", low=0, source="cifar.py")
    mask_momentum: float = opt(0.9, "momentum of that SGD", low=0, high=1, source="cifar.py")
    estimate_batches: int = opt(4, "training batches the cost is predicted from before training", low=0)
    ignore: list[str] = opt([], "layers to leave alone: names, ends of names, regular expressions")

    trains: ClassVar = "all"
    tasks: ClassVar[tuple[str, ...] | None] = ("classify",)
    identity_at_start: ClassVar[bool] = False
    unused_params: ClassVar[bool] = True  # a layer that is closed for a whole batch
    paper: ClassVar[str] = "Fire Together Wire Together, arXiv 2110.08232 (CVPR 2022)"

    def __post_init__(self) -> None:
        check_options(self, "method.ftwt")
        if self.embedding == 0:
            raise UserError("method.ftwt.embedding=0 is not allowed; take -1 (one input per channel) or at least 1")
        self.gates: list[Gate] = []
        self.counter: GateCounter | None = None
        self.predicted: dict[str, float] = {}
        self.sgd: torch.optim.SGD | None = None
        self.other_macs = 0.0

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, *args: Any, **kwargs: Any) -> FTWT:
        """Put gates into `model`, found by running it on ``model(*args, **kwargs)``; returns self.

        Parameters keep their names; a gate is a child of its convolution.

        Raises:
            Unfit: the model has no convolution with a batch norm. UserError: `ignore` names no such layer.
        """
        if self.gates or any(CHILD in module._modules for module in model.modules()):
            raise UserError("this model or method has gates already: attach a method once, to one model")
        units, flow = find_units(model, lambda: model(*args, **kwargs), self.gt_after_block)
        ignored = self._ignored([unit.name for unit in units])
        kept = [unit for unit in units if unit.name not in ignored]
        if not kept:
            raise Unfit(
                f"{type(model).__name__} has no convolution with a batch norm to gate; take resnet20 or vgg16_bn"
            )
        for unit in units:
            if unit.name in ignored:
                flow.nodes[unit.node] = ("all", unit.conv.out_channels)
            else:
                flow.nodes[unit.node] = ("gate", kept.index(unit))
                self._put(unit.conv, unit.gated, unit.activation)
        self.counter = GateCounter(model, kept, flow, self.gates)
        return self

    def _put(self, conv: nn.Conv2d, gated: nn.Module, activation: str) -> None:
        predictor = MaskPredictor(conv.in_channels, conv.out_channels, self.pool, self.embedding, self.softmax)
        if self.head_init == "ones":
            nn.init.zeros_(predictor.head.weight)
            nn.init.ones_(predictor.head.bias)  # type: ignore[arg-type]
        gate = Gate(predictor, activation, self.gt_type, self.r, self.mode == "joint")
        gate.to(conv.weight.device).train(conv.training)
        conv.add_module(CHILD, gate)
        conv.register_forward_pre_hook(gate.look)
        gated.register_forward_hook(gate.act)
        self.gates.append(gate)

    def _ignored(self, names: list[str]) -> set[str]:
        found: set[str] = set()
        for pattern in self.ignore:
            hit = {n for n in names if n == pattern or n.endswith(f".{pattern}") or re.fullmatch(pattern, n)}
            if not hit:
                raise UserError(f"method.ftwt.ignore={pattern!r} names no gated layer{closest(pattern, names)}")
            found |= hit
        return found

    def predictors(self) -> list[nn.Parameter]:
        """The parameters of all predictors."""
        return [p for gate in self.gates for p in gate.parameters()]

    def optimizer(self) -> torch.optim.SGD:
        """The SGD of the predictors: `mask_lr`, `mask_momentum`, no weight decay; step it beside the model's own."""
        return torch.optim.SGD(self.predictors(), lr=self.mask_lr, momentum=self.mask_momentum, weight_decay=0.0)

    def mask_loss(self) -> Tensor:
        """Loss of the predictors in the last forward pass, and forget that pass."""
        logits = [gate.logits for gate in self.gates if gate.logits is not None]
        targets = [gate.target for gate in self.gates if gate.target is not None]
        if len(logits) < len(self.gates) or len(targets) < len(self.gates):
            raise UserError("method=ftwt: the loss of the masks needs a forward pass through all gated layers first")
        loss = gates.mask_loss(logits, targets)
        for gate in self.gates:
            gate.forget()
        return loss

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Inside, all gates are open, and what is counted are the targets."""
        states = [gate.state for gate in self.gates]
        try:
            for gate in self.gates:
                gate.state = "observe"
            yield
        finally:
            for gate, state in zip(self.gates, states, strict=True):
                gate.state = state

    @contextmanager
    def counting(self) -> Iterator[GateCounter]:
        """Inside, forward passes are counted from zero."""
        assert self.counter is not None, "attach the method first"
        self.counter.start()
        try:
            yield self.counter
        finally:
            self.counter.stop()

    # -- hooks -------------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        with run.plainly():
            dense = operations(lambda: run.task.probe(run))["macs"]
        args, kwargs = example_inputs(run)
        self.attach(run.model, *args, **kwargs)
        assert self.counter is not None
        self.other_macs = dense - self.counter.dense + sum(gate.predictor.macs for gate in self.gates)
        self.sgd = self.optimizer()
        if self.estimate_batches and run.train_split is not None:
            self.predict(run)

    def predict(self, run: Run) -> None:
        """Count what the targets would leave of the model as it is, on training images: `predicted`."""
        with run.plainly(), self.observing(), self.counting() as counter:
            for i in range(min(self.estimate_batches, run.steps_per_epoch)):
                run.task.loss(run, next(iter(run.batches(SCORING_EPOCH, skip=i))))
            counter.reduce(run)
            self.predicted = counter.result()
        for gate in self.gates:
            gate.forget()

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        """Keeps predictors out of the default group; their gradients are taken before that optimizer steps."""
        return [{"params": self.predictors(), "lr": self.mask_lr, "weight_decay": 0.0}]

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        total = sum(phase.steps for phase in run.phases)
        return loss + self.weight * gates.mask_weight(run.step, total, self.cooldown) * self.mask_loss()

    def after_backward(self, run: Run) -> None:
        assert self.sgd is not None
        step_apart(self.sgd, loss_scale(run))

    def before_eval(self, run: Run) -> None:
        if self.counter is not None:
            self.counter.start()

    def after_eval(self, run: Run) -> None:
        if self.counter is not None:
            self.counter.stop()
        for gate in self.gates:
            gate.forget()

    def report(self, run: Run) -> dict[str, float | int | str]:
        assert self.counter is not None
        if not self.counter.images:
            with run.plainly(), self.counting():
                run.task.probe(run)
        counted = self.counter.copy()
        counted.reduce(run)
        measured = counted.result()
        found: dict[str, float | int | str] = {
            **measured,
            **{f"predicted_{name}": self.predicted[name] for name in _PREDICTED if name in self.predicted},
            "macs": measured["flops_executable"] + self.other_macs,
            "layers": len(self.gates),
            "predictor_params": sum(p.numel() for p in self.predictors()),
        }
        if self.predicted:
            found["prediction_error"] = measured["reduction_official"] - self.predicted["reduction_official"]
        return found

    def state_dict(self) -> dict[str, Any]:
        assert self.sgd is not None
        return {"predicted": self.predicted, "momenta": momenta_of(self.sgd)}

    def delta_state(self) -> dict[str, Any]:
        return {"predicted": self.predicted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.predicted = dict(state.get("predicted", self.predicted))
        if momenta := state.get("momenta"):
            assert self.sgd is not None
            load_momenta(self.sgd, momenta)


_PREDICTED = ("flops_official", "flops_executable", "reduction_official", "reduction_executable", "kept_share")
