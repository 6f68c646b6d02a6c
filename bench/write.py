"""``filtrun apply`` on many photographs: reading and writing beside the model against one after another.

Run with ``python -m bench.write [--device cuda] [--threads N]``. Photographs of 2 megapixels, made of the two that come
with scikit-learn, go through `filtrun.photo.work` twice a round: as it is, and with its threads replaced by calls where
they are started. Ratios are taken pair by pair in one process, so that a machine that drifts favours neither; the files
must be the same, byte for byte. The networks are those of runs made at smoke scale, and a stand-in that only waits, as
a program does for a GPU, for as long as a photograph takes to be written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

import filtrun
from filtrun.aside import Aside
from filtrun.photo import names
from filtrun.photo.read import read_photo
from filtrun.photo.work import Work
from filtrun.photo.write import write_photo
from filtrun.reload import reload

SIZE = 1600, 1200


class InTurn(Aside[Any]):
    """Jobs are done where they are started."""

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.wait()
        self._job = Future()
        self._job.set_result(function(*arguments))


def make_photos(folder: Path, format: str, count: int) -> list[Path]:
    """`count` files, with the noise of a camera."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    paths = []
    for i in range(count):
        image = Image.fromarray(load_sample_images().images[i % 2]).resize(SIZE, Image.Resampling.BICUBIC)
        noise = np.random.default_rng(i).integers(-3, 4, (SIZE[1], SIZE[0], 3))
        paths.append(folder / f"{i}{names.SUFFIXES[format]}")
        write_photo(paths[-1], format, (np.asarray(image).astype(np.int64) + noise).clip(0, 255).astype(np.uint8))
    return paths


def process(run: Any, paths: list[Path], out: Path, in_turn: bool) -> float:
    """Seconds until all results are written."""
    jobs = names.plan([(path, Path(path.name)) for path in paths], out, None, display=True)
    start = time.perf_counter()
    with run.evaluating():
        work = Work(run, None, True, None, True, lambda: None, print)
        if in_turn:
            work.reader, work.writer = InTurn("read"), InTurn("write")
        work.all(jobs)
    seconds = time.perf_counter() - start
    if work.written != len(paths):
        raise SystemExit(f"{work.failed} of {len(paths)} photographs failed")
    return seconds


@contextlib.contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Inside, results are the images themselves after a wait."""

    def restore(work: Work, items: list[Any]) -> torch.Tensor:
        time.sleep(seconds * len(items))
        return torch.cat([item.x for item in items])

    before, Work.restore = Work.restore, restore  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work.restore = before  # type: ignore[method-assign]


def compare(name: str, run: Any, paths: list[Path], place: Path, rounds: int) -> float:
    """Print and return the median ratio of both ways' times over `rounds`, after one that warms up."""
    beside, turn = place / "beside", place / "turn"
    ratios, times = [], []
    for i in range(rounds + 1):
        pair = {}
        for in_turn in (True, False) if i % 2 else (False, True):
            pair[in_turn] = process(run, paths, turn if in_turn else beside, in_turn)
        if i:
            ratios.append(pair[False] / pair[True])
            times.append((pair[True] / len(paths), pair[False] / len(paths)))
    for path in paths:
        if (beside / path.name).read_bytes() != (turn / path.name).read_bytes():
            raise SystemExit(f"{path.name}: the two ways differ")
    one, other = (statistics.median(column) for column in zip(*times, strict=True))
    told = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
    ratio = statistics.median(ratios)
    print(f"  {name}: in turn {one:.2f} s a photograph, beside {other:.2f} s: {ratio:.2f} x ({told})", flush=True)
    return ratio


def main() -> int:
    """Measure; returns 1 when writing beside the stand-in does not pay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        small = [
            "scale=smoke", "device=cpu", "logger=none", "method=none", "data.patches=40", "data.patch=64",
            "task.crop=32", "task.extras=[]", "task.show_images=0", f"stages.root={place}/stages",
        ]  # fmt: skip
        runs = {}
        for model in ("lut3d", "llf_lut"):
            filtrun.run(f"model={model}", *small, f"hydra.run.dir={place}/{model}")
            runs[model], _ = reload(place / model, device=options.device)
        photos = {format: make_photos(place / format, format, options.photos) for format in ("png", "jpeg")}
        megapixels = SIZE[0] * SIZE[1] / 1e6
        print(f"{options.photos} photographs of {megapixels:.1f} megapixels, {cores} cores, "
              f"{torch.get_num_threads()} threads of torch, load {os.getloadavg()[0]:.1f}:")  # fmt: skip
        ratios = []
        for format, paths in photos.items():
            for model, run in runs.items():
                compare(f"{model}, {format.upper()}", run, paths, place, options.rounds)
            pixels = read_photo(paths[0]).pixels
            start = time.perf_counter()
            write_photo(place / f"again.{format}", format, pixels)
            seconds = time.perf_counter() - start
            with waiting(seconds):
                name = f"a stand-in that waits {seconds:.2f} s, {format.upper()}"
                ratios.append(compare(name, runs["lut3d"], paths, place, options.rounds))
    return int(min(ratios) > 0.9)


if __name__ == "__main__":
    raise SystemExit(main())
