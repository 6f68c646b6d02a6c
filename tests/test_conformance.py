"""The suite on every method of the configuration, and on methods that each break exactly one promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from filtrun.catalogue import conf_dir
from filtrun.conformance import conform
from filtrun.context import Run
from filtrun.errors import UserError
from filtrun.method import Method

METHODS = sorted(path.stem for path in (Path(conf_dir()) / "method").glob("*.yaml"))
VIT = ("model=vit", "model.size=nano", "model.depth=1")


def failed(method: str | Callable[[], Method], *overrides: str, **options: Any) -> dict[str, str]:
    """Names of the failed checks, with reasons."""
    return {c.name: c.reason for c in conform(method, *overrides, **options) if c.status == "failed"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_conforms(method: str) -> None:
    checks = conform(method, ddp=False)
    assert [c for c in checks if c.status == "failed"] == []
    settings = {c.setting for c in checks if c.setting and c.status == "passed"}
    assert sum(c.status == "passed" for c in checks) >= (15 if len(settings) > 1 else 8), checks


@dataclass
class Bias(Method):
    """Train the head's bias alone (a baseline for tests)."""

    trains: ClassVar = "part"
    paper: ClassVar[str] = "test baseline"

    def bias(self, run: Run) -> torch.nn.Parameter:
        return run.weights["head.bias"]

    def edit_model(self, run: Run) -> None:
        self.bias(run).requires_grad_(True)


