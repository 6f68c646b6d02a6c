"""A paper card of two tables, and records of its cells, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from filtrun.report.card import make_card
from filtrun.report.grid import read_grid

FAST = ["data=digits", "model=resnet20", "model.width=4"]

CARD: dict[str, Any] = {
    "title": "Tiny: a card for tests", "link": "https://x.org", "year": 2024, "family": "peft", "abstract": "A.",
    "methods": [], "tuning": "none was done",
    "tables": [
        {
            "name": "main", "title": "Three ways to train", "setting": "a classifier learns new classes",
            "rows": {
                "full": ["method=full"], "head": ["method=linear_probe", "trainer.lr=0.01"], "none": ["method=none"],
            },
            "scales": {"smoke": {"seeds": [0], "overrides": FAST}, "laptop": {"seeds": [0, 1, 2], "overrides": FAST}},
            "metrics": {"test/accuracy": "higher", "test/nll": "lower"},
            "published": [
                {"setting": "ImageNet", "source": "Table 1", "better": {"top-1": "higher"},
                 "rows": {"full": {"top-1": 70.5}, "bitfit": {"top-1": 69.25}}},
                {"setting": "digits", "source": "Table 2", "better": {"top-1": "higher"}, "same": ["laptop"],
                 "rows": {"head": {"top-1": 50}}},
            ],
        },
    ],
    "claims": [
        {"claim": "test/accuracy(full) better than test/accuracy(head) by 0", "table": "main", "says": "all beats some",
         "source": "abstract"},
        {"claim": "test/nll(head) better than test/nll(none) by 50%", "table": "main", "says": "half",
         "source": "p. 2"},
    ],
}  # fmt: skip

VALUES = {
    "full": ([0.90, 0.92, 0.94], [0.5, 0.4, 0.3]),
    "head": ([0.80, 0.83, 0.81], [1.5, 1.6, 1.4]),
    "none": ([0.10, 0.10, 0.10], [2.0, 2.0, 2.0]),
}
"""Row -> accuracies and likelihoods of seeds 0 to 2."""


def write_card(folder: Path) -> Path:
    """The card ``tiny`` in a folder of configs; returns that folder."""
    (folder / "paper").mkdir(parents=True, exist_ok=True)
    (folder / "paper" / "tiny.yaml").write_text(yaml.safe_dump(CARD, sort_keys=False))
    return folder


def grid_of(sweeps: Path, scale: str = "laptop", **more: Any) -> Any:
    """The card's grid with the records there are."""
    card = make_card("tiny", CARD)
    return read_grid(card, card.tables[0], scale, sweeps, **more)


def write_records(
    sweeps: Path, make_record: Any, rows: Any = VALUES, seeds: Any = (0, 1, 2), scale: str = "laptop"
) -> None:
    """Records of cells as runs leave them, with the metrics of `VALUES`."""
    sweeps.mkdir(parents=True, exist_ok=True)
    for slot in grid_of(sweeps, scale).slots:
        if slot.row in rows and slot.seed in seeds:
            accuracy, nll = (values[slot.seed] for values in VALUES[slot.row])
            trained = {"full": 17254, "head": 650, "none": 0}[slot.row]
            cost = {"trainable_params": trained, "total_params": 17254, "total_seconds": 2.0 + slot.seed, "flops": 1e6,
                    "train_seconds": 1.0 if slot.row == "head" else 2.0, "steps": 120 if trained else 0}  # fmt: skip
            record = make_record(
                config=slot.job.config, overrides=list(slot.job.overrides), seed=slot.seed, cost=cost, task="classify",
                model="resnet20", methods=list(slot.job.config["method"]), report={},
                metrics={"test/accuracy": accuracy, "test/nll": nll},
            )  # fmt: skip
            slot.job.folder.mkdir(parents=True)
            (slot.job.folder / "record.json").write_text(json.dumps(record))
