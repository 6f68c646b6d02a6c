"""What the runner costs over a bare torch loop: same model, batches, loss, clipping and optimizer, blocks in turn.

Run with ``python -m bench.loop_overhead [--device cuda] [--size tiny]``. One process; a block of the bare loop, then
one of ours, again and again. The end of every step is noted, and of each loop the fastest stretch of some steps counts:
on a machine that does other things too, that is what is left when nothing came between. Two models:

- a linear classifier, whose step is so short that the runner's own microseconds show; they are the same for any model;
- the denoiser of the main job, for the ratio. Its noise is larger than the overhead that is looked for, so the ratio
  that the linear classifier's microseconds make of its bare step is printed, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.callbacks import Log
from filtrun.checkpoint import Checkpoints
from filtrun.context import Run
from filtrun.data.digits import Digits
from filtrun.data.loader import epoch_order
from filtrun.loggers import JsonLines, Loggers
from filtrun.method import Method
from filtrun.methods.baseline.full import Full
from filtrun.mixed import Mixed
from filtrun.models.unet import UNet
from filtrun.stages import Stages
from filtrun.task import Task
from filtrun.tasks.classify import Classify
from filtrun.tasks.diffuse import Diffuse
from filtrun.trainer import Trainer, lr_factor

SIZES = {"in_channels": 1, "num_classes": 10, "image_size": 8}
Loss = Callable[[Tensor, Tensor], Tensor]


def denoising(net: nn.Module, data: Digits) -> Loss:
    """The task's loss without the runner."""
    made_for = cast(Any, SimpleNamespace(net=net, data=SimpleNamespace(num_classes=10)))
    denoiser = Diffuse().denoiser(made_for)
    return lambda x, y: denoiser.loss(x * 2 - 1, y)


class Autocast(nn.Module):
    """A network in bfloat16, as a plain loop calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any) -> Tensor:
        with torch.autocast(next(self.net.parameters()).device.type, dtype=torch.bfloat16):
            return self.net(*args).float()  # type: ignore[no-any-return]


def cross_entropy(net: nn.Module, data: Digits) -> Loss:
    """The task's loss without the runner."""
    device = next(net.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in data.mean_std())
    return lambda x, y: F.cross_entropy(net((x - mean) / std), y)


def bare(
    model: nn.Module, loss_of: Loss, images: Tensor, labels: Tensor, trainer: Trainer, stamps: Stamps
) -> Callable[[int], None]:
    """A plain loop with the same arithmetic; returns a function that does some more steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=trainer.lr, weight_decay=0.01, fused=True)
    parameters = list(model.parameters())

    def rows() -> Iterator[Tensor]:
        epoch = 0
        while True:
            order = epoch_order(len(images), 0, epoch).to(images.device)
            yield from order.split(trainer.batch_size)[: len(images) // trainer.batch_size]
            epoch += 1

    def forever() -> Iterator[None]:
        total = torch.zeros((), device=images.device)
        for step, chosen in enumerate(rows()):
            x = images.index_select(0, chosen).float() / 255
            loss = loss_of(x, labels.index_select(0, chosen))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, trainer.clip)
            for group in optimizer.param_groups:
                group["lr"] = trainer.lr * lr_factor(trainer, step, 10**6)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            if step % trainer.log_every == 0:
                total.item()
            stamps.note()
            yield

    going = forever()

    def steps(count: int) -> None:
        for _ in range(count):
            next(going)

    return steps


def ours(
    model: nn.Module, task: Task, data: Digits, trainer: Trainer, fabric: Fabric, folder: Path, stamps: Stamps
) -> Callable[[int], None]:
    """The runner with its ordinary hooks and logging; returns a function that does some more steps."""
    logger = JsonLines()
    logger.open(folder, "bench", {})
    run = Run(
        fabric=fabric, task=task, data=data, model=model, methods=[Full()], trainer=trainer,
        stages=Stages(folder), dir=folder, train_split=data.split("train").to(fabric.device),
        callbacks=[Log(trainer.log_every, Loggers([logger])), Checkpoints(0), stamps],
    )  # fmt: skip
    runner.edit(run)
    runner.setup(run)

    def steps(count: int) -> None:
        run.phases[0].steps = run.step + count
        runner.fit(run)

    return steps


class Stamps(Method):
    """Notes when each step ended: on a CPU by the process's CPU time, which others' work hardly changes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def note(self) -> None:
        """A step has ended."""
        self.times.append(self.clock())

    def after_step(self, run: Run) -> None:
        self.note()


def fastest(times: list[float], stretch: int) -> float:
    """Seconds a step in the fastest `stretch` steps in a row."""
    return min(b - a for a, b in zip(times, times[stretch:], strict=False)) / stretch


def main() -> None:
    """Measure and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="tiny", help="of the denoiser")
    parser.add_argument("--precision", default="32", choices=("32", "bf16"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    options = parser.parse_args()
    cuda = options.device != "cpu"
    clock = time.perf_counter if cuda else time.process_time
    if not cuda:
        torch.set_num_threads(options.threads)
    half = options.precision == "bf16"
    plugins = Mixed("bf16-mixed", device=options.device) if half else None
    fabric = Fabric(accelerator=options.device, devices=1, plugins=plugins)
    data = Digits()
    data.setup(0)
    split = data.split("train").to(fabric.device)
    trainer = Trainer(steps=10**6, batch_size=64, lr=1e-3, log_every=20, checkpoint_every=0)

    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def unet() -> nn.Module:
        return UNet(size=options.size, **SIZES)

    found: dict[str, list[float]] = {}
    settings: list[tuple[str, Callable[[], nn.Module], type[Task], Any, int, int]] = [
        ("linear", linear, Classify, cross_entropy, 400, 20),
        ("unet", unet, Diffuse, denoising, 20, 4),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, make, task, loss_of, steps, stretch in settings:
            torch.manual_seed(0)
            models = [make().to(fabric.device) for _ in range(2)]
            stamps = Stamps(clock), Stamps(clock)
            loss = loss_of(Autocast(models[0]) if half else models[0], data)
            pair = (
                bare(models[0], loss, split.images, split.labels, trainer, stamps[0]),  # type: ignore[arg-type]
                ours(models[1], task(), data, trainer, fabric, Path(folder), stamps[1]),
            )
            best = [float("inf")] * 2
            for i in range(options.rounds + 1):  # the first is for warming up
                for k in (0, 1) if i % 2 else (1, 0):
                    stamps[k].times.clear()
                    pair[k](steps)
                    if cuda:
                        torch.cuda.synchronize()
                    best[k] = min(best[k], fastest(stamps[k].times, stretch))
            found[name] = best
    where = torch.cuda.get_device_name() if cuda else f"{options.threads} CPU thread(s), CPU time"
    overhead = found["linear"][1] - found["linear"][0]
    plain, with_us = found["unet"]
    print(f"loop overhead on {where}, {options.precision}, fastest stretch of {options.rounds} rounds:")
    print(f"  linear classifier: bare step {found['linear'][0] * 1e6:.0f} us, filtrun {overhead * 1e6:+.0f} us a step")
    print(f"  unet {options.size}: bare step {plain * 1e3:.2f} ms, filtrun / bare = {with_us / plain:.4f} measured")
    for step in (plain, 3e-3, 1e-3):
        print(f"  {overhead * 1e6:.0f} us of a step of {step * 1e3:.2f} ms are {overhead / step:.2%}")


if __name__ == "__main__":
    main()
