"""Checkpoints: a resumed training ends where an undisturbed one does, bit for bit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from filtrun import checkpoint, runner
from filtrun.bench_run import BenchRun
from filtrun.callbacks import Ema, Log
from filtrun.checkpoint import (
    Checkpoints,
    checkpoint_files,
    drop_checkpoints,
    load_checkpoint,
    save_checkpoint,
    weights_sha256,
)
from filtrun.context import Run
from filtrun.errors import RunFailure
from filtrun.loggers import Loggers
from filtrun.methods.baseline.full import Full
from filtrun.pack import load_tree
from filtrun.trainer import Phase

VIT = ["model=vit", "model.size=nano", "model.depth=1", "model.dropout=0.1"]


class Counts(Full):
    """Has a state, two phases, and a loss that depends on how often each hook was called."""

    def __init__(self) -> None:
        self.slug = "counts"  # type: ignore[misc]
        self.calls = {"start_phase": 0, "after_step": 0, "after_epoch": 0}
        self.mean = torch.zeros(10)

    def phases(self, run: Run) -> list[Phase]:
        return [Phase("one", 4), Phase("two", 6, lr=1e-2)]

    def start_phase(self, run: Run) -> None:
        self.calls["start_phase"] += 1

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        return loss * (1 + 0.1 * sum(self.calls.values())) + 0 * self.mean.sum()

    def after_step(self, run: Run) -> None:
        self.calls["after_step"] += 1
        self.mean += torch.randn(10)

    def after_epoch(self, run: Run) -> None:
        self.calls["after_epoch"] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.mean = state["calls"], state["mean"]


class Stop(Exception):
    pass


class StopsAt(Full):
    """A callback that ends the process, so to speak, in one of the hooks of a step."""

    def __init__(self, step: int, hook: str = "after_step") -> None:
        self.step, self.hook = step, hook

    def after_step(self, run: Run) -> None:
        if run.step == self.step and self.hook == "after_step":
            raise Stop

    def after_epoch(self, run: Run) -> None:
        if run.step == self.step and self.hook == "after_epoch":
            raise Stop


def train(bench: BenchRun, folder: Path, every: int, stop: StopsAt | None = None) -> tuple[Run, Counts, Ema]:
    run = bench.fresh(edit=False, batch_size=400, schedule="cosine", warmup=2)  # three steps an epoch
    method, ema = Counts(), Ema(0.9)
    run.dir, run.methods = folder, [method]
    run.callbacks = [Log(2, Loggers()), ema, *([stop] if stop else []), Checkpoints(every)]
    runner.edit(run)
    runner.setup(run)
    ema.start(run)
    load_checkpoint(run)
    runner.fit(run)
    return run, method, ema


@pytest.mark.parametrize(("every", "stop"), [(1, 1), (1, 4), (2, 7), (3, 4), (4, 5), (4, 9), (5, 10), (7, 3)])
def test_a_stopped_training_goes_on_as_if_nothing_had_been(tmp_path: Path, every: int, stop: int) -> None:
    """Stops in the middle of phases and epochs, at their ends (after 3, 4, 6, 9) and before any checkpoint."""
    bench = BenchRun("full", VIT, tmp_path)
    want, counted, averages = train(bench, tmp_path / "whole", 0)
    with pytest.raises(Stop):
        train(bench, tmp_path / "run", every, StopsAt(stop))
    done = [int(f.name[5:14]) for f in checkpoint_files(tmp_path / "run")]
    assert done == [s for s in range(every, stop, every)][-2:]
    run, method, ema = train(bench, tmp_path / "run", every)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), want.model.parameters(), strict=True))
    assert method.calls == counted.calls == {"start_phase": 2, "after_step": 10, "after_epoch": 5}
    assert torch.equal(method.mean, counted.mean)
    assert all(torch.equal(a, b) for a, b in zip(ema.average, averages.average, strict=True))
    assert run.optimizer.param_groups[0]["lr"] == want.optimizer.param_groups[0]["lr"]


def test_a_checkpoint_never_lies_between_a_step_and_the_end_of_its_epoch(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    want, counted, _ = train(bench, tmp_path / "whole", 0)
    with pytest.raises(Stop):
        train(bench, tmp_path / "run", 1, StopsAt(6, "after_epoch"))
    assert [int(f.name[5:14]) for f in checkpoint_files(tmp_path / "run")] == [4, 5]
    run, method, _ = train(bench, tmp_path / "run", 1)
    assert method.calls == counted.calls
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), want.model.parameters(), strict=True))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    want, _, _ = train(bench, tmp_path / "whole", 0)
    with pytest.raises(Stop):
        train(bench, tmp_path / "run", 3, StopsAt(8))
    older, newer = checkpoint_files(tmp_path / "run")
    newer.write_bytes(newer.read_bytes()[:-10])
    run, method, _ = train(bench, tmp_path / "run", 3)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), want.model.parameters(), strict=True))
    assert method.calls["after_step"] == 10


def test_the_last_two_are_kept_and_a_finished_run_drops_them(tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    train(bench, tmp_path / "run", 2)
    assert [f.name for f in checkpoint_files(tmp_path / "run")] == [
        "step-000000008.safetensors",
        "step-000000010.safetensors",
    ]
    drop_checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    drop_checkpoints(tmp_path / "run")  # nothing to drop is fine


def test_nothing_to_load(tmp_path: Path) -> None:
    run = BenchRun("full", VIT, tmp_path).fresh()
    run.dir = tmp_path / "none"
    assert load_checkpoint(run) is False and run.step == 0


class Slow:
    """Writes checkpoints no sooner than it is told, and counts those under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.under_way, self.most, self.steps = threading.Event(), 0, 0, []
        write = checkpoint.write_packed

        def slowly(path: Path, packed: Any) -> None:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            assert self.go.wait(60)
            write(path, packed)
            self.steps.append(int(path.stem[5:14]))
            self.under_way -= 1

        monkeypatch.setattr(checkpoint, "write_packed", slowly)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps are made before the writer may write; what it then writes is the state of step 5, not of step 9."""
    slow, seen = Slow(monkeypatch), []
    bench = BenchRun("full", VIT, tmp_path)

    class LetsGo(StopsAt):
        def after_step(self, run: Run) -> None:
            if run.step == 9:
                seen.extend(slow.steps)
                slow.go.set()
                raise Stop

    with pytest.raises(Stop):
        train(bench, tmp_path / "run", 5, LetsGo(0))
    # step 5's was still under way at step 9; the end of the training waited for it
    assert not seen and slow.steps == [5] and slow.most == 1
    assert [int(f.name[5:14]) for f in checkpoint_files(tmp_path / "run")] == [5]
    state, _ = load_tree(checkpoint_files(tmp_path / "run")[0])
    at_five, _, _ = train_to(bench, tmp_path / "five", 5)
    assert state["step"] == 5 and weights_sha256(state["model"]) == weights_sha256(at_five.model)


def train_to(bench: BenchRun, folder: Path, step: int) -> tuple[Run, Counts, Ema]:
    """A training that ends after `step`, as it then is."""
    kept: list[Run] = []

    class Ends(StopsAt):
        def after_step(self, run: Run) -> None:
            if run.step == step:
                kept.append(run)
                raise Stop

    with pytest.raises(Stop):
        train(bench, folder, 0, Ends(0))
    return kept[0], kept[0].methods[0], kept[0].callbacks[1]  # type: ignore[return-value]


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    slow.go.set()
    train(BenchRun("full", VIT, tmp_path), tmp_path / "run", 1)
    assert slow.steps == list(range(1, 11)) and slow.most == 1


@pytest.mark.parametrize(("fails_at", "ends_at"), [(2, 4), (10, 10)])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_one_or_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, ends_at: int
) -> None:
    write, steps = checkpoint.write_packed, []

    def fails(path: Path, packed: Any) -> None:
        if int(path.stem[5:14]) == fails_at:
            raise RunFailure(f"{path} could not be written: disk full")
        write(path, packed)

    class Notes(StopsAt):
        def after_step(self, run: Run) -> None:
            steps.append(run.step)

    monkeypatch.setattr(checkpoint, "write_packed", fails)
    with pytest.raises(RunFailure, match=f"step-{fails_at:09d}.safetensors could not be written: disk full"):
        train(BenchRun("full", VIT, tmp_path), tmp_path / "run", 2, Notes(0))
    assert steps[-1] == ends_at
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_half_written_checkpoints_are_not_seen(tmp_path: Path) -> None:
    run = BenchRun("full", VIT, tmp_path).trained()
    run.dir = tmp_path / "run"
    save_checkpoint(run)
    (run.dir / "checkpoints" / ".step-000000009.safetensors.77").write_bytes(b"half")
    assert [f.name for f in checkpoint_files(run.dir)] == ["step-000000002.safetensors"]


def test_the_hash_of_weights_sees_names_shapes_types_and_bits() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"a2": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": -torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.ones(1)},
    ]
    assert len({weights_sha256(w) for w in [base, *others]}) == 6
    assert weights_sha256({"b": torch.ones(1), "a": torch.zeros(3, 2).t()}) == weights_sha256(base)
