"""Large images: decoding against what the CPU can do, and how long a training waits for its data.

Run with ``python -m bench.decode [--device cuda]``. JPEG files of 640 x 427 and 1280 x 854 pixels are made of the two
photographs that come with scikit-learn.

1. `filtrun.data.loader` on a folder that is decoded as it is read (shorter side to 256, centre square): CPU time an
   image in one process against PIL doing the same in a bare loop, and images a second with as many processes as it
   chooses against a torch DataLoader of single images with as many; all in turn, best round.
2. Share of the training time that goes by until a batch is there and cropped, over the steps after the first: a
   restoration run on 256-pixel tiles (data=images), and a classifier on the folder above.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import filtrun
from filtrun.context import Run
from filtrun.data.folder import Folder
from filtrun.data.images import decode
from filtrun.data.loader import epoch_batches, workers_for

SIDE = 256


def make_photos(root: Path, count: int) -> list[Path]:
    """`count` files below two class folders, every second one enlarged."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    paths = []
    for i in range(count):
        image = Image.fromarray(load_sample_images().images[i % 2]).rotate(i % 7 - 3)
        if i // 2 % 2:
            image = image.resize((1280, 854), Image.Resampling.BICUBIC)
        folder = root / ("first", "second")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{i:04d}.jpg")
        image.save(paths[-1], quality=92)
    return paths


def bare(paths: list[Path]) -> int:
    """What any program that reads these files with PIL has to do, one after another."""
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            width, height = image.size
            scale = SIDE / min(width, height)
            size = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
            small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
            small.crop((left, top, left + SIDE, top + SIDE)).tobytes()
    return len(paths)


class Single(Dataset):
    """One decoded image at a time, as a torch DataLoader is usually fed."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(decode(self.paths[i], 3, SIDE))


def throughput(root: Path, paths: list[Path], device: torch.device, rounds: int, batch: int) -> None:
    """Print the rates of part 1."""
    data = Folder(root=str(root), size=SIDE, in_memory=False, val_fraction=0.0)
    split = data.setup(0).split("train")
    chosen = workers_for(device)
    state = {"epoch": 0}

    def ours(workers: int) -> Callable[[], int]:
        def epoch() -> int:
            state["epoch"] += 1
            batches = epoch_batches(
                split, batch, seed=0, epoch=state["epoch"], device=device, workers=workers, drop_last=False
            )
            return sum(len(b) for b in batches)

        return epoch

    loader = DataLoader(
        Single(paths),
        batch,
        shuffle=True,
        num_workers=chosen,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    alone: dict[str, Callable[[], int]] = {"PIL in a loop": lambda: bare(paths), "filtrun": ours(0)}
    together: dict[str, Callable[[], int]] = {
        "filtrun": ours(chosen),
        "DataLoader": lambda: sum(len(x.to(device, non_blocking=True)) for x in loader),
    }

    def best(contenders: dict[str, Callable[[], int]], clock: Callable[[], float]) -> dict[str, float]:
        seconds = dict.fromkeys(contenders, float("inf"))
        for i in range(rounds + 1):
            for name, epoch in contenders.items() if i % 2 else reversed(contenders.items()):
                start = clock()
                count = epoch()
                if i:  # the first starts processes and fills the file cache
                    seconds[name] = min(seconds[name], (clock() - start) / count)
        return seconds

    cores = len(os.sched_getaffinity(0))
    print(f"decode, resize and crop to {SIDE}, {cores} cores, best of {rounds} rounds:")
    cpu = best(alone, time.process_time)
    ratio = cpu["filtrun"] / cpu["PIL in a loop"]
    told = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in cpu.items())
    print(f"  CPU time an image in one process: {told} ({ratio:.2f} x)")
    wall = best(together, time.perf_counter)
    told = ", ".join(f"{name} {1 / seconds:.0f}" for name, seconds in wall.items())
    ratio = wall["DataLoader"] / wall["filtrun"]
    limit = cores / cpu["PIL in a loop"]
    print(
        f"  images a second with {chosen} workers (its choice): {told} ({ratio:.2f} x); {cores} idle cores: {limit:.0f}"
    )


class Waits:
    """How long a run's steps wait for their batches."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ends: list[float] = []

    def __enter__(self) -> Waits:
        self.kept = Run.batches, Run.augment
        batches, augment = self.kept

        def timed_batches(run: Run, epoch: int, skip: int) -> Iterator[Any]:
            going = batches(run, epoch, skip)
            while True:
                start = time.perf_counter()
                batch = next(going, None)
                self.times.append(time.perf_counter() - start)
                self.ends.append(time.perf_counter())
                if batch is None:
                    return
                yield batch

        def timed_augment(run: Run, batch: Any) -> Any:
            start = time.perf_counter()
            made = augment(run, batch)
            self.times[-1] += time.perf_counter() - start
            return made

        Run.batches, Run.augment = timed_batches, timed_augment  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Run.batches, Run.augment = self.kept  # type: ignore[method-assign]

    def share(self) -> float:
        """Waiting over all time, from the first batch on."""
        return sum(self.times[1:]) / (self.ends[-1] - self.ends[0])


def main() -> int:
    """Measure both; returns 1 when the restoration run waits more than 3 % of its time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "photos"
        paths = make_photos(root, options.images)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a second one spins while it waits, and that counts as CPU time
        throughput(root, paths, torch.device(options.device), options.rounds, options.batch)
        torch.set_num_threads(threads)
        common = [
            "model.base=scratch", "method=full", "logger=none", "trainer.evaluate=false", f"device={options.device}",
            f"trainer.steps={options.steps}", "trainer.batch_size=4", "trainer.checkpoint_every=0",
            f"stages.root={place}/stages",
        ]  # fmt: skip
        tiles = [
            "task=denoise", "model=plain_unet", "data=images", f"data.root={root}", f"data.patch={SIDE}",
            "data.stride=128", f"task.crop={SIDE}", "task.eval_images=1",
        ]  # fmt: skip
        folder = [
            "task=classify", "model=resnet20", "data=folder", f"data.root={root}", f"data.size={SIDE}",
            "data.in_memory=false",
        ]  # fmt: skip
        shares = {}
        for name, words in (("restoration on tiles (data=images)", tiles), ("classifier (data=folder)", folder)):
            with Waits() as waits:
                filtrun.run(*words, *common, f"hydra.run.dir={place}/run-{len(shares)}")
            shares[name] = waits.share()
            print(f"  {name}: waits for data {shares[name]:.2%} of the training time")
    return int(next(iter(shares.values())) > 0.03)


if __name__ == "__main__":
    raise SystemExit(main())
