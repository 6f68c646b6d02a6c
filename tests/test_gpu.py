"""What only a CUDA device can show: skipped, with a reason, where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import filtrun
from filtrun.methods.peft.sara import SaRA
from filtrun.models.unet import UNet

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
    assert record.cost["peak_memory_bytes"] == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.5)


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
    return torch.cuda.max_memory_allocated()


def test_scattered_gradients_take_less_memory_than_masked_ones() -> None:
    assert peak(sara=True) < 0.85 * peak(sara=False)


def test_the_loop_does_not_wait_for_the_device(tmp_path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        filtrun.run(
            "scale=smoke", "device=cuda", "method=full", "model.base=scratch", "trainer.steps=40",
            "trainer.log_every=40", "trainer.checkpoint_every=0", "trainer.evaluate=false",
            f"hydra.run.dir={tmp_path}/r", f"stages.root={tmp_path}/s",
        )  # fmt: skip
    waits = [e for e in seen.key_averages() if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize")]
    assert sum(e.count for e in waits) < 40, "more waits than a few for set-up and the final reading"
