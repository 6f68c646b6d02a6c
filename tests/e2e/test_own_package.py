"""A method, a model and a data set of somebody else's package, as the README tells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).with_name("example")
OWN = ["--config-dir", str(EXAMPLE / "conf"), "method=noisy_head", "model=two_layers", "data=stripes"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in [n for n in sys.modules if n.split(".")[0] == "mypkg"]:
        monkeypatch.delitem(sys.modules, name)


def test_it_runs_when_trusted(tmp_path: Path, smoke: Any, record: Any) -> None:
    words = [*OWN, "trust=[mypkg]", "trainer.steps=150", "pretrain.steps=40", "trainer.lr=0.02"]
    done = smoke(*words, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    assert "method noisy_head, data stripes, model two_layers, task classify" in done.out
    values = record(tmp_path / "run")
    assert values["report"] == {"noisy_head": {"noise": 0.01}} and values["config"]["data"]["images"] == 300
    assert values["cost"]["trainable_params"] == 32 * 3 + 3
    assert values["cost"]["total_params"] == 64 * 32 + 32 + 32 * 3 + 3
    assert values["metrics"]["base/source_accuracy"] == 1.0  # two directions are easy to tell apart
    assert values["metrics"]["base/accuracy"] < 0.5 < values["metrics"]["test/accuracy"]


def test_without_trust_nothing_of_it_is_imported(tmp_path: Path, smoke: Any) -> None:
    done = smoke(*OWN, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.code == 2 and done.err.splitlines() == [
        "filtrun: _target_=mypkg.parts.NoisyHead is code of the package 'mypkg', which is not trusted",
        "         add trust=[mypkg] if you know what it does",
    ]
    assert not any(name.split(".")[0] == "mypkg" for name in sys.modules)


def test_its_options_are_checked_like_any_others(tmp_path: Path, smoke: Any) -> None:
    words = [*OWN, "trust=[mypkg]", f"hydra.run.dir={tmp_path / 'run'}"]
    assert "method.noisy_head.noise=-1.0 is out of range" in smoke(*words, "method.noisy_head.noise=-1").err
    assert "data.images='x' must be a whole number" in smoke(*words, "data.images=x").err
    unknown = smoke("--config-dir", str(EXAMPLE / "conf"), "method=noisy_hed", f"hydra.run.dir={tmp_path / 'run'}")
    assert unknown.code == 2 and "did you mean 'noisy_head'?" in unknown.err


def test_from_python_and_resumed_with_the_same_folder(tmp_path: Path, cli: Any, stages_root: Path) -> None:
    import filtrun

    words = [*OWN[2:], "scale=smoke", "device=cpu", "logger=none", "trust=[mypkg]", f"stages.root={stages_root}"]
    done = filtrun.run(*words, f"hydra.run.dir={tmp_path / 'run'}", config_dir=EXAMPLE / "conf")
    assert done.status == "finished" and done.methods == ["noisy_head"]
    again = cli(f"resume={tmp_path / 'run'}", *OWN[:2])
    assert again.code == 0 and "method noisy_head" in again.out


def test_list_and_conformance_know_it(cli: Any) -> None:
    from filtrun.conformance import conform

    checks = conform("noisy_head", "model=vit", "model.size=nano", "model.depth=1", "trust=[mypkg]", ddp=False,
                     config_dir=EXAMPLE / "conf")  # fmt: skip
    assert [c for c in checks if c.status == "failed"] == [] and len(checks) >= 10
