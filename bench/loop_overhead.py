"""What the runner costs over a bare torch loop: same model, batches, loss, clipping and optimizer, blocks in turn.

Run with ``python -m bench.loop_overhead [--device cuda] [--size tiny] [--image 8]``. One process; a block of the bare
loop, then a block of ours, again and again; the ratio of each pair is taken and its median printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric

from filtrun import runner
from filtrun.callbacks import Log
from filtrun.checkpoint import Checkpoints
from filtrun.context import Run
from filtrun.data.digits import Digits
from filtrun.data.loader import epoch_order
from filtrun.loggers import JsonLines, Loggers
from filtrun.methods.baseline.full import Full
from filtrun.models.unet import UNet
from filtrun.stages import Stages
from filtrun.tasks.diffuse import Diffuse
from filtrun.trainer import Trainer, lr_factor

SIZES = {"in_channels": 1, "num_classes": 10, "image_size": 8}


def bare(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, trainer: Trainer) -> Callable[[int], None]:
    """A plain loop with the same arithmetic; returns a function that does some steps."""
    from types import SimpleNamespace

    denoiser = Diffuse().denoiser(SimpleNamespace(net=model, data=SimpleNamespace(num_classes=10)))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=trainer.lr, weight_decay=0.01, fused=True)
    parameters = list(model.parameters())
    state = {"step": 0}

    def steps(count: int) -> None:
        total = torch.zeros((), device=images.device)
        done = 0
        while done < count:
            order = epoch_order(len(images), 0, state["step"]).to(images.device)
            for rows in order.split(trainer.batch_size)[: len(images) // trainer.batch_size]:
                x = images.index_select(0, rows).float() / 255
                loss = denoiser.loss(x * 2 - 1, labels.index_select(0, rows))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, trainer.clip)
                for group in optimizer.param_groups:
                    group["lr"] = trainer.lr * lr_factor(trainer, state["step"], 10**6)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                state["step"] += 1
                done += 1
                if state["step"] % trainer.log_every == 0:
                    total.item()
                if done == count:
                    break

    return steps


def ours(model: torch.nn.Module, data: Digits, trainer: Trainer, fabric: Fabric, folder: Path) -> Callable[[int], None]:
    """The runner with its ordinary hooks and logging; returns a function that does some more steps."""
    logger = JsonLines()
    logger.open(folder, "bench", {})
    run = Run(
        fabric=fabric, task=Diffuse(), data=data, model=model, methods=[Full()], trainer=trainer,
        stages=Stages(folder), dir=folder, train_split=data.split("train").to(fabric.device),
        callbacks=[Log(trainer.log_every, Loggers([logger])), Checkpoints(0)],
    )  # fmt: skip
    runner.edit(run)
    runner.setup(run)

    def steps(count: int) -> None:
        run.phases[0].steps = run.step + count
        runner.fit(run)

    return steps


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    # on a shared CPU other processes change the wall time of a step by a tenth, its CPU time hardly at all
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    if options.device == "cpu":
        torch.set_num_threads(1)  # a second one spins while it waits, and that counts as CPU time
    fabric = Fabric(accelerator=options.device, devices=1)
    data = Digits()
    data.setup(0)
    split = data.split("train").to(fabric.device)
    trainer = Trainer(steps=10**6, batch_size=64, lr=1e-3, log_every=20, checkpoint_every=0)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return UNet(size=options.size, **SIZES).to(fabric.device)

    def timed(steps: Callable[[int], None]) -> float:
        if options.device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        steps(options.steps)
        if options.device != "cpu":
            torch.cuda.synchronize()
        return (clock() - start) / options.steps

    with tempfile.TemporaryDirectory() as folder:
        pair = (
            bare(model(), split.images, split.labels, trainer),
            ours(model(), data, trainer, fabric, Path(folder)),
        )
        for steps in pair:
            steps(20)
        ratios, bares = [], []
        for i in range(options.pairs):  # the order within a pair changes, so that drift favours neither
            first, second = (0, 1) if i % 2 == 0 else (1, 0)
            seconds = {first: timed(pair[first]), second: timed(pair[second])}
            ratios.append(seconds[1] / seconds[0])
            bares.append(seconds[0])
    name = torch.cuda.get_device_name() if options.device != "cpu" else "one CPU thread (CPU time)"
    low, high = min(ratios), max(ratios)
    print(
        f"loop overhead on {name}, unet {options.size}: bare step {statistics.median(bares) * 1e3:.2f} ms, "
        f"filtrun / bare = {statistics.median(ratios):.4f} (median of {options.pairs} pairs, {low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()
