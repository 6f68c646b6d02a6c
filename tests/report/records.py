"""A finished record, as a run of the main job leaves it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

_VALUES = {"fid": (71.3, 12.41), "target_accuracy": (0.02, 0.917), "source_accuracy": (0.93, 0.87)}

_RECORD: dict[str, Any] = {
    "schema": 1, "status": "finished", "key": "0123456789abcdef", "name": "sara-digits-unet",
    "overrides": ["method=sara", "seed=1"],
    "config": {"scale": "laptop", "seed": 1, "task": {"_target_": "filtrun.tasks.diffuse.Diffuse"},
        "model": {"size": "tiny"}},
    "seed": 1, "task": "diffuse", "data": "digits", "model": "unet", "methods": ["sara"],
    "metrics": {
        f"{split}/{name}": pair[split != "base"]
        for split in ("base", "tuned", "test") for name, pair in _VALUES.items()
    },
    "cost": {
        "trainable_params": 20480, "total_params": 204800, "stored_bytes": 84120, "peak_memory_bytes": 412345678,
        "train_seconds": 75.0, "images_per_second": 1352.3, "steps": 300, "nfe": 20,
        "total_seconds": 48.2, "flops": 1.2e6,
    },
    "report": {"sara": {"threshold": 0.0123456, "selected_weights": 20480}},
    "evaluation": {"feature_net": "small_cnn features", "judge": "small_cnn judge", "samples": 512},
    "stages": [{"name": "pretrain", "key": "abababababababab", "cached": True}],
    "environment": {"python": "3.11.7", "torch": "2.13.0", "device": "cpu (x86_64)", "filtrun": "0.1.0", "git": None},
    "artifacts": [{"path": "samples.png", "kind": "samples", "sha256": "0" * 64}],
    "error": None,
}  # fmt: skip


def make_record(**changes: Any) -> dict[str, Any]:
    """A copy of the record with some keys changed."""
    return copy.deepcopy(_RECORD) | changes


def write_record(folder: Path, **changes: Any) -> Path:
    """Write the record into `folder`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(make_record(**changes)))
    return folder
