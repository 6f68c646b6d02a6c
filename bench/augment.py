"""Small images a second: batched augmentation against a torch DataLoader with torchvision's per-sample transforms.

Run with ``python -m bench.augment [--device cuda]``. 32 x 32 RGB bytes made here; every epoch is read in a new order,
cut into batches on the device, augmented and brought to float. Ours is the loader of a run (`filtrun.data.loader`);
theirs is the same order through ``torchvision.transforms.v2`` image by image, in this process and in worker processes
that live as long as the bench. The three take turns in every round, and each one's best round counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from filtrun.compat import torchvision
from filtrun.data.augment import Augment
from filtrun.data.loader import epoch_batches
from filtrun.data.split import Split

SETTINGS: dict[str, dict[str, Any]] = {
    "crop + flip": {"crop_pad": 4, "flip": True},
    "crop + alternating flip + cutout": {"crop_pad": 4, "flip": True, "alternate": True, "cutout": 8},
    "crop + flip + colour": {
        "crop_pad": 4, "flip": True, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1,
    },
}  # fmt: skip
TARGETS = {"cpu": 3.0, "cuda": 10.0}


class Samples(Dataset):
    """One augmented image and its label at a time."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Callable[[Any], Any]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[i]), int(self.labels[i])


def per_sample(options: dict[str, Any]) -> Callable[[Any], Any]:
    """The same augmentation for one image, of torchvision's transforms; cutout is its RandomErasing of one size."""
    from torchvision.transforms import v2

    steps: list[Any] = [v2.RandomCrop(32, options["crop_pad"], padding_mode="reflect"), v2.RandomHorizontalFlip()]
    if options.get("hue"):
        steps.append(v2.ColorJitter(*(options[n] for n in ("brightness", "contrast", "saturation", "hue"))))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if options.get("cutout"):
        share = (options["cutout"] / 32) ** 2
        steps.append(v2.RandomErasing(1.0, (share, share), (1.0, 1.0), value=0.5))
    return v2.Compose(steps)


def main() -> int:
    """Measure, print a line per setting; returns 1 when one is below the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--theirs", type=int, default=4_096, help="images per round of the slower two")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torchvision()
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (options.images,), generator=generator)
    split = Split(images, labels).to(device)
    few, few_labels = images[: options.theirs], labels[: options.theirs]

    def rate(epoch: Callable[[], int]) -> float:
        start = time.perf_counter()
        count = epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count / (time.perf_counter() - start)

    worst = float("inf")
    for name, setting in SETTINGS.items():
        augment, transform = Augment(**setting), per_sample(setting)
        state = {"epoch": 0}

        def ours(augment: Augment = augment, state: dict[str, int] = state) -> int:
            state["epoch"] += 1
            count = 0
            for batch in epoch_batches(split, options.batch, seed=0, epoch=state["epoch"], device=device):
                count += len(augment(batch.x, batch.index, state["epoch"]))
            return count

        def through(loader: DataLoader) -> Callable[[], int]:
            return lambda: sum(len(x.to(device, non_blocking=True)) for x, _ in loader)

        common: dict[str, Any] = {"batch_size": options.batch, "shuffle": True, "pin_memory": device.type == "cuda"}
        samples = Samples(few, few_labels, transform)
        kept = {"num_workers": options.workers, "persistent_workers": True}
        contenders = {
            "ours": ours,
            "workers": through(DataLoader(samples, **common, **kept)),
            "no workers": through(DataLoader(samples, **common)),
        }
        for epoch in contenders.values():
            epoch()  # workers start, memory is taken
        rates: dict[str, float] = {}
        for _ in range(options.rounds):
            for key, epoch in contenders.items():
                rates[key] = max(rates.get(key, 0.0), rate(epoch))
        ratios = {key: rates["ours"] / rates[key] for key in ("workers", "no workers")}
        worst = min(worst, *ratios.values())
        print(
            f"{name}: {rates['ours']:,.0f} images/s; DataLoader, {options.workers} workers {rates['workers']:,.0f} "
            f"({ratios['workers']:.1f} x); no workers {rates['no workers']:,.0f} ({ratios['no workers']:.1f} x)",
            flush=True,
        )
    target = TARGETS[device.type]
    print(f"lowest ratio {worst:.1f} x, target {target:g} x on {device.type}")
    return int(worst < target)


if __name__ == "__main__":
    raise SystemExit(main())
