"""Ordinary steps of every task, optimizer and augmentation, and the loops of samplers, never wait for a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from filtrun import runner
from filtrun.bench_run import IMAGE_SETTINGS, BenchRun
from filtrun.callbacks import Ema, Log
from filtrun.conformance_waits import enough, in_every_step, on_stand_in, ordinary_steps, watched
from filtrun.loggers import Loggers
from filtrun.waits import Watch

CLASSIFY = ["task=classify", "model=resnet20", "model.width=4"]
VIT = ["task=classify", "model=vit", "model.size=nano", "model.depth=1"]
UNET = ["model=unet", "model.size=nano", "task.judge_steps=20"]
AUGMENTED = ["data.crop_pad=1", "data.flip=true", "data.cutout=2", "data.brightness=0.2", "data.contrast=0.2"]
STEPS = {
    "diffuse": UNET,
    "diffuse, discrete": [*UNET, "task.noise=cosine", "task.prediction=v", "data.flip=true"],
    "denoise": ["model=plain_unet", *IMAGE_SETTINGS["plain_unet"]],
    "denoise, blind": [
        "model=plain_unet", *IMAGE_SETTINGS["plain_unet"], "task.blind=[0,55]", "task.noise=poisson_gaussian",
        "task.rows=5", "+task.losses.ssim=0.1", "+task.losses.edge=0.1", "+task.losses.tv=0.1",
    ],
    "inpaint": ["model=misf", *IMAGE_SETTINGS["misf"]],
    "inpaint, boxes": ["model=misf", *IMAGE_SETTINGS["misf"], "task.masks=box"],
    "superres": ["model=espcn", *IMAGE_SETTINGS["espcn"]],
    "derain": ["model=dpenet", *IMAGE_SETTINGS["dpenet"]],
    "tonemap": ["model=lut3d", *IMAGE_SETTINGS["lut3d"], "task.detail=[0.5,1.5]"],
    "tonemap, llf_lut": ["model=llf_lut", *IMAGE_SETTINGS["llf_lut"]],
    "inverse": ["task=inverse", "model=unet", "model.size=nano"],
    "augmented": [*CLASSIFY, *AUGMENTED],
    "alternating flips": [*CLASSIFY, "data.flip=true", "data.alternate_flip=true", "data.crop_pad=1"],
}  # fmt: skip
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw, clipped, accumulated": {"clip": 1.0, "accumulate": 2},
    "adam in bf16": {"optimizer": "adam", "precision": "bf16"},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "clip": 0.0},
    "muon": {"optimizer": "muon", "matrix_rescale": True},
    "muon, others by sgd": {"optimizer": "muon", "others": "sgd", "matrix_scale": "paper"},
    "auon": {"optimizer": "auon"},
    "hybrid auon": {"optimizer": "auon", "matrix_steps": 1, "schedule": "cosine", "warmup": 2},
}


@pytest.mark.parametrize("setting", STEPS)
def test_no_step_of_a_task_waits(setting: str, tmp_path: Path) -> None:
    run, events = watched(BenchRun("full", STEPS[setting], tmp_path))
    assert [event for event in events if event.kind != "waits"] == []
    assert in_every_step(run, events) == []


@pytest.mark.parametrize("setting", OPTIMIZERS)
def test_no_step_of_an_optimizer_waits(setting: str, tmp_path: Path) -> None:
    bench = BenchRun("full", VIT, tmp_path)
    run, events = watched(bench, **OPTIMIZERS[setting])
    assert [event for event in events if event.kind != "waits"] == []
    assert in_every_step(run, events) == []


def test_averages_and_the_log_wait_where_they_log_only(tmp_path: Path) -> None:
    ema, log = Ema(0.9), Log(100, Loggers())
    run, events = watched(BenchRun("full", CLASSIFY, tmp_path), callbacks=[log, ema])
    steps = ordinary_steps([phase.steps for phase in run.phases], run.steps_per_epoch)
    assert steps == {2, 3, 4}
    assert [event for event in events if event.step in steps] == []
    assert [event.function for event in events if event.step == 5] == ["Log.flush"]


@pytest.mark.parametrize("epoch", [4, 5, 6, 11])
def test_a_short_run_has_two_ordinary_steps_running(epoch: int) -> None:
    steps = ordinary_steps([enough(epoch)], epoch)
    assert any(step + 1 in steps for step in steps)


def waits_of(method: str, words: list[str], steps: int, folder: Path) -> Counter[tuple[str, str]]:
    """How often each line waits (or mixes devices) in one batch of samples of `steps` steps."""
    bench = BenchRun(method, [*words, f"task.sample_steps={steps}"], folder)
    with Watch() as watch:
        run = bench.fresh(edit=False, fabric=on_stand_in())
        run.model.to(run.device)
        runner.edit(run)
        task: Any = run.task
        for _ in range(2):  # what is made once for a device is there the second time
            watch.events.clear()
            with run.evaluating():
                if task.kind == "inverse":
                    task.solve(run, *task.test_images(run, "all", 3))
                else:
                    task.generate(run, task.classes(run, "all", 3), 0)
    assert {event.kind for event in watch.events} <= {"waits"}
    return Counter((event.place, event.operation) for event in watch.events)


INVERSE = ["task=inverse", "model=unet", "model.size=nano", "task.measurement_noise=0.05"]
LOOPS = {
    **{f"cfg {s}": ("cfg", [*UNET, f"task.sampler={s}"]) for s in
       ("ddim", "heun", "ancestral", "dpmpp_3m", "dpmpp_2s", "dpmpp_2s_ancestral", "unipc", "unipc_bh1_2")},
    "cfg eps": ("cfg", [*UNET, "task.noise=linear", "task.prediction=eps"]),
    **{method: (method, UNET) for method in ("apg", "cfgpp", "elucd")},
    "dpm_solver_v3": ("dpm_solver_v3", [*UNET, "method.dpm_solver_v3.statistics_levels=12",
                                        "method.dpm_solver_v3.draws=4", "method.dpm_solver_v3.derivative=difference"]),
    "elucd edm": ("elucd", [*UNET, "method.elucd.variant=edm", "task.sampler=heun"]),
    **{f"{method} {operator}": (method, [*INVERSE, f"task.operator={operator}"]) for method, operator in
       (("dps", "superres_average"), ("ddrm", "cs_gaussian"), ("red_diff", "blur_gaussian"),
        ("red_diff", "inpaint_random"), ("ddrm", "superres_bicubic"))},
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_more_steps_of_a_sampler_are_no_more_waits(loop: str, tmp_path: Path) -> None:
    method, words = LOOPS[loop]
    few, many = (waits_of(method, words, steps, tmp_path) for steps in (4, 7))
    assert many - few == Counter()


def test_adaptive_guidance_waits_once_in_a_step_of_two_calls(tmp_path: Path) -> None:
    words = [*UNET, "task.sampler=heun"]
    few, many = (waits_of("adaptive_guidance", words, steps, tmp_path) for steps in (4, 8))
    assert {operation: count for (_, operation), count in (many - few).items()} == {"nonzero": 2}


def test_ordinary_steps() -> None:
    assert ordinary_steps([6, 5], 100) == {2, 3, 4, 8, 9}
    assert ordinary_steps([12], 4) == {2, 5, 6, 9, 10}
    assert ordinary_steps([3, 2], 100) == set()
