"""How long, how fast and how precisely a run trains: options, optimizer, schedule, phases."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from filtrun.errors import UserError
from filtrun.optimizers import SCALES, AuON, Muon, Together
from filtrun.options import opt
from filtrun.speed import SPEEDS

MATRIX_RULES = {"muon": Muon, "auon": AuON}
"""Optimizers of weight matrices; everything else is updated by ``trainer.others``."""


@dataclass
class Trainer:
    """Training options; the batch size is global: each process gets its share of it."""

    steps: int | None = opt(300, "optimizer steps; null to count in epochs", low=0)
    epochs: float | None = opt(None, "passes over the training split, if steps is null", low=0)
    batch_size: int = opt(64, "images per optimizer step, over all processes and accumulation", low=1)
    accumulate: int = opt(1, "micro-batches one step's batch is cut into, to save memory", low=1)
    lr: float = opt(1e-3, "peak learning rate", low=0)
    weight_decay: float = opt(0.01, "decoupled weight decay (adamw, muon, auon), or L2 (adam, sgd)", low=0)
    optimizer: str = opt("adamw", "update rule", choices=("adamw", "adam", "sgd", "muon", "auon"))
    betas: list[float] = opt([0.9, 0.999], "moment decay of adam and adamw")
    eps: float = opt(1e-8, "term in the denominator of adam and adamw", low=0)
    momentum: float = opt(0.9, "momentum of sgd", low=0, high=1)
    nesterov: bool = opt(True, "Nesterov momentum for sgd")
    others: str = opt("adamw", "muon, auon: rule for vectors, embeddings and the head", choices=("adamw", "sgd"))
    matrix_momentum: float = opt(0.95, "muon, auon: Nesterov momentum", low=0, high=1)
    matrix_steps: int | None = opt(
        None, "Newton-Schulz steps of an update; null: 5 for muon, 0 for auon; 1: Hybrid-AuON", low=0, high=20
    )
    matrix_scale: str = opt(
        "adamw", "muon, auon: steps as large as AdamW's at the same lr, or the papers' own (lr 0.02)", choices=SCALES
    )
    matrix_rescale: bool = opt(False, "muon, auon: bring each matrix to the norm sqrt(rows) before its step")
    schedule: str = opt("cosine", "learning rate after warm-up", choices=("constant", "cosine", "linear"))
    warmup: int = opt(0, "steps of linear warm-up", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0 for no clipping", low=0)
    ema: float = opt(0.0, "decay of averaged weights used for evaluation; 0 for none", low=0, high=0.999999)
    precision: str = opt("32", "arithmetic of forward and backward", choices=("32", "bf16", "16"))
    speed: str = opt(
        "off", "auto: time layouts and torch.compile, keep the fastest; max: both, CUDA graphs and bf16", choices=SPEEDS
    )
    devices: int = opt(1, "processes on this machine", low=1)
    nodes: int = opt(1, "machines", low=1)
    compile: bool = opt(False, "torch.compile the model for training")
    channels_last: bool = opt(False, "channels-last memory layout")
    checkpoint_activations: bool = opt(
        False, "blocks compute their activations again in the backward pass: less memory, about a third more time"
    )
    log_every: int = opt(20, "steps between log lines", low=1)
    checkpoint_every: int = opt(200, "steps between checkpoints; 0 for none", low=0)
    evaluate: bool = opt(True, "evaluate before and after training")
    evaluations: int = opt(0, "evaluations while training, spread evenly; logged as tuned/NAME", low=0)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                f"set exactly one of trainer.steps={self.steps} and trainer.epochs={self.epochs}; make the other null"
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"trainer.betas={self.betas} must be two numbers in [0, 1)")
        if self.accumulate and self.batch_size % self.accumulate:
            raise UserError(
                f"trainer.batch_size={self.batch_size} is no multiple of trainer.accumulate={self.accumulate}"
            )
        if self.batch_size % (self.devices * self.nodes):
            raise UserError(
                f"trainer.batch_size={self.batch_size} is shared by {self.devices * self.nodes} processes; "
                f"take a multiple of {self.devices * self.nodes}"
            )

        if self.speed == "max" and self.precision == "32":
            self.precision = "bf16"

    def total_steps(self, images: int) -> int:
        """Optimizer steps of the whole training on a split of `images` images (incomplete batches are dropped)."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 0) * max(1, images // self.batch_size))


