"""Cells trained at once: the numbers each has alone, checkpoints that go on, and who is trained one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from filtrun.record import Record
from filtrun.stack import Apart, Stack, clip_each
from filtrun.sweeps.jobs import Job, Outcome, make_jobs, run_jobs
from filtrun.sweeps.together import groups

WORDS = [
    "scale=smoke", "data=digits", "task=classify", "model=resnet20", "model.width=4", "model.base=scratch",
    "method=full", "device=cpu", "logger=none", "trainer.steps=12", "trainer.log_every=1", "threads=1",
]  # fmt: skip


def jobs(sweep: Path, *words: str, seeds: Any = (0, 1, 2)) -> list[Job]:
    return make_jobs([*WORDS, *words], seeds, sweep, extra=[f"stages.root={sweep.parent / 'stages'}"])


def losses(job: Job) -> list[float]:
    lines = (job.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["train/loss"] for line in lines]


def both(tmp_path: Path, *words: str) -> tuple[list[Outcome], list[Outcome]]:
    return run_jobs(jobs(tmp_path / "at_once", *words, "vectorize=true")), run_jobs(jobs(tmp_path / "alone", *words))


def same(one: list[Outcome], other: list[Outcome]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.error, b.error) == ("", "")
        assert losses(a.job) == pytest.approx(losses(b.job), rel=1e-4)
        assert a.record.metrics == pytest.approx(b.record.metrics, rel=1e-3, abs=0.006)  # two of 359 images
        assert a.job.folder.name == b.job.folder.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("trainer.clip=0.5", "data.flip=true", "data.crop_pad=1", "trainer.ema=0.9"),
        ("trainer.optimizer=sgd", "trainer.lr=0.05", "trainer.clip=0", "method=bitfit"),
        ("method=lora", "model.base=pretrain", "trainer.weight_decay=0.1"),
    ],
)
def test_cells_trained_at_once_are_as_they_are_alone(words: tuple[str, ...], tmp_path: Path) -> None:
    at_once, alone = both(tmp_path, *words)
    same(at_once, alone)
    assert [o.record.cost.get("together") for o in (*at_once, *alone)] == [3, 3, 3, None, None, None]
    assert len({o.record.metrics["test/nll"] for o in at_once}) == 3
    sizes = [(o.record.cost["optimizer_bytes"], o.record.cost["stored_bytes"]) for o in at_once]
    assert sizes == [(o.record.cost["optimizer_bytes"], o.record.cost["stored_bytes"]) for o in alone]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_who_is_stopped_goes_on_from_checkpoints(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filtrun import lockstep

    words = (f"trainer.optimizer={optimizer}", "trainer.checkpoint_every=4")
    whole = run_jobs(jobs(tmp_path / "whole", *words, "vectorize=true"))
    plain, steps = lockstep.Together.joint_step, 0

    def stop(self: Any, batches: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt
        return plain(self, batches)

    cells = jobs(tmp_path / "cells", *words, "vectorize=true")
    with monkeypatch.context() as patched:
        patched.setattr(lockstep.Together, "joint_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_jobs(cells)
    assert [Record.read(job.folder).status for job in cells] == ["interrupted"] * 3
    for job in cells:
        assert [p.name for p in (job.folder / "checkpoints").iterdir()] == ["step-000000004.safetensors"]
    again = run_jobs(cells)
    same(again, whole)
    assert [o.record.cost["together"] for o in again] == [3, 3, 3]
    cached = run_jobs(cells)
    assert all(o.cached for o in cached)
    more = run_jobs(jobs(tmp_path / "cells", *words, "vectorize=true", seeds=(0, 1, 2, 3)))
    assert [o.cached for o in more] == [True, True, True, False] and "together" not in more[3].record.cost


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filtrun import lockstep

    plain = lockstep.Together.joint_step

    def spoil(self: Any, batches: Any) -> Any:
        if self.step == 3:
            with torch.no_grad():
                next(iter(self.stack.trained.values()))[1] = float("nan")
        return plain(self, batches)

    monkeypatch.setattr(lockstep.Together, "joint_step", spoil)
    spoilt = run_jobs(jobs(tmp_path / "cells", "vectorize=true"))
    monkeypatch.undo()
    good = run_jobs(jobs(tmp_path / "good"))
    assert "the loss became nan between steps 4 and 4" in spoilt[1].error and spoilt[1].code == 1
    assert Record.read(spoilt[1].job.folder).status == "failed"
    same([spoilt[0], spoilt[2]], [good[0], good[2]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("method=masksparsity",), "method=masksparsity acts while the network trains"),
        (("task=diffuse", "model=unet", "~model.width", "method=bitfit"), "task=diffuse draws at random in its loss"),
        (("trainer.accumulate=2",), "trainer.accumulate=2"),
        (("trainer.optimizer=muon",), "trainer.optimizer=muon is for single matrices"),
        (("method=none", "model.base=pretrain"), "nothing trains"),
    ],
)
def test_what_cannot_be_trained_at_once_is_trained_in_turn(words: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    given = [w for w in WORDS if not (words[0].startswith("task=diffuse") and w.startswith("model.width"))]
    given = [*given, *(w for w in words if not w.startswith("~"))]
    extra = [f"stages.root={tmp_path / 'stages'}"]
    at_once = run_jobs(make_jobs([*given, "vectorize=true"], (0, 1), tmp_path / "at_once", extra=extra))
    alone = run_jobs(make_jobs(given, (0, 1), tmp_path / "alone", extra=extra))
    assert [o.error for o in (*at_once, *alone)] == [""] * 4
    assert [o.record.metrics for o in at_once] == [o.record.metrics for o in alone]  # to the bit
    assert all("together" not in o.record.cost for o in at_once)
    logs = [(o.job.folder / "filtrun.log").read_text() for o in at_once]
    assert all(f"trained one after the other: {reason}" in text for text in logs)


def test_only_cells_that_differ_in_their_seed_are_side_by_side(tmp_path: Path) -> None:
    every = jobs(tmp_path / "a", "vectorize=true") + jobs(tmp_path / "a", "vectorize=true", "trainer.lr=0.1")
    assert [[j.config["seed"] for j in group] for group in groups(every)] == [[0, 1, 2], [0, 1, 2]]
    mixed = [every[3], every[0], every[4], every[1]]
    assert [[j.config["trainer"]["lr"] for j in group] for group in groups(mixed)] == [
        [0.1, 0.1], [every[0].config["trainer"]["lr"]] * 2,
    ]  # fmt: skip
    assert [len(g) for g in groups(jobs(tmp_path / "a", "vectorize=2"))] == [2, 1]
    assert [len(g) for g in groups(jobs(tmp_path / "a"))] == [1, 1, 1]
    names = {job.folder.name for job in jobs(tmp_path / "a")}
    assert {job.folder.name for job in jobs(tmp_path / "a", "vectorize=true")} == names


def test_vectorize_is_for_one_process(cli: Any) -> None:
    refused = cli("-m", *WORDS, "seed=0,1", "vectorize=true", "workers=2")
    assert refused.code == 2 and "workers=2 and vectorize do not go together" in refused.err
    wrong = cli(*WORDS, "vectorize=-1")
    assert wrong.code == 2 and "vectorize=-1 must be true, false or the number" in wrong.err


def test_gradients_are_clipped_for_each_model() -> None:
    torch.manual_seed(0)
    stacked = [torch.zeros(3, 4, 2, requires_grad=True), torch.zeros(3, 5, requires_grad=True)]
    apart = [[torch.zeros(4, 2, requires_grad=True), torch.zeros(5, requires_grad=True)] for _ in range(3)]
    for i, each in enumerate(apart):
        for p in each:
            p.grad = torch.randn_like(p) * 10.0 ** (i - 1)
    for k, p in enumerate(stacked):
        p.grad = torch.stack([each[k].grad.clone() for each in apart])  # type: ignore[union-attr]
    clip_each(stacked, 1.0)
    for i, each in enumerate(apart):
        nn.utils.clip_grad_norm_(each, 1.0)
        for k, p in enumerate(each):
            torch.testing.assert_close(stacked[k].grad[i], p.grad)  # type: ignore[index]
    assert apart[0][1].grad.norm() < 1 < 1.001 * torch.stack([p.grad.norm() for p in apart[2]]).norm()  # type: ignore


def test_a_stack_keeps_what_is_frozen_and_the_same_once_and_gives_back() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)]
    models[1][0].load_state_dict(models[0][0].state_dict())
    for model in models:
        model[0].requires_grad_(False)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    stack = Stack(models)
    assert set(stack.shared) == {"0.weight", "0.bias"} and not stack.frozen
    assert set(stack.trained) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    with torch.no_grad():
        stack.trained["2.weight"] += 1  # the models see it
    torch.testing.assert_close(models[1][2].weight, before[1]["2.weight"] + 1)
    stack.release([])
    with torch.no_grad():
        stack.trained["2.weight"] += 1
    torch.testing.assert_close(models[1][2].weight, before[1]["2.weight"] + 1)
    with pytest.raises(Apart, match="different names or shapes"):
        Stack([nn.Linear(2, 2), nn.Linear(2, 3)])
