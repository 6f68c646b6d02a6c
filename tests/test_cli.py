"""The command line: what loads, what is printed, what is written, and from where it works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from filtrun.cli import complain, split_arguments
from filtrun.errors import RunFailure, UserError

IMPORTS = """
import sys
from filtrun.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
heavy = sorted({"torch", "hydra", "sklearn", "lightning_fabric"} & set(sys.modules))
print("IMPORTED", *heavy)
sys.exit(code)
"""


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        (["--help"], ["hydra"]),
        (["list"], []),
        (["info", "sara"], []),
        (["--cfg", "job"], ["hydra"]),
        (["method=sarra"], ["hydra"]),
    ],
)
def test_quick_commands_do_not_import_torch(tmp_path: Path, words: list[str], loaded: list[str]) -> None:
    done = python("-c", IMPORTS, *words, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].split() == ["IMPORTED", *loaded], done.stderr
    assert os.listdir(tmp_path) == []


def test_help_tells_the_commands_and_the_choices(cli: Any) -> None:
    done = cli("--help")
    assert done.code == 0
    for text in ("filtrun list | info NAME", "method: ", "sara", "resnet20", "--dry-run"):
        assert text in done.out


def test_the_configuration_is_printed_and_can_be_read_back(cli: Any, tmp_path: Path) -> None:
    import yaml

    values = yaml.safe_load(cli("--cfg", "job", "scale=smoke").out)
    assert values["trainer"]["steps"] == 4 and values["method"]["sara"]["_target_"] == "filtrun.methods.peft.sara.SaRA"
    assert yaml.safe_load(cli("task=classify", "--cfg", "job").out)["model"]["_target_"].endswith("cifar_resnet")
    both = yaml.safe_load(cli("method=[full,none]", "--cfg", "job").out)
    assert list(both["method"]) == ["full", "none"]
    assert os.listdir(tmp_path) == []


def test_flags_may_stand_anywhere() -> None:
    flags, overrides = split_arguments(["seed=1", "-m", "--config-dir", "my conf", "method=a,b", "--cfg", "job"])
    assert (flags, overrides) == (["-m", "--config-dir", "my conf", "--cfg", "job"], ["seed=1", "method=a,b"])
    assert split_arguments(["--config-dir=x", "a=1"]) == (["--config-dir=x"], ["a=1"])
    with pytest.raises(UserError, match="unknown flag '--dryrun'; did you mean '--dry-run'?"):
        split_arguments(["--dryrun"])


def test_messages_are_at_most_six_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain(RunFailure("\n".join(f"line {i}\n" for i in range(20)))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "filtrun: line 0" and lines[-1] == "         line 5" and len(lines) == 6


def test_a_dry_run_writes_nothing_and_builds_every_cell(tmp_path: Path, cli: Any) -> None:
    done = cli("--dry-run", "scale=smoke", "device=cpu", "method=full,none", "model=resnet20", "seed=0,1", "-m")
    assert done.code == 0, done.err
    assert "4 cells would run" in done.out and "269,434" in done.out  # grey images, ten classes
    assert done.out.count("method=full") == 2 and " 64 " in done.out  # four steps of sixteen images
    assert os.listdir(tmp_path) == []
    wrong = cli("--dry-run", "scale=smoke", "method=sara,linear_probe", "model=unet", "-m")
    assert wrong.code == 0 and "linear_probe: skipped: method=linear_probe works with task=classify" in wrong.err
    assert "1 cells would run" in wrong.out and "1 skipped" in wrong.out
    alone = cli("--dry-run", "scale=smoke", "method=linear_probe", "model=unet")
    assert alone.code == 2 and "works with task=classify" in alone.err
    assert os.listdir(tmp_path) == []


def test_a_dry_run_knows_the_time_of_earlier_runs(tmp_path: Path, smoke: Any) -> None:
    words = ["model=resnet20", "model.width=4", "method=full"]
    assert "unknown" in smoke("--dry-run", *words).out
    assert smoke(*words, "hydra.run.dir=outputs/runs/one").code == 0
    assert "for the 1 cells with earlier runs" in smoke("--dry-run", *words).out


def test_a_run_from_python_returns_its_record(
    tmp_path: Path, stages_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filtrun
    from filtrun.errors import RunFailure

    monkeypatch.chdir(tmp_path)
    words = [
        "scale=smoke",
        "device=cpu",
        "logger=none",
        "model=resnet20",
        "model.width=4",
        f"stages.root={stages_root}",
    ]
    done = filtrun.run(*words, "method=full")
    assert done.status == "finished" and done.folder.parent == tmp_path / "outputs" / "runs"
    assert 0 <= done.metrics["test/accuracy"] <= 1 and done.cost["steps"] == 4
    config, choices, folder = filtrun.compose(*words, "method=full", "hydra.run.dir=here")
    assert (choices["method"], choices["data"], folder) == ("full", "digits", Path("here"))
    assert config["trainer"]["steps"] == 4 and "hydra" not in config
    config, *_ = filtrun.compose("data=fashion_mnist", "scale=paper", "pretrain.steps=70", "pretrain.ema=0.5")
    assert (config["pretrain"]["steps"], config["pretrain"]["ema"]) == (70, 0.5)  # which no recipe had set
    with pytest.raises(UserError, match="pretrain.stepz"):
        filtrun.compose("pretrain.stepz=70")
    with pytest.raises(RunFailure, match="the loss became nan"):
        filtrun.run(*words, "method=full", "model.base=scratch", "trainer.lr=1e30", "hydra.run.dir=nan")
    assert filtrun.run is not None and callable(filtrun.run)  # no module of the package hides it
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        filtrun.rum  # noqa: B018


def test_the_module_is_the_command(tmp_path: Path, stages_root: Path) -> None:
    """In a process of its own, from another folder, with relative paths."""
    (tmp_path / "here").mkdir()
    words = ["scale=smoke", "device=cpu", "logger=none", "model=resnet20", "model.width=4", "method=none"]
    done = python("-m", "filtrun", *words, f"stages.root={stages_root}", cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "here" / "outputs" / "runs").iterdir()
    assert (run / "record.json").exists() and f"results: {run}" in done.stdout.replace("\n", "")
    script = Path(sys.executable).with_name("filtrun")
    listed = subprocess.run([script, "list"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert listed.returncode == 0 and "sara" in listed.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m filtrun list | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.stdout
