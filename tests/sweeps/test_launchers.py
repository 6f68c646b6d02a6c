"""Launchers by name and options; what is wrong with them is told in a line, before anything is started."""

from __future__ import annotations

import builtins
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from filtrun.catalogue import conf_dir
from filtrun.config_file import comments
from filtrun.errors import UserError
from filtrun.sweeps.launcher_options import LocalOptions, SlurmOptions, minutes
from filtrun.sweeps.launchers import GROUP, OPTIONS, launcher_of, make_launcher
from filtrun.sweeps.on_ray import Ray
from filtrun.sweeps.on_slurm import Slurm
from filtrun.sweeps.on_submitit import Local, import_submitit


def test_words_of_the_launcher_are_pulled_out() -> None:
    words = ["method=sara,lora", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "seed=0",
             "hydra.launcher.gpus_per_node=2", "hydra.launcher.time=1-12:00:00", "hydra.sweep.dir=x",
             'hydra.launcher.setup=["module load cuda", source env.sh]', "+hydra.launcher.mem='16GB'",
             "hydra.launcher.additional_parameters={exclusive: true, nice: 5}", "hydra.launcher.use_srun=false",
             "hydra.launcher.qos=null"]  # fmt: skip
    rest, name, options = launcher_of(words)
    assert rest == ["method=sara,lora", "seed=0", "hydra.sweep.dir=x"] and name == "submitit_slurm"
    differ = {k: v for k, v in options.items() if v != getattr(SlurmOptions(), k)}
    assert differ == {
        "partition": "gpu", "gpus_per_node": 2, "time": "1-12:00:00", "mem": "16GB", "use_srun": False,
        "setup": ["module load cuda", "source env.sh"], "additional_parameters": {"exclusive": True, "nice": "5"},
    }  # fmt: skip
    assert launcher_of(["seed=0"]) == launcher_of(["seed=0", "hydra/launcher=basic"]) == (["seed=0"], None, {})
    assert launcher_of(["hydra/launcher=ray", "hydra.launcher.num_gpus=0.25"])[2]["num_gpus"] == 0.25
    kinds = [type(make_launcher(name, {})) for name in ("submitit_local", "submitit_slurm", "ray", None)]
    assert kinds == [Local, Slurm, Ray, type(None)]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("hydra/launcher=submitit_slrm", "unknown hydra/launcher 'submitit_slrm'; did you mean 'submitit_slurm'?"),
        ("hydra.launcher.partitoin=gpu", "partitoin: submitit_slurm has no such option; did you mean 'partition'?"),
        ("hydra.launcher.gpus_per_node=two", "gpus_per_node='two' must be a whole number or null"),
        ("hydra.launcher.gpus_per_node=-1", r"gpus_per_node=-1 is out of range; allowed is \[0, inf\]"),
        ("hydra.launcher.time=4h", "hydra.launcher.time=4h must be minutes or D-HH:MM:SS"),
        ("hydra.launcher.time=2", "hydra.launcher.grace=120 seconds must be less than hydra.launcher.time=2"),
        ("hydra.launcher.setup=[a", "is not understood"),
        ("hydra.launcher.setup=a", "must be a list"),
        ("~hydra.launcher.mem", "~hydra.launcher.mem is not understood"),
    ],
)
def test_what_is_wrong_is_told(word: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        launcher_of(["hydra/launcher=submitit_slurm", word])


def test_options_go_with_a_launcher_and_a_launcher_with_a_sweep(cli: Any) -> None:
    with pytest.raises(UserError, match="hydra.launcher.mem goes with hydra/launcher=NAME"):
        launcher_of(["hydra.launcher.mem=1GB"])
    with pytest.raises(UserError, match="unknown launcher 'slurm'"):
        make_launcher("slurm", {})
    alone = cli("hydra/launcher=ray")
    assert (alone.code, alone.err) == (2, "filtrun: hydra/launcher goes with -m: it starts the cells of a sweep\n")


def test_a_launcher_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / GROUP
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("engine: submitit_slurm\npartition: a100\ntime: 4:00:00\ngpus_per_node: 1\n")
    (folder / "bad.yaml").write_text("partition: a100\n")
    _, name, options = launcher_of(["hydra/launcher=mine", "hydra.launcher.time=90"], [tmp_path])
    assert (name, options["partition"], options["time"], options["gpus_per_node"]) == (
        "submitit_slurm",
        "a100",
        "90",
        1,
    )
    assert minutes(launcher_of(["hydra/launcher=mine"], [tmp_path])[2]["time"]) == 240
    with pytest.raises(UserError, match="bad.yaml: `engine:` must be one of submitit_local, submitit_slurm, ray"):
        launcher_of(["hydra/launcher=bad"], [tmp_path])
    with pytest.raises(UserError, match="allowed: bad, basic, mine, ray, submitit_local, submitit_slurm"):
        launcher_of(["hydra/launcher=../mine"], [tmp_path])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("1:30", 2), ("4:00:00", 240), ("0:0:1", 1), ("2-0", 2880), ("1-2:3", 1563), ("1-00:00:30", 1441)],
)
def test_times_are_slurm_s(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_files_hold_every_option_with_its_default_and_meaning() -> None:
    for name, kind in OPTIONS.items():
        text = (conf_dir() / GROUP / f"{name}.yaml").read_text()
        values = yaml.safe_load(text)
        assert values.pop("engine") == name
        defaults = {field.name: getattr(kind(), field.name) for field in dataclasses.fields(kind)}
        assert {**values, "time": str(values.get("time"))} == {**defaults, "time": str(defaults.get("time"))}
        said = set(comments(text)[1])
        plain = {
            "partition",
            "account",
            "qos",
            "constraint",
            "nodelist",
            "exclude",
            "job_name",
            "srun_args",
            "detached",
        }
        assert set(defaults) - plain <= said, set(defaults) - said
        assert launcher_of([f"{GROUP}={name}"])[2] == defaults


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from filtrun.sweeps.on_ray import import_ray

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name in ("submitit", "ray"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=re.escape("needs submitit: pip install 'filtrun[slurm]'")):
        import_submitit("submitit_local")
    with pytest.raises(UserError, match=re.escape("hydra/launcher=ray needs Ray: pip install 'filtrun[ray]'")):
        import_ray()


def test_a_dry_run_starts_nothing(cli: Any, monkeypatch: pytest.MonkeyPatch, stages_root: Path) -> None:
    monkeypatch.setattr(Slurm, "open", None)  # would fail at once
    words = ["scale=smoke", "model=resnet20", "method=none", "device=cpu", f"stages.root={stages_root}"]
    dry = cli("--dry-run", "-m", *words, "seed=0,1", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu")
    assert dry.code == 0 and "2 cells would run" in dry.out
    assert "no such option" in cli("--dry-run", "-m", *words, "hydra/launcher=ray", "hydra.launcher.gpus=1").err
    assert list(Path().iterdir()) == []


def test_local_options() -> None:
    assert LocalOptions().time is None
    with pytest.raises(UserError, match="hydra.launcher.grace=90 seconds"):
        LocalOptions(time="1", grace=90)
