"""What only a CUDA device can show: skipped, with a reason, where there is none."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest
import torch

import filtrun
from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.catalogue import conf_dir
from filtrun.conformance_waits import STEPS, ordinary_steps
from filtrun.context import Run
from filtrun.errors import Unfit
from filtrun.method import Method
from filtrun.methods.peft.sara import SaRA
from filtrun.models.unet import UNet

METHODS = sorted(path.stem for path in (Path(conf_dir()) / "method").glob("*.yaml"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_the_main_job_runs_on_the_gpu(tmp_path: Path) -> None:
    record = filtrun.run(
        "scale=smoke", "device=cuda", f"hydra.run.dir={tmp_path}/run", f"stages.root={tmp_path}/stages"
    )
    assert record.status == "finished"
    assert record.environment["device"].startswith("cuda")
    assert 0 < record.cost["peak_memory_bytes"] <= torch.cuda.max_memory_allocated(), "evaluation may take more"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32: TF32, cuDNN's default, has ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("exact")
def test_losses_agree_with_the_cpu(tmp_path: Path) -> None:
    """Classification draws nothing at random but the order and the weights, which come from CPU generators."""
    losses = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        filtrun.run(
            "scale=smoke", "model=resnet20", "method=full", "model.base=scratch", "trainer.evaluate=false",
            "trainer.log_every=1", "trainer.steps=3", f"device={device}", f"hydra.run.dir={folder}",
            f"stages.root={tmp_path}/s",
        )  # fmt: skip
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["train/loss"] for line in lines]
    assert len(losses["cpu"]) == 3
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.usefixtures("exact")
def test_seeds_trained_at_once_are_as_they_are_alone(tmp_path: Path) -> None:
    from filtrun.sweeps.jobs import make_jobs, run_jobs

    words = [
        "scale=smoke", "data=digits", "task=classify", "model=resnet20", "model.base=scratch", "method=full",
        "trainer.steps=5", "device=cuda", "logger=none",
    ]  # fmt: skip
    ends = {}
    for way in ("true", "false"):
        extra = [f"stages.root={tmp_path}/stages", f"vectorize={way}"]
        ends[way] = run_jobs(make_jobs(words, (0, 1, 2), tmp_path / way, extra=extra))
        assert [end.error for end in ends[way]] == [""] * 3
    assert [end.record.cost.get("together") for end in ends["true"]] == [3, 3, 3]
    for at_once, alone in zip(ends["true"], ends["false"], strict=True):
        assert at_once.record.metrics["test/nll"] == pytest.approx(alone.record.metrics["test/nll"], rel=1e-2)


def peak(sara: bool) -> int:
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    model = UNet(in_channels=3, num_classes=10, image_size=32, size="base").cuda()
    method = SaRA(fraction=0.15, progressive_iter=None, lambda_rank=0.0, memory="scatter" if sara else "dense")
    optimizer = method.optimizer(model)
    x, noise, y = torch.randn(4, 3, 32, 32).cuda(), torch.zeros(4).cuda(), torch.arange(4).cuda()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        model(x, noise, y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - before


def test_scattered_gradients_take_less_memory_than_masked_ones() -> None:
    assert peak(sara=True) < 0.85 * peak(sara=False)


def waits_of_a_run(steps: int, tmp_path: Path) -> int:
    """How often the host waited in a run of so many steps, from its start to its end."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        filtrun.run(
            "scale=smoke", "device=cuda", "method=full", "model.base=scratch", f"trainer.steps={steps}",
            f"trainer.log_every={steps}", "trainer.checkpoint_every=0", "trainer.evaluate=false", "logger=none",
            f"hydra.run.dir={tmp_path}/{steps}", f"stages.root={tmp_path}/stages",
        )  # fmt: skip
    return sum(e.count for e in seen.key_averages() if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))


def test_more_steps_are_no_more_waits(tmp_path: Path) -> None:
    """Set-up waits for every tensor it copies, and the end reads the losses; what lies between must not wait."""
    waits_of_a_run(5, tmp_path)  # trains the judges, which the others take from the cache
    few, many = waits_of_a_run(10, tmp_path), waits_of_a_run(60, tmp_path)
    assert many - few < 10, f"{many - few} more waits in 50 more steps"


class SyncWarnings(Method):
    """Callback that lets torch warn of waits while a run trains, and notes where: (file, line) by step."""

    def __init__(self) -> None:
        self.places: dict[int, set[tuple[str, int]]] = {}
        self.heard: list[warnings.WarningMessage] = []

    def after_step(self, run: Run) -> None:
        told = [w for w in self.heard if "synchronizing CUDA operation" in str(w.message)]
        self.places[run.step - 1] = {(w.filename, w.lineno) for w in told}
        self.heard.clear()


@pytest.mark.parametrize("method", METHODS)
def test_no_ordinary_step_of_a_method_waits(method: str, tmp_path: Path) -> None:
    """The conformance suite finds waits on a CPU, by knowing what waits; here torch itself says so."""
    from lightning_fabric import Fabric

    from filtrun.conformance import settings_of

    for words in settings_of(method):
        try:
            bench = BenchRun(method, words, tmp_path)
            run = bench.fresh(edit=False, fabric=Fabric(accelerator="cuda", devices=1), steps=STEPS)
            run.model.to(run.device)
            runner.edit(run)
            runner.setup(run)
        except Unfit:
            continue
        if run.optimizer is None:
            continue
        noted = SyncWarnings()
        run.callbacks.append(noted)
        with warnings.catch_warnings(record=True) as noted.heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                runner.fit(run)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        steps = ordinary_steps([phase.steps for phase in run.phases], run.steps_per_epoch)
        both = [noted.places[s] & noted.places[s + 1] for s in steps if s + 1 in steps]
        assert set().union(*both) == set(), words
