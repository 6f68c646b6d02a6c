"""Training options: the schedule's closed forms, optimizer groups, lengths and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from filtrun.errors import UserError
from filtrun.trainer import Trainer, grouped, lr_factor, make_optimizer


def factors(total: int = 10, **options: Any) -> list[float]:
    trainer = Trainer(**options)
    return [lr_factor(trainer, step, total) for step in range(total)]


def test_constant() -> None:
    assert factors(schedule="constant") == [1.0] * 10
    assert factors(schedule="constant", warmup=4) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_linear_falls_to_zero_after_the_last_step() -> None:
    assert factors(schedule="linear") == pytest.approx([1 - t / 10 for t in range(10)])
    assert factors(schedule="linear", warmup=2) == pytest.approx([0.5, 1.0] + [1 - t / 8 for t in range(8)])
    assert lr_factor(Trainer(schedule="linear"), 10, 10) == 0.0


def test_cosine() -> None:
    assert factors(schedule="cosine") == pytest.approx([(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)])
    warm = [(t + 1) / 5 for t in range(5)] + [(1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
    assert factors(schedule="cosine", warmup=5) == pytest.approx(warm)


def test_it_is_torchs_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors() == pytest.approx(rates)


def test_warmup_as_long_as_the_run() -> None:
    assert factors(total=3, warmup=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert lr_factor(Trainer(warmup=3), 3, 3) == 1.0


@pytest.mark.parametrize(
    ("options", "images", "steps"),
    [
        ({"steps": 7}, 100, 7),
        ({"steps": 0}, 100, 0),
        ({"steps": None, "epochs": 2, "batch_size": 10}, 100, 20),
        ({"steps": None, "epochs": 2, "batch_size": 30}, 100, 6),  # the incomplete batch is dropped
        ({"steps": None, "epochs": 0.5, "batch_size": 30}, 100, 2),
        ({"steps": None, "epochs": 3, "batch_size": 64}, 10, 3),  # fewer images than a batch
    ],
)
def test_lengths(options: dict[str, Any], images: int, steps: int) -> None:
    assert Trainer(**options).total_steps(images) == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1.0}, "set exactly one of trainer.steps=300 and trainer.epochs=1.0"),
        ({"steps": None}, "set exactly one of trainer.steps=None and trainer.epochs=None"),
        ({"betas": [0.9]}, r"trainer.betas=\[0.9\] must be two numbers in \[0, 1\)"),
        ({"betas": [0.9, 1.0]}, "must be two numbers"),
        ({"batch_size": 10, "accumulate": 4}, "trainer.batch_size=10 is no multiple of trainer.accumulate=4"),
        ({"batch_size": 9, "devices": 2}, "trainer.batch_size=9 is shared by 2 processes; take a multiple of 2"),
        ({"batch_size": 6, "devices": 2, "nodes": 2}, "shared by 4 processes"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(**options)


def test_groups_keep_their_own_options() -> None:
    a, b, c = (nn.Parameter(torch.zeros(n)) for n in (1, 2, 3))
    groups = grouped([a, b, c], [{"params": [b], "lr": 0.5, "weight_decay": 0.0}])
    optimizer = make_optimizer(Trainer(lr=0.1, weight_decay=0.2), groups)
    made = [
        ([p.numel() for p in g["params"]], g["lr"], g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups
    ]
    assert made == [([2], 0.5, 0.5, 0.0), ([1, 3], 0.1, 0.1, 0.2)]
    assert grouped([], []) == [] and grouped([a], [{"params": [a]}]) == [{"params": [a]}]


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_optimizers_take_the_options(name: str, kind: type) -> None:
    trainer = Trainer(optimizer=name, lr=0.3, betas=[0.8, 0.95], eps=1e-6, momentum=0.7, nesterov=False)
    optimizer = make_optimizer(trainer, [{"params": [nn.Parameter(torch.zeros(1))]}])
    assert type(optimizer) is kind
    if name == "sgd":
        assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.7, False)
    else:
        assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)
