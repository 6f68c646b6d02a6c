"""Runs that are killed, stopped, resumed, repeated: the result is the undisturbed run's, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLED = str(Path(__file__).with_name("killed.py"))
STEPS = ["trainer.steps=12", "trainer.checkpoint_every=3", "trainer.log_every=1"]
SMOKE = ["scale=smoke", "device=cpu", "logger=none", *STEPS]
DIFFUSE = [*SMOKE, "method=sara", "model.size=nano", "trainer.ema=0.9", "trainer.batch_size=64"]
CLASSIFY = [*SMOKE, "task=classify", "model=resnet20", "model.width=4", "method=full", "trainer.batch_size=128"]


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_result(folder: Path, undisturbed: Path, record: Callable[[Path], dict[str, Any]]) -> None:
    one, two = record(folder), record(undisturbed)
    assert (one["status"], two["status"]) == ("finished", "finished")
    assert one["metrics"] == two["metrics"] and one["key"] == two["key"] and one["report"] == two["report"]
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert steps_logged(folder) == steps_logged(undisturbed) == list(range(1, 13))
    assert not (folder / "checkpoints").exists()
    assert one["cost"]["steps"] == 12 and one["cost"]["train_seconds"] > 0


@pytest.mark.slow
def test_killed_everywhere_and_resumed(tmp_path: Path, command: Any, record: Any, cli: Any) -> None:
    """In pre-training, while writing a checkpoint, between two of them, and in the evaluation after training."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    here = f"stages.root={tmp_path / 'stages'}"
    first = command("pretrain:3", *DIFFUSE, here, f"hydra.run.dir={run}", cwd=tmp_path, start=[KILLED])
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert record(run)["status"] == "running"
    for place in ("write:6", "train:8", "evaluate:1"):
        died = command(place, f"resume={run}", cwd=tmp_path, start=[KILLED])
        assert died.returncode == -signal.SIGKILL, died.stderr
    assert steps_logged(run)[-1] == 12
    last = cli(f"resume={run}")
    assert last.code == 0, last.err
    assert cli(*DIFFUSE, f"stages.root={tmp_path / 'others'}", f"hydra.run.dir={whole}").code == 0
    same_result(run, whole, record)


@pytest.mark.slow
def test_the_same_command_again_goes_on_and_a_finished_run_is_left_alone(
    tmp_path: Path, command: Any, record: Any, stages_root: Path, cli: Any
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = [*CLASSIFY, f"stages.root={stages_root}"]
    # a checkpoint is written beside the training: the one of step 9 may not have been through when the run died
    for place, saved in (("train:2", [[]]), ("train:11", [[3, 6], [6, 9]])):
        died = command(place, *words, f"hydra.run.dir={run}", cwd=tmp_path, start=[KILLED])
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert sorted(int(p.stem[5:]) for p in run.glob("checkpoints/step-*")) in saved
    assert cli(*words, f"hydra.run.dir={run}").code == 0
    assert cli(*words, f"hydra.run.dir={whole}").code == 0
    same_result(run, whole, record)

    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()}
    again = cli(*words, f"hydra.run.dir={run}")
    assert again.code == 0 and "method full, data digits, model resnet20" in again.out
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.is_file()} == before

    other = cli(*words, "seed=1", f"hydra.run.dir={run}")
    assert other.code == 2 and "holds another run (full-digits-resnet20, finished)" in other.err
    assert record(run)["seed"] == 0

    assert cli(*words, "seed=1", "force=true", f"hydra.run.dir={run}").code == 0
    assert record(run)["seed"] == 1
    aside = [path for path in run.iterdir() if path.name.startswith("before-")]
    assert len(aside) == 1 and record(aside[0])["seed"] == 0
    assert (aside[0] / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (run / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    # going on with a run that was forced does not start it anew
    assert cli(f"resume={run}").code == 0 and len([p for p in run.iterdir() if p.name.startswith("before-")]) == 1


def start(words: list[str], folder: Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("filtrun")), *words, f"hydra.run.dir={folder}"],
        cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until the run has logged `step`; a part of a line counts as no line."""
    while True:
        path = folder / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_from_outside_at_random_steps(
    tmp_path: Path, record: Any, stages_root: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*CLASSIFY, "trainer.steps=60", "trainer.checkpoint_every=7", f"stages.root={stages_root}"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    reached = 0
    for _ in range(2):
        process = start(words, run, tmp_path)
        wait_for_step(process, run, reached + random.Random().randint(1, 20))
        process.kill()
        process.wait()
        reached = steps_logged_whole(run)[-1]
    assert cli(f"resume={run}").code == 0 and cli(*words, f"hydra.run.dir={whole}").code == 0
    assert record(run)["metrics"] == record(whole)["metrics"]
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert steps_logged(run) == list(range(1, 61))


def steps_logged_whole(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


@pytest.mark.slow
def test_a_run_in_use_is_refused_and_sigterm_leaves_a_record_that_says_so(
    tmp_path: Path, record: Any, stages_root: Path, cli: Any
) -> None:
    run = tmp_path / "run"
    words = [*CLASSIFY, "trainer.steps=1000000", f"stages.root={stages_root}"]
    process = start(words, run, tmp_path)
    try:
        wait_for_step(process, run, 4)
        assert record(run)["status"] == "running"
        other = cli(*words, f"hydra.run.dir={run}")
        assert other.code == 2
        assert (
            other.err == f"filtrun: another process is running in {run}; wait for it or choose another hydra.run.dir\n"
        )
        process.terminate()
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1 and f"filtrun: interrupted; go on with: filtrun resume={run}" in err
    assert "Traceback" not in err
    assert (record(run)["status"], record(run)["error"]) == (
        "interrupted",
        f"interrupted; go on with: filtrun resume={run}",
    )
    assert (run / "checkpoints").exists()


def test_resume_says_what_it_cannot_do(tmp_path: Path, smoke: Any, cli: Any) -> None:
    run = tmp_path / "my runs, (1) a=b"
    assert smoke("model=resnet20", "model.width=4", "method=none", f"hydra.run.dir='{run}'").code == 0
    assert cli(f"resume={tmp_path / 'none'}").err.startswith(f"filtrun: {tmp_path / 'none'} is no run folder")
    changed = cli(f"resume={run}", "trainer.lr=0.1")
    assert changed.code == 2 and "trainer.lr=0.1 cannot change with resume=" in changed.err
    done = cli(f"resume={run}")  # the folder's odd name reaches Hydra whole
    assert done.code == 0 and "method none, data digits, model resnet20" in done.out
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "record.json").write_text("{")
    broken = cli(f"resume={tmp_path / 'broken'}")
    assert broken.code == 2 and "record.json is no record of filtrun" in broken.err
