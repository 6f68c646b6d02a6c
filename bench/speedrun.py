"""The speed run beside the published script: time to train CIFAR-10 with airbench94 and to evaluate it, runs in turn.

Run with ``python -m bench.speedrun --data DIR [--script airbench94_muon.py] [--runs 5] [--speed max]``. DIR holds
``cifar-10-batches-bin`` or what torchvision downloads; the script is that of github.com/KellerJordan/cifar10-airbench,
of which no copy is kept here. It is imported, not changed, and needs a GPU; its data is written as it expects it. Both
sides count what the script counts: whitening, training, and the evaluation over six views, neither compiling nor
reading data. Both train once first, to warm up. Without ``--script`` only this side is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Run = Callable[[int], tuple[float, float]]
"""Trains with a seed; gives seconds and test accuracy."""


def now() -> float:
    """The time when everything asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def timed(owner: Any, name: str, spent: list[float]) -> Iterator[None]:
    """Note the seconds of each call of a function of `owner`."""
    function = getattr(owner, name)

    def measured(*args: Any, **options: Any) -> Any:
        start = now()
        result = function(*args, **options)
        spent.append(now() - start)
        return result

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, function)


def ours(words: list[str], folder: Path) -> Run:
    """``filtrun recipe=speedrun`` with its ordinary loop, hooks and logging."""
    import filtrun
    from filtrun.models.airbench94 import Airbench94
    from filtrun.tasks.classify import Classify

    def run(seed: int) -> tuple[float, float]:
        looks: list[float] = []
        evaluations: list[float] = []
        with timed(Airbench94, "look_at", looks), timed(Classify, "evaluate", evaluations):
            record = filtrun.run(
                "recipe=speedrun", "data=cifar", *words, f"seed={seed}", f"hydra.run.dir={folder}/{seed}", "force=true"
            )
        # the last evaluation is that of the trained network
        return looks[0] + record.cost["train_seconds"] + evaluations[-1], record.metrics["test/accuracy"]

    return run


def published(script: Path, data: str, folder: Path) -> Run:
    """The script's ``main``, with the figures it prints; it looks for its data below the working directory."""
    from filtrun.data.cifar import Cifar10

    cifar = Cifar10(root=data, val_fraction=0.0).setup(0)
    (folder / "cifar10").mkdir()
    for name in ("train", "test"):
        split = cifar.split(name)
        images = split.images.permute(0, 2, 3, 1).contiguous()  # type: ignore[union-attr]
        state = {"images": images, "labels": split.labels, "classes": list(cifar.classes)}
        torch.save(state, folder / "cifar10" / f"{name}.pt")
    spec = importlib.util.spec_from_file_location("airbench94_script", script)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    arguments, sys.argv = sys.argv, [str(script)]  # the script reads its own text
    spec.loader.exec_module(module)
    sys.argv = arguments
    printed: dict[str, Any] = {}
    module.print_training_details = lambda values, is_final_entry: printed.update(values)
    model = module.CifarNet().cuda().to(memory_format=torch.channels_last)
    model.compile(mode="max-autotune")

    def run(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        with contextlib.chdir(folder):
            accuracy = module.main("warmup" if seed < 0 else seed, model)
        return printed["time_seconds"], accuracy

    return run


def main() -> int:
    """Take turns, print every run, the medians and their ratio; returns 1 when ours takes over 1.1 times as long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--script", type=Path, help="airbench94_muon.py")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--speed", default="max", choices=("off", "auto", "max"))
    parser.add_argument("words", nargs="*", help="further words for filtrun, such as trainer.epochs=1")
    options = parser.parse_args()
    if options.script is not None and not torch.cuda.is_available():
        parser.error("the published script needs a CUDA device")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words = [f"data.root={Path(options.data).resolve()}", f"speed={options.speed}", *options.words]
        sides = {"filtrun": ours(words, folder / "runs")}
        if options.script is not None:
            sides["script"] = published(options.script.resolve(), options.data, folder)
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for seed in range(-1, options.runs):
            for side, run in sides.items():
                seconds, accuracy = run(seed if side == "script" else seed + 1)
                told = "warm-up" if seed < 0 else f"run {seed + 1}"
                print(f"  {side:<8} {told}: {seconds:.3f} s, {accuracy:.2%}", flush=True)
                if seed >= 0:
                    found[side].append((seconds, accuracy))
    print(f"CIFAR-10 to the end on {where}, medians of {options.runs}:")
    medians = {}
    for side, values in found.items():
        seconds_of, accuracies = zip(*values, strict=True)
        medians[side] = statistics.median(seconds_of)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        print(f"  {side:<8} {medians[side]:.3f} s, {statistics.mean(accuracies):.2%} +- {spread:.2%}")
    if "script" not in medians:
        return 0
    ratio = medians["filtrun"] / medians["script"]
    print(f"  filtrun / script = {ratio:.3f} (target: at most 1.1)")
    return int(ratio > 1.1)


if __name__ == "__main__":
    sys.exit(main())