@dataclass
class TrainsMore(Bias):
    """Also moves a frozen weight, and even stores it (a baseline for tests)."""

    def edit_model(self, run: Run) -> None:
        super().edit_model(run)
        self.more = run.weights["patch.bias"]

    def after_step(self, run: Run) -> None:
        with torch.no_grad():
            self.more.add_(0.01)

    def state_dict(self) -> dict[str, Any]:
        return {"more": self.more.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.more.copy_(state["more"])


@dataclass
class MovesAtStart(Bias):
    """Shifts the bias before training (a baseline for tests)."""

    def edit_model(self, run: Run) -> None:
        super().edit_model(run)
        with torch.no_grad():
            self.bias(run).add_(0.1)


@dataclass
class MovesAtFinish(Bias):
    """Rounds the bias at the end although it says that finish is exact (a baseline for tests)."""

    def finish(self, run: Run) -> None:
        with torch.no_grad():
            self.bias(run).add_(0.01)


@dataclass
class Forgets(Bias):
    """Uses at evaluation what it learnt in training and stores nowhere (a baseline for tests)."""

    def edit_model(self, run: Run) -> None:
        super().edit_model(run)
        self.seen = 0.0
        run.model.register_forward_hook(lambda m, i, out: out if m.training else out + self.seen)

    def after_epoch(self, run: Run) -> None:
        self.seen = 0.5


@dataclass
class YieldsNaN(Bias):
    """Its loss is not a number (a baseline for tests)."""

    def loss(self, run: Run, batch: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan")


@dataclass
class CountsImages(Bias):
    """Sums over the images of a micro-batch where it should average (a baseline for tests)."""

    def loss(self, run: Run, batch: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * len(batch)


@dataclass
class SecondStep(Bias):
    """Behaves otherwise after its second step and does not store how many it made (a baseline for tests)."""

    def __post_init__(self) -> None:
        self.steps = 0

    def loss(self, run: Run, batch: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * (1 + self.steps)

    def after_step(self, run: Run) -> None:
        self.steps += 1


@dataclass
class Stale(Bias):
    """Its output without gradients is another one (a baseline for tests)."""

    def edit_model(self, run: Run) -> None:
        super().edit_model(run)
        start, bias = self.bias(run).detach().clone(), self.bias(run)

        def answer(model: torch.nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
            return out if torch.is_grad_enabled() or torch.equal(bias, start) else out * (1 + 1e-3)

        run.model.register_forward_hook(answer)


@dataclass
class Unnamed(Bias):
    """Says nothing of where it is from."""

    paper: ClassVar[str] = ""


@dataclass
class StatesRank(Bias):
    """Changes a matrix by full rank and states rank 1 (a baseline for tests)."""

    def edit_model(self, run: Run) -> None:
        run.claim(self, [run.weights["head.weight"]])
        run.weights["head.weight"].requires_grad_(True)

    def report(self, run: Run) -> dict[str, Any]:
        return {"rank": 1}


@dataclass
class ReadsTheLoss(Bias):
    """Looks at the loss in every step (a baseline for tests)."""

    every: int = 1

    def after_step(self, run: Run) -> None:
        if run.step % self.every == 0:
            self.last = float(run.total_loss)


@dataclass
class MayRead(ReadsTheLoss):
    """The same, and says why (a baseline for tests)."""

    waits: ClassVar[dict[str, str]] = {"after_step": "its rule is one of the loss"}


@dataclass
class StaysBehind(Bias):
    """Keeps on the CPU what it adds to the gradient (a baseline for tests)."""

    def edit_model(self, run: Run) -> None:
        super().edit_model(run)
        self.added = torch.full((len(self.bias(run)),), 1e-3)

    def after_backward(self, run: Run) -> None:
        self.bias(run).grad.add_(self.added)


class Loose(Method):
    """Takes any option (a baseline for tests)."""

    trains: ClassVar = "part"
    paper: ClassVar[str] = "test baseline"

    def __init__(self, **options: Any) -> None:
        self.options = options

    def edit_model(self, run: Run) -> None:
        run.weights["head.bias"].requires_grad_(True)


def test_a_method_that_keeps_its_promises_passes() -> None:
    checks = conform(Bias, *VIT, ddp=False)
    assert {c.status for c in checks if c.name != "stated numbers"} == {"passed"}
    assert {c.setting for c in checks} == {"", "classify/vit"}


@pytest.mark.parametrize(
    ("broken", "check", "reason"),
    [
        (TrainsMore, "trains only what it says", "patch.bias changed"),
        (MovesAtStart, "identity at start", "edit_model moves the output by"),
        (MovesAtFinish, "exact finish", "finish moves the output by 0.01"),
        (Forgets, "delta reloads", "differs by"),
        (CountsImages, "gradient accumulation", "when the batch is cut in two"),
        (SecondStep, "resumes", "head.bias differs"),
        (Stale, "works under no_grad", "differs by 0.00"),
        (Unnamed, "names its source", "paper is empty"),
        (StatesRank, "stated numbers", "states rank 1, but head.weight"),
        (ReadsTheLoss, "steps do not wait", "ReadsTheLoss.after_step: item waits for the device (step 2)"),
        (StaysBehind, "steps do not wait", "StaysBehind.after_backward: add_ mixes devices (step 0)"),
        (Loose, "refuses bad options", "no_such_option=1 is taken without complaint"),
    ],
)
def test_exactly_the_broken_promise_fails(broken: type[Method], check: str, reason: str) -> None:
    found = failed(broken, *VIT, ddp=False)
    assert list(found) == [check]
    assert reason in found[check]


@pytest.mark.parametrize("made", [lambda: ReadsTheLoss(every=3), MayRead], ids=["every third step", "allowed"])
def test_a_method_may_wait_now_and_then_or_say_why(made: Callable[[], Method]) -> None:
    assert failed(made, *VIT, ddp=False) == {}


def test_nan_fails_the_two_checks_for_it() -> None:
    found = failed(YieldsNaN, *VIT, ddp=False)
    assert found == dict.fromkeys(("finite in fp32", "finite in bf16"), "the loss of step 1 is nan")


@dataclass
class Idle(Bias):
    """Makes a tensor trainable that never gets a gradient (a baseline for tests)."""

    def edit_model(self, run: Run) -> None:
        super().edit_model(run)
        run.model.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))


@dataclass
class SaysNothing(Bias):
    """Says it trains nothing and trains (a baseline for tests)."""

    trains: ClassVar = "nothing"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(Idle, "idle is trainable but two steps did not change it"), (SaysNothing, "says it trains nothing, but")],
)
def test_what_is_said_and_what_is_trained(broken: type[Method], reason: str) -> None:
    assert reason in failed(broken, *VIT, ddp=False)["trains only what it says"]


def test_an_edit_that_raises_is_a_failed_composition() -> None:
    @dataclass
    class Raises(Method):
        """Cannot edit (a baseline for tests)."""

        paper: ClassVar[str] = "test baseline"

        def edit_model(self, run: Run) -> None:
            raise KeyError("no such layer")

    checks = conform(Raises, *VIT, ddp=False)
    assert [(c.name, c.status) for c in checks if c.setting] == [("composes", "failed")]
    assert "KeyError" in checks[-1].reason


def test_a_task_without_a_tiny_setting_is_skipped_with_its_name() -> None:
    @dataclass
    class Elsewhere(Bias):
        """Works with another task (a baseline for tests)."""

        tasks: ClassVar = ("segment",)

    checks = conform(Elsewhere, ddp=False)
    assert [(c.name, c.status) for c in checks if c.setting] == [("composes", "skipped")]
    assert "task=segment" in checks[-1].reason


def test_unknown_method_and_setting_are_user_errors() -> None:
    with pytest.raises(UserError, match="no_such"):
        conform("no_such")


OUTSIDE = '''
"""A user's method (test baseline)."""
from dataclasses import dataclass
from typing import ClassVar
import torch
from filtrun.method import Method
from filtrun.options import opt

@dataclass
class Drift(Method):
    """Moves apart on every process when `apart` is above 0 (a baseline for tests)."""
    apart: float = opt(0.0, "how far", low=0)
    trains: ClassVar = "part"
    paper: ClassVar[str] = "test baseline"
    def edit_model(self, run):
        run.weights["head.bias"].requires_grad_(True)
        self.bias = run.weights["head.bias"]
    def after_step(self, run):
        with torch.no_grad():
            self.bias.add_(self.apart * run.fabric.global_rank)
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's package and configuration."""
    (tmp_path / "outside_pkg.py").write_text(OUTSIDE)
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/drift.yaml").write_text("drift:\n  _target_: outside_pkg.Drift\n  apart: 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "conf"


@pytest.mark.slow
def test_two_processes_on_a_users_method_that_drifts_apart(outside: Path) -> None:
    words = ("trust=[outside_pkg]", "method.drift.apart=0.1", *VIT)
    found = failed("drift", *words, config_dir=outside)
    assert list(found) == ["two processes"]
    assert "head.bias differs by" in found["two processes"]
    assert "between the two processes" in found["two processes"]


@pytest.mark.slow
def test_two_processes_on_sara() -> None:
    checks = conform("sara", "model=unet", "model.size=nano")
    assert [c.status for c in checks if c.name == "two processes"] == ["passed"]


def test_the_command_prints_a_table_and_its_exit_code_says_whether_all_passed(
    outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filtrun.verbs.check import main

    words = ["method=drift", "trust=[outside_pkg]", *VIT, "--config-dir", str(outside), "--no-ddp"]
    assert main(words) == 0
    assert "0 failed" in capsys.readouterr().out
    edit = "    def edit_model(self, run):\n"
    broken = OUTSIDE.replace(edit, f"{edit}        run.weights['head.bias'].data += 1\n")
    (outside.parent / "outside_pkg.py").write_text(broken)
    del sys.modules["outside_pkg"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "identity at start (classify/vit) failed: edit_model moves the output" in " ".join(out.split())


def test_the_command_needs_one_method() -> None:
    from filtrun.verbs.check import main

    with pytest.raises(UserError, match="filtrun check method=NAME"):
        main(["data=digits"])
    with pytest.raises(UserError, match="filtrun check method=NAME"):
        main(["method=[sara,lora]"])


def test_import_costs_nothing_heavy() -> None:
    code = "import filtrun.verbs.check, sys; assert 'torch' not in sys.modules and 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
