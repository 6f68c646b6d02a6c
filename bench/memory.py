"""Peak training memory of methods on the same denoiser, each in a fresh process, beside the peft library's LoRA.

Run with ``python -m bench.memory [--size large] [--width 256] [--image 32] [--batch 4] [--device cuda]``. On a CPU the
figure is the growth of the resident set's high-water mark over its size when the model is loaded, on a GPU that of
torch's own counter: activations, gradients, optimizer state, and the tensors the method adds. ``--count`` adds up what
torch allocates and frees instead, on a CPU: what a GPU's counter would say, without the kernels' own workspace.
LoRA, peft's LoRA and SNELL have rank 4 on the same layers, all convolutions and linear ones, without dropout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

METHODS = (
    "full",
    "full-recomputed",
    "lora",
    "lora-recomputed",
    "peft-lora",
    "snell",
    "snell-kept",
    "sara",
    "sara-recomputed",
    "sara-dense",
)
RANK = 4
Figures = dict[str, float]


def peft_lora(model: Any) -> int:
    """Put peft's LoRA into the layers that filtrun's adapts; returns how many there are."""
    import torch

    from filtrun.methods.peft.lora import choose

    layers = [n for n, m in choose(model, "all").items() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    try:
        import torchvision  # noqa: F401
    except Exception:  # one that does not fit torch would stop transformers, and so peft, from being imported
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name.startswith("torchvision") else find(name, *rest)  # type: ignore[assignment]
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers), model)
    return len(layers)


def make(method: str) -> Any:
    """The method called so."""
    from filtrun.methods.baseline.full import Full
    from filtrun.methods.baseline.none import NoMethod
    from filtrun.methods.peft.lora import LoRA
    from filtrun.methods.peft.sara import SaRA
    from filtrun.methods.peft.snell import SNELL

    name = method.removesuffix("-recomputed")
    made: Any
    if name == "full":
        made = Full()
    elif name == "peft-lora":
        made = NoMethod()
        made.edit_model = lambda run: peft_lora(run.model) and None
    elif name == "lora":
        made = LoRA(rank=RANK)
    elif name.startswith("snell"):
        made = SNELL(rank=RANK, targets="all", dropout=0.0, drop_path=0.0, recompute=name == "snell")
    else:
        made = SaRA(fraction=0.15, memory="dense" if name.endswith("dense") else "scatter")
    made.slug = method
    return made


def measure(method: str, size: str, width: int | None, image: int, batch: int, device: str, count: bool) -> Figures:
    """Train three steps in this process and say how much memory that took, in MiB.

    The same with a tiny network comes first: what is imported and set up once must not count.
    """
    train(method, "tiny", None, 8, 1, device, False)
    return train(method, size, width, image, batch, device, count)


def allocated(work: Callable[[], None]) -> list[int]:
    """Bytes that torch holds on the CPU beyond what it held before `work`, after each allocation and each freeing."""
    from itertools import accumulate

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [0, *accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))]


def train(method: str, size: str, width: int | None, image: int, batch: int, device: str, count: bool) -> Figures:
    """What `measure` says, of one network."""
    from pathlib import Path

    import torch
    from lightning_fabric import Fabric

    from filtrun import runner
    from filtrun.context import Run
    from filtrun.cost import peak_memory, reset_peak_memory
    from filtrun.data.base import Batch
    from filtrun.data.digits import Digits
    from filtrun.models.unet import UNet
    from filtrun.stages import Stages
    from filtrun.tasks.diffuse import Diffuse
    from filtrun.trainer import Trainer

    torch.manual_seed(0)
    chosen = make(method)
    fabric = Fabric(accelerator=device, devices=1)
    data = Digits()
    data.setup(0)
    model = UNet(in_channels=3, num_classes=10, image_size=image, size=size, width=width).to(fabric.device)
    made = list(model.parameters())
    total = sum(p.numel() for p in made)
    run = Run(
        fabric=fabric, task=Diffuse(), data=data, model=model, methods=[chosen], stages=Stages(Path("/tmp")),
        trainer=Trainer(batch_size=batch, checkpoint_activations=method.endswith("-recomputed")),
    )  # fmt: skip
    ids = torch.arange(batch, device=fabric.device)
    x = torch.rand(batch, 3, image, image, device=fabric.device)

    def prepare() -> None:
        runner.edit(run)
        runner.setup(run)

    def steps() -> None:
        for _ in range(3):
            runner.train_step(run, Batch(x, ids % 10, ids))
            run.step += 1
            run.optimizer.zero_grad()

    if count:
        peak = allocated(prepare)[-1] + max(allocated(steps))
    else:
        reset_peak_memory(fabric.device)
        before = peak_memory(fabric.device) or 0  # what the method adds to the model counts
        prepare()
        reset_peak_memory(fabric.device)  # what it took to choose, once, does not
        steps()
        peak = (peak_memory(fabric.device) or 0) - before
    return {
        "peak": peak / 2**20,
        "model": sum(t.nbytes for t in made) / 2**20,
        "trainable": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "total": total,
    }


def main() -> None:
    """Measure every method in a process of its own and print the ratios to full fine-tuning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="large")
    parser.add_argument("--width", type=int)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", action="store_true", help="what torch allocates, not the resident set (CPU)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; full is always measured")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = {k: v for k in ("size", "width", "image", "batch", "device") if (v := getattr(options, k)) is not None}
    if options.method:
        print(json.dumps(measure(options.method, **{"width": None, **settings}, count=options.count)))
        return
    found: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(["full", *options.methods.split(",")]):
        flags = [f"--{key}={value}" for key, value in settings.items()] + ["--count"] * options.count
        command = [sys.executable, "-m", "bench.memory", f"--method={method}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[method] = json.loads(done.stdout.splitlines()[-1])
    told = f"{found['full']['total'] / 1e6:.1f} M, {options.batch} images of {options.image} x {options.image}"
    print(f"peak training memory, unet {options.size}, {told}:")
    full = found["full"]
    for method, values in found.items():
        share, whole = values["peak"] / full["peak"], (values["peak"] + full["model"]) / (full["peak"] + full["model"])
        print(
            f"  {method:<16} {values['peak']:8.1f} MiB  {share:5.2f} x full  {values['trainable']:>12,.0f} trained"
            f"  (with the model's own {full['model']:.1f} MiB: {whole:.2f} x)",
            flush=True,
        )
    for one, other, most in (("sara", "full", 0.6), ("snell", "lora", 1.0), ("lora", "peft-lora", 1.0)):
        if one in found and other in found:
            print(f"  {one} / {other}: {found[one]['peak'] / found[other]['peak']:.2f} (target: at most {most})")


if __name__ == "__main__":
    main()
