"""The key ``speed``: what it may choose and why, that trying leaves no trace, and that results agree."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filtrun import runner, speed
from filtrun.bench_run import BenchRun, losses_of
from filtrun.cells import cell_digest
from filtrun.context import Run
from filtrun.speed import FILE, PLAIN, Choice, Trials, Way, choose
from filtrun.trainer import Phase, Trainer

RESNET = ["model=resnet20", "model.width=4"]
VIT = ["model=vit", "model.size=nano", "model.depth=1", "model.dropout=0.2"]
LAST = Way(channels_last=True)
COMPILED = Way(compile="default")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> BenchRun:
    return BenchRun("full", RESNET, tmp_path_factory.mktemp("speed"))


def ready(bench: BenchRun, steps: int = 400, **options: Any) -> Run:
    """A run just before its optimizer is made."""
    run = bench.fresh(speed="auto", steps=steps, **options)
    run.phases, run.dir = [Phase("train", steps)], Path()
    return run


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[Way, float], **more: Any) -> list[Way]:
    """Let steps take these seconds; returns the list of steps that will have been taken."""
    taken: list[Way] = []
    ways: dict[int, Way] = {}

    def wrapped(self: Way, model: nn.Module) -> nn.Module:
        ways[id(model)] = self  # an id may be that of an earlier copy, gone by now
        return model

    monkeypatch.setattr(Way, "wrapped", wrapped)

    def step(self: Trials, net: nn.Module) -> tuple[float, float, float]:
        way = ways[id(net)]
        first = way not in taken
        taken.append(way)
        if way in more.get("fails", ()):
            raise RuntimeError("no such kernel\nand a trace")
        loss = more.get("losses", {}).get(way, 2.5)
        wall = more.get("compiling", 0.0) if first and way.compile else seconds[way]
        return wall, more.get("work", seconds)[way], loss

    monkeypatch.setattr(Trials, "_step", step)
    return taken


@pytest.mark.parametrize(("last", "expected"), [(0.5, LAST), (0.92, LAST), (0.95, PLAIN), (1.0, PLAIN), (3.0, PLAIN)])
def test_the_plain_way_stays_unless_another_is_clearly_faster(
    bench: BenchRun, monkeypatch: pytest.MonkeyPatch, last: float, expected: Way
) -> None:
    taken = timed(monkeypatch, {PLAIN: 1e-3, LAST: last * 1e-3})
    choice = choose(ready(bench))
    assert choice.way == expected and choice.seconds["plain"] == 1e-3
    assert taken == [PLAIN, LAST] * 5  # in turn: what slows the machine down slows both


def test_less_time_with_no_less_work_is_chance(bench: BenchRun, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {PLAIN: 1e-3, LAST: 0.5e-3}, work={PLAIN: 1e-3, LAST: 0.97e-3})
    assert choose(ready(bench)).way == PLAIN


@pytest.mark.parametrize(
    ("plain", "compiled", "compiling", "expected"),
    [
        (1.0, 0.5, 100.0, COMPILED),  # 400 s: not tried, see below
        (2.0, 1.0, 100.0, COMPILED),  # 800 s of training, 400 saved
        (2.0, 1.0, 500.0, PLAIN),  # compiling takes longer
        (2.0, 1.95, 1.0, PLAIN),
    ],
)
def test_compiling_must_pay(
    bench: BenchRun, monkeypatch: pytest.MonkeyPatch, plain: float, compiled: float, compiling: float, expected: Way
) -> None:
    taken = timed(monkeypatch, {PLAIN: plain, LAST: plain, COMPILED: compiled}, compiling=compiling)
    choice = choose(ready(bench))
    if plain * 400 < speed.WORTH_COMPILING["cpu"]:
        assert COMPILED not in taken and choice.way == PLAIN
    else:
        assert COMPILED in taken and choice.way == expected


def test_what_fails_or_computes_something_else_is_dropped(bench: BenchRun, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {PLAIN: 2.0, LAST: 1.0, COMPILED: 0.5}
    timed(monkeypatch, seconds, losses={LAST: 2.51}, fails=[COMPILED])
    choice = choose(ready(bench))
    assert choice.way == PLAIN
    assert "channels_last dropped: its first loss is 2.51, not 2.5" in choice.reason
    assert "compile (default) dropped: RuntimeError: no such kernel" in choice.reason and "trace" not in choice.reason


def test_runs_that_are_not_measured(bench: BenchRun, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {PLAIN: 1.0, LAST: 0.1})
    assert "199 steps are too few to measure" in choose(ready(bench, 199)).reason
    assert "says how" in choose(ready(bench, channels_last=True)).reason
    hooked = ready(bench)
    hooked.model.conv1.register_forward_hook(lambda *_: None)
    assert "hooks in the model" in choose(hooked).reason
    owned = ready(bench)
    owned.methods[0].own_step = lambda run, batch: run.task.loss(run, batch)  # type: ignore[assignment]
    assert "makes the steps itself" in choose(owned).reason


@pytest.mark.parametrize("words", [RESNET, VIT])
def test_trying_leaves_no_trace(tmp_path: Path, words: list[str]) -> None:
    run = ready(BenchRun("full", words, tmp_path))
    run.shared["mine"] = 1
    torch.manual_seed(5)
    generator, weights = torch.get_rng_state(), {k: v.clone() for k, v in run.model.state_dict().items()}
    shared, net, training = dict(run.shared), run.net, run.model.training
    choose(run)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, weights[k]) for k, v in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    assert (run.shared, run.net, run.model.training, run.step, run.epoch) == (shared, net, training, 0, 0)


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are traced, differentiated and put together as ever, and no C++ is written."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend="aot_eager"))


def trained(bench: BenchRun, way: Way | None, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Run, Tensor]:
    """A run of eight steps that goes this way (None: speed=off), and its losses."""
    monkeypatch.setattr(runner, "choose", lambda run: Choice(way or PLAIN))
    run = bench.fresh(speed="off" if way is None else "auto", steps=8, **options)
    runner.setup(run)
    runner.fit(run)
    return run, torch.stack(losses_of(run))


@pytest.mark.parametrize("words", [RESNET, VIT], ids=["resnet", "vit with dropout"])
@pytest.mark.parametrize("way", [PLAIN, LAST, COMPILED, Way(True, "default")], ids=str)
def test_results_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], way: Way) -> None:
    """Losses of eight steps to 1e-3, the plain way to the bit."""
    without_a_compiler(monkeypatch)
    bench = BenchRun("full", words, tmp_path)
    off, expected = trained(bench, None, monkeypatch)
    run, losses = trained(bench, way, monkeypatch)
    if way == PLAIN:
        assert torch.equal(losses, expected)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)
    with run.evaluating(), off.evaluating():
        torch.testing.assert_close(run.task.probe(run), off.task.probe(off), rtol=2e-2, atol=2e-3)
    if way.channels_last and words is RESNET:
        assert run.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert set(run.model.state_dict()) == set(off.model.state_dict())  # no prefix of a wrapper in what is stored


def test_max_takes_everything_and_bf16(bench: BenchRun, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_compiler(monkeypatch)
    assert Trainer(speed="max").precision == "bf16" and Trainer(speed="max", precision="16").precision == "16"
    run = bench.fresh(speed="max", steps=8)
    run.dir = Path()
    runner.setup(run)
    assert run.speed is not None and run.speed.way == Way(True, "default")
    runner.fit(run)
    _, expected = trained(bench, None, monkeypatch)
    torch.testing.assert_close(torch.stack(losses_of(run)), expected, rtol=5e-2, atol=5e-2)


def test_max_without_a_compiler_that_works(bench: BenchRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, mode: str) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    run = bench.fresh(speed="max")
    run.dir = Path()
    runner.setup(run)
    assert run.speed is not None and run.speed.way == LAST and "RuntimeError: no compiler" in run.speed.reason


def test_a_resumed_run_goes_on_in_the_same_way(
    bench: BenchRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed(monkeypatch, {PLAIN: 1e-3, LAST: 4e-4})
    run = ready(bench)
    run.dir = tmp_path
    assert choose(run).way == LAST and (tmp_path / FILE).is_file()
    taken = timed(monkeypatch, {PLAIN: 1e-3, LAST: 2e-3})
    assert choose(run).way == LAST and not taken


def test_names_of_cells() -> None:
    def of(**options: Any) -> str:
        top = {"speed": options.get("speed", "off")}
        return cell_digest({**top, "trainer": {"precision": "32", **options}, "pretrain": {"seed": 0}})

    assert (
        of()
        == of(speed="off")
        == of(speed="auto")
        == cell_digest({"trainer": {"precision": "32"}, "pretrain": {"seed": 0}})
    )
    assert of(speed="max") == of(precision="bf16") != of()
    assert of(speed="max", precision="16") == of(precision="16")


def test_the_record_and_the_log_say_what_was_chosen(smoke: Any, tmp_path: Path) -> None:
    from filtrun.record import Record

    words = ["method=full", *RESNET, "model.base=scratch", "trainer.steps=200", "trainer.evaluate=false"]
    done = smoke(*words, "speed=auto", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    told = Record.read(tmp_path / "run").environment["speed"]
    assert told["chosen"] in ("plain", "channels_last") and set(told["step_seconds"]) == {"plain", "channels_last"}
    assert f"speed=auto (train): {told['chosen']}; plain " in (tmp_path / "run" / "filtrun.log").read_text()
    wrong = smoke(*words, "speed=fast", f"hydra.run.dir={tmp_path / 'other'}")
    assert wrong.code == 2 and "unknown speed 'fast'" in wrong.err and "auto, max, off" in wrong.err


@pytest.mark.parametrize(
    ("device", "accumulate", "mode"), [("cuda", 1, "reduce-overhead"), ("cuda", 2, "default"), ("cpu", 1, "default")]
)
def test_cuda_graphs_are_left_out_where_gradients_add_up(device: str, accumulate: int, mode: str) -> None:
    run: Any = SimpleNamespace(device=torch.device(device), trainer=SimpleNamespace(accumulate=accumulate))
    assert speed._mode(run) == mode
