"""Real images on disk, and the command as a process of its own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS/*.png: twelve cut-outs of each of three photographs."""
    from PIL import Image
    from skimage import data

    root = tmp_path_factory.mktemp("photos")
    for name, photo in {"astronaut": data.astronaut(), "cat": data.chelsea(), "coffee": data.coffee()}.items():
        (root / name).mkdir()
        rng = np.random.default_rng(0)
        for i in range(12):
            y, x = rng.integers(0, photo.shape[0] - 120), rng.integers(0, photo.shape[1] - 120)
            Image.fromarray(photo[y : y + 120, x : x + 120]).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python version of CIFAR-10 with 20 images in each of its six files, from photographs."""
    from skimage import data

    photo = np.concatenate([data.astronaut()[:400, :400], data.coffee()[:400, :400]])
    root = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        corners = rng.integers(0, 360, (20, 2))
        images = [photo[y * 2 % 700 :, x:][:32, :32].transpose(2, 0, 1).reshape(-1) for y, x in corners]
        batch = {b"data": np.stack(images), b"labels": [i % 10 for i in range(20)]}
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root.parent


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m filtrun`` as its own process."""

    def run(*words: str, cwd: Path, env: dict[str, str] | None = None, start: list[str] | None = None) -> Any:
        return subprocess.run(
            [sys.executable, *(start or ["-m", "filtrun"]), *map(str, words)],
            cwd=cwd, env=os.environ | {"COLUMNS": "200"} | (env or {}), capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


@pytest.fixture
def record() -> Callable[[Path], dict[str, Any]]:
    """The record in a run folder, checked against the schema."""
    from filtrun.record import validate

    def read(folder: Path) -> dict[str, Any]:
        values = json.loads((folder / "record.json").read_text())
        validate(values)
        return values

    return read
