"""Searches as `filtrun search` leaves them, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTING = {"methods": ["full"], "task": "classify", "data": "digits", "model": "resnet20", "scale": "laptop"}


def write_search(outputs: Path, name: str, states: list[str], keys: Any = ("trainer.lr",), **changes: Any) -> Path:
    """``outputs/searches/NAME/search.json`` with a trial for each state; a change to None leaves a key out."""
    trials = [
        {
            "number": i,
            "state": state,
            "value": 0.5 + i if state == "complete" else None,
            "params": dict.fromkeys(keys, 1),
        }
        for i, state in enumerate(states)
    ]
    values = {
        "schema": 1, "overrides": ["data=digits", "method=full", "model=resnet20", "task.split=val"],
        "metric": "test/accuracy", "split": "val", "seeds": [0], "direction": "maximize", "setting": SETTING,
        "space": [{"key": key, "kind": "log", "values": [0.1, 1]} for key in keys], "tried": len(trials), "best": None,
        "trials": trials,
    } | changes  # fmt: skip
    path = outputs / "searches" / name / "search.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return path
