"""What the measurement of an unchanged base depends on."""

from __future__ import annotations

from pathlib import Path

import torch

from filtrun.base import evaluate_base
from filtrun.bench_run import BenchRun
from filtrun.checkpoint import weights_sha256


def test_the_same_weights_with_other_options_are_measured_again(tmp_path: Path) -> None:
    measured = []
    for option in ("false", "true", "true"):
        words = ["model=seplut", "model.width=2", "model.lut3d_size=9", "model.lut1d_size=9", "task.crop=16"]
        words += [f"model.quantized={option}", "data=photos", "data.patches=8", "task.eval_images=1"]
        run = BenchRun("full", words, tmp_path).fresh()
        torch.manual_seed(0)
        for parameter in run.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        measured.append(evaluate_base(run, weights_sha256(run.model))["psnr"])
    assert measured[0] != measured[1] == measured[2]
    assert sum(path.is_dir() for path in (tmp_path / "stages").glob("evaluate-base*")) == 2
