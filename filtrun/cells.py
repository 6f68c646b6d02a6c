"""What makes two runs the same run: the digest that names a sweep's cells, for a composed configuration or a record.

Neither torch nor Hydra is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from filtrun.stages import digest

MACHINE_KEYS = ("name", "device", "threads", "workers", "vectorize", "stages", "logger", "resume", "force", "trust")
"""Keys that do not change what a run computes."""

MACHINE_OPTIONS = (
    "devices", "nodes", "log_every", "checkpoint_every", "compile", "channels_last", "evaluate", "evaluations", "speed",
    "checkpoint_activations",
)  # fmt: skip
"""Trainer options that change how training runs and not what it computes: they are in no key."""

LATER_OPTIONS: dict[str, Any] = {
    "trainer.others": "adamw",
    "trainer.matrix_momentum": 0.95,
    "trainer.matrix_steps": None,
    "trainer.matrix_scale": "adamw",
    "trainer.matrix_rescale": False,
    "data.crop_padding": "reflect",
    "data.alternate_flip": False,
    "data.brightness": 0.0,
    "data.contrast": 0.0,
    "data.saturation": 0.0,
    "data.hue": 0.0,
    "task.views": "one",
}
"""Options that are younger than the first records: where they have these defaults, which compute what was computed
without them, they are in no key, so that finished cells keep their names. ``pretrain`` is a trainer, too."""

ANY_FILES = (
    "filtrun.data.folder.Folder",
    "filtrun.data.images_folder.ImagesFolder",
    "filtrun.data.pairs.Pairs",
)
"""Data that is whatever lies in its folder; for named sets the folder says where they are, not what they are."""


def content(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a composed configuration that decides what a run computes and measures.

    Where it runs is left out (`MACHINE_KEYS`, `MACHINE_OPTIONS` but for ``evaluate``), and where a named data set lies.
    """
    kept: dict[str, Any] = {k: v for k, v in config.items() if k not in (*MACHINE_KEYS, "hydra", "speed")}
    kept = with_arithmetic(kept)
    for part in ("trainer", "pretrain"):
        if isinstance(kept.get(part), dict):
            kept[part] = {k: v for k, v in kept[part].items() if k not in MACHINE_OPTIONS or k == "evaluate"}
    kept = without_later(kept)
    data = kept.get("data")
    if isinstance(data, dict):
        target = str(data.get("_target_", ""))
        if target.startswith("filtrun.") and target not in ANY_FILES:
            kept["data"] = {k: v for k, v in data.items() if k != "root"}
        if target.startswith("filtrun.") and "workers" in data:
            kept["data"] = {**kept["data"], "workers": 2}  # any number decodes the same; the first records told 2
    return kept


def with_arithmetic(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose ``precision`` is the one computed in: ``speed=max`` takes bf16 for 32."""
    kept = dict(config)
    for part in ("trainer", "pretrain"):
        options = kept.get(part)
        if isinstance(options, Mapping) and options.get("speed") == "max" and options.get("precision", "32") == "32":
            kept[part] = {**options, "precision": "bf16"}
    return kept


def without_later(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without those of `LATER_OPTIONS` that have their default; the one given is left as it is."""
    kept = dict(config)
    for name, default in LATER_OPTIONS.items():
        part, _, key = name.partition(".")
        for node in (part, "pretrain") if part == "trainer" else (part,):
            options = kept.get(node)
            if isinstance(options, Mapping) and key in options and options[key] == default:
                kept[node] = {k: v for k, v in options.items() if k != key}
    return kept


def cell_digest(config: Mapping[str, Any]) -> str:
    """16 hex digits that are the same for all runs that compute the same, however they were started."""
    return digest(_as_recorded(content(config)))


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with dots; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _as_recorded(value: Any) -> Any:
    """As a record holds it: keys are text, tuples lists, and numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): _as_recorded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_recorded(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