@dataclass
class Phase:
    """A stretch of training with its own schedule, e.g. regularise, then fine-tune.

    `steps` optimizer steps with peak learning rate `lr`, `schedule` and `warmup` (None: the trainer's).
    """

    name: str
    steps: int
    lr: float | None = None
    schedule: str | None = None
    warmup: int | None = None


def make_optimizer(
    trainer: Trainer, groups: list[dict[str, Any]], apart: Iterable[torch.Tensor] = ()
) -> torch.optim.Optimizer:
    """The optimizer over `groups`; each remembers its peak learning rate as ``base_lr``.

    With muon or auon a group is split into its matrices and the rest; `apart` are matrices that count as the rest, and
    so do those of a group with ``rule="others"``.
    """
    for group in groups:
        group.setdefault("lr", trainer.lr * group.get("lr_factor", 1.0))
        group.setdefault("weight_decay", trainer.weight_decay)
    rule = MATRIX_RULES.get(trainer.optimizer)
    if rule is None:
        made = _elementwise(trainer, trainer.optimizer, groups)
    else:
        groups = _split(groups, {id(p) for p in apart})
        if not any(group["rule"] == "matrix" for group in groups):
            raise UserError(
                f"trainer.optimizer={trainer.optimizer} updates matrices, and none trains here; use {trainer.others}"
            )

        def matrices(part: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return rule(
                part, trainer.lr, momentum=trainer.matrix_momentum, steps=trainer.matrix_steps,
                scale=trainer.matrix_scale, rescale=trainer.matrix_rescale,
            )  # fmt: skip

        rules = {"matrix": matrices, "others": lambda part: _elementwise(trainer, trainer.others, part)}
        made = Together(groups, {name: rules[name] for name in dict.fromkeys(group["rule"] for group in groups)})
    for group in made.param_groups:
        group["base_lr"] = group["lr"]
    return made


def _elementwise(trainer: Trainer, name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "sgd":
        nesterov = trainer.nesterov and trainer.momentum > 0
        return torch.optim.SGD(groups, lr=trainer.lr, momentum=trainer.momentum, nesterov=nesterov)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    betas = (trainer.betas[0], trainer.betas[1])
    # the fused kernel updates all tensors in one go; torch's own loop costs more than a tiny model's forward
    return kind(groups, lr=trainer.lr, betas=betas, eps=trainer.eps, fused=True)


def _split(groups: list[dict[str, Any]], apart: set[int]) -> list[dict[str, Any]]:
    """Each group as its matrices (``rule="matrix"``) and the rest (``rule="others"``); a vector as a matrix is none."""

    def is_matrix(group: dict[str, Any], p: torch.nn.Parameter) -> bool:
        matrix = p.ndim >= 2 and len(p) > 1 and p.numel() > len(p)
        return matrix and group.get("rule") != "others" and id(p) not in apart

    found = []
    for group in groups:
        for name in ("matrix", "others"):
            params = [p for p in group["params"] if is_matrix(group, p) == (name == "matrix")]
            if params:
                found.append({**group, "params": params, "rule": name})
    return found


def lr_factor(trainer: Trainer, step: int, total: int, schedule: str | None = None, warmup: int | None = None) -> float:
    """Share of the peak learning rate at `step` (from 0) of `total`: linear warm-up, then the schedule to 0.

    `schedule` and `warmup` replace the trainer's unless they are None.
    """
    schedule = trainer.schedule if schedule is None else schedule
    warmup = trainer.warmup if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant" or total <= warmup:
        return 1.0
    progress = min(1.0, (step - warmup) / (total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress


def grouped(
    trainable: Iterable[torch.nn.Parameter], extra: list[dict[str, Any]], model: Iterable[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Optimizer groups: the methods' own, then one of every other trainable parameter, then those the model asks for.

    A model asks with a method ``param_groups() -> list[dict]``: ``params``, and beside the optimizer's own options
    ``lr_factor``, what their learning rate is multiplied by, ``lr_share``, the part of the run in which the schedule
    takes it to its end and after which it is 0, and ``hold_epochs``, for which they stay as they are (for
    ``hold_share`` of the run's steps at most). What does not train, and what a method has a group for, is left
    out of the model's groups.
    """
    taken = {id(p) for group in extra for p in group["params"]}
    rest = {id(p): p for p in trainable if id(p) not in taken}
    asked = [{**group, "params": [p for p in group["params"] if rest.pop(id(p), None) is not None]} for group in model]
    default = [{"params": list(rest.values())}] if rest else []
    return [*extra, *default, *(group for group in asked if group["params"])]
