"""Folders of made-up runs: with curves, pictures, failures and names that mean harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HOSTILE = '</script><img src=x onerror="window.hurt=1"><!--\u2028\'"&amp;'


def picture(path: Path, seed: int, width: int = 518, height: int = 402) -> None:
    """Noise over a ramp: as hard to encode as a picture can be."""
    noise = np.random.default_rng(seed).integers(0, 120, (height, width, 3))
    ramp = np.linspace(0, 130, width)[None, :, None]
    Image.fromarray((noise + ramp).astype(np.uint8)).save(path, compress_level=1)


def add_run(root: Path, place: str, make: Callable[..., dict[str, Any]], steps: int = 50, **changes: Any) -> Path:
    """A finished run with a loss that falls as 1 / step."""
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(make(**changes)))
    lines = [{"step": i, "time": 1.0 * i, "train/loss": 1 / i, "lr": 0.001} for i in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def sweep(root: Path, make: Callable[..., dict[str, Any]]) -> Path:
    """Two methods with three seeds each, one failed run, one run with hostile text everywhere, one broken record."""
    for method, fid, params in (("lora", 20.0, 1000), ("sara", 12.0, 4000)):
        for seed in range(3):
            made = make()
            add_run(
                root, f"{method}{seed}", make, seed=seed, methods=[method], name=f"{method}-digits",
                overrides=[f"method={method}", f"seed={seed}"],
                config=made["config"] | {"seed": seed, "method": {method: {"rank": params}}},
                metrics={"test/fid": fid + seed, "test/target_accuracy": 0.9},
                cost=made["cost"] | {"trainable_params": params},
            )  # fmt: skip
    picture(root / "lora0" / "samples.png", 1)
    add_run(
        root, "stopped", make, seed=7, status="failed", error="the loss is not finite at step 12", metrics={},
        methods=["full"], name="full-digits", overrides=["method=full", "seed=7"],
    )  # fmt: skip
    config = make()["config"] | {"note": HOSTILE, HOSTILE: {"__proto__": HOSTILE}}
    add_run(
        root, "hostile", make, seed=9, name=HOSTILE, task=HOSTILE, data=HOSTILE, model=HOSTILE, methods=[HOSTILE],
        overrides=[HOSTILE], status="failed", error=HOSTILE, config=config, metrics={f"test/{HOSTILE}": 1.0},
        environment={HOSTILE: HOSTILE}, cost={HOSTILE: 1.0},
    )  # fmt: skip
    (root / "torn").mkdir()
    (root / "torn" / "record.json").write_text("{")
    return root
