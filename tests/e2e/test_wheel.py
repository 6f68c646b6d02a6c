"""The wheel carries the configurations and works from any folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling builds the wheel: pip install hatchling"
)
def test_an_installed_wheel_finds_its_configurations(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("filtrun-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "filtrun/conf/config.yaml",
        "filtrun/record.schema.json",
        "filtrun/conf/method/sara.yaml",
        "filtrun/conf/catalogue.jsonl",
        "filtrun/conf/sweep/peft.yaml",
        *(f"filtrun/report/page/assets/{name}" for name in ("body.html", "page.css", "start.js")),
    } <= set(names)
    assert not any(name.startswith(("tests/", "bench/", "conf/")) for name in names)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    subprocess.run(
        [*pip, "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)], check=True, timeout=300
    )
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}

    def filtrun(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "filtrun", *words]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)

    where = subprocess.run(
        [sys.executable, "-c", "from filtrun.catalogue import conf_dir; print(conf_dir())"],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.strip() == str(site / "filtrun" / "conf")
    composed, listed = filtrun("--cfg", "job", "method=lora"), filtrun("list")
    assert composed.returncode == 0 and "filtrun.methods.peft.lora.LoRA" in composed.stdout, composed.stderr
    assert listed.returncode == 0 and "resnet20" in listed.stdout
    run = filtrun("scale=smoke", "device=cpu", "logger=none", "model=resnet20", "model.width=4", "method=none")
    assert run.returncode == 0, run.stderr
