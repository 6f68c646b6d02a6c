"""Two processes on one machine: the same training as one, and mistakes told as one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

VIT = ["model=vit", "model.size=nano", "model.depth=1", "method=full", "model.base=scratch"]
SMOKE = ["scale=smoke", "device=cpu", "logger=none", "trainer.checkpoint_every=2"]


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path, command: Any, record: Any, smoke: Any) -> None:
    done = command(*SMOKE, *VIT, "trainer.devices=2", f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert smoke(*VIT, f"hydra.run.dir={tmp_path / 'one'}").code == 0
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert two["status"] == "finished" and two["key"] == one["key"]  # how many processes is no part of what is computed
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    from filtrun.pack import load_tree

    weights = [load_tree(tmp_path / name / "model.safetensors")[0]["tensors"] for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0]) < 1e-4
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


@pytest.mark.slow
def test_a_failure_in_one_of_them_is_one_message(tmp_path: Path, command: Any, record: Any) -> None:
    words = [*SMOKE, *VIT, "trainer.devices=2", "trainer.lr=1e30", "trainer.clip=0"]
    done = command(*words, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "filtrun: the loss became nan between steps" in done.stderr
    values = record(tmp_path / "run")
    assert values["status"] == "failed" and values["error"].startswith("the loss became nan between steps")
