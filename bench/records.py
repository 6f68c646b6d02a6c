"""Many records: how long the first and the next reads of a folder take, and `filtrun table` on it.

Run with ``python -m bench.records [--count 10000]``. The budget is 2 s for everything after the first read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

BUDGET = 2.0
METHODS = ("sara", "lora", "full", "linear_probe")


def record(number: int) -> dict[str, Any]:
    """A finished run of one of a few methods with a learning rate and a seed of its own."""
    method, seed = METHODS[number % len(METHODS)], number // len(METHODS) % 5
    lr = (1 + number // (5 * len(METHODS))) * 1e-6
    accuracy = (number * 7919 % 10_000) / 10_000
    metrics = {"accuracy": accuracy, "nll": 2 - accuracy, "ece": accuracy / 9, "top5": 1.0}
    trainer = {
        "steps": 300, "epochs": None, "batch_size": 64, "accumulate": 1, "lr": lr, "weight_decay": 0.01,
        "optimizer": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0.9, "schedule": "cosine", "warmup": 10,
        "clip": 1.0, "ema": 0.0, "precision": "32", "devices": 1, "nodes": 1, "compile": False, "log_every": 20,
    }  # fmt: skip
    config = {
        "name": None,
        "seed": seed,
        "split_seed": 0,
        "device": "auto",
        "classes": "all",
        "scale": "laptop",
        "stages": {"root": "outputs/stages"},
        "pretrain": {"seed": 0, "classes": "source", "steps": 600},
        "trainer": trainer,
        "data": {"_target_": "filtrun.data.digits.Digits", "root": None, "target": [7, 8, 9], "val_fraction": 0.1},
        "task": {"_target_": "filtrun.tasks.classify.Classify", "label_smoothing": 0.0, "eval_batch": 250},
        "model": {"_target_": "filtrun.models.resnet.cifar_resnet", "base": "pretrain", "depth": 20, "width": 16},
        "method": {method: {"_target_": f"filtrun.methods.peft.{method}.Method", "threshold": 0.01, "rank": 4}},
        "logger": {"tensorboard": {"_target_": "filtrun.loggers.TensorBoard"}},
    }
    cost = {
        "trainable_params": 240, "total_params": 19074, "flops": 378496.0, "macs": 189248.0, "steps": 300,
        "train_seconds": 1.5, "images_per_second": 8663.7, "stored_bytes": 8088, "total_seconds": 1.7 + accuracy,
    }  # fmt: skip
    return {
        "schema": 1, "status": "finished", "key": f"{number:016x}", "name": f"{method}-digits-resnet20",
        "overrides": [f"method={method}", f"trainer.lr={lr}", "data=digits", f"seed={seed}"], "config": config,
        "seed": seed, "task": "classify", "data": "digits", "model": "resnet20", "methods": [method],
        "metrics": {f"{s}/{k}": v for s in ("base", "tuned", "test") for k, v in metrics.items()}, "cost": cost,
        "report": {method: {"selected_weights": 240, "threshold": 0.01 + accuracy}},
        "evaluation": {"split": "test", "classes": "all", "images": 359}, "stages": [],
        "environment": {"python": "3.11.7", "torch": "2.13.0+cpu", "device": "cpu (x86_64)", "git": "ae32874"},
        "artifacts": [{"path": "model.safetensors", "kind": "model", "sha256": f"{number:064x}"}], "error": None,
    }  # fmt: skip


def timed(what: str, work: Callable[[], Any]) -> float:
    """Wall time of some work, printed with its CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    took = time.perf_counter() - start
    print(f"{what}: {took:.2f} s ({time.process_time() - cpu:.2f} s CPU)", flush=True)
    return took


def main() -> int:
    """Print a line per measurement; returns 1 when one after the first read is over the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    count = parser.parse_args().count
    from filtrun.report.index import read_records

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number in range(count):
            folder = root / "sweeps" / f"{number:016x}"
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(record(number), indent=1))
        print(f"{count} records")
        timed("first read", lambda: read_records(root))
        times = [timed("next read", lambda: read_records(root))]
        (root / "sweeps" / f"{0:016x}" / "record.json").write_text(json.dumps(record(4)))
        times.append(timed("read after one record changed", lambda: read_records(root)))
        table = [sys.executable, "-m", "filtrun", "table", str(root)]
        for words in (["--by", "methods", "--pivot", "seed"], ["--where", "trainer.lr<1e-5,methods=sara"]):
            command = partial(subprocess.run, [*table, *words], stdout=subprocess.DEVNULL, check=True)
            times.append(timed(f"filtrun table DIR {' '.join(words)}", command))
    return int(max(times) > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
