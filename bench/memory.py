"""Peak training memory of SaRA, LoRA and full fine-tuning on the same denoiser, each in a fresh process.

Run with ``python -m bench.memory [--size large] [--image 32] [--batch 16] [--device cuda]``. On a CPU the figure is the
growth of the resident set's high-water mark over its size when the model is loaded; on a GPU torch's own counter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

METHODS = ("full", "lora", "sara", "sara-dense")


def measure(method: str, size: str, image: int, batch: int, device: str) -> dict[str, float]:
    """Train three steps in this process and say how much memory that took, in MiB."""
    import torch
    from lightning_fabric import Fabric

    from filtrun import runner
    from filtrun.context import Run
    from filtrun.cost import peak_memory, reset_peak_memory
    from filtrun.data.base import Batch
    from filtrun.data.digits import Digits
    from filtrun.methods.baseline.full import Full
    from filtrun.methods.peft.sara import SaRA
    from filtrun.models.unet import UNet
    from filtrun.stages import Stages
    from filtrun.tasks.diffuse import Diffuse
    from filtrun.trainer import Trainer

    torch.manual_seed(0)
    if method == "full":
        chosen = Full()
    elif method == "lora":
        from filtrun.methods.peft.lora import LoRA

        chosen = LoRA()  # type: ignore[assignment]
    else:
        chosen = SaRA(fraction=0.15, memory="dense" if method.endswith("dense") else "scatter")  # type: ignore[assignment]
    chosen.slug = method
    fabric = Fabric(accelerator=device, devices=1)
    data = Digits()
    data.setup(0)
    model = UNet(in_channels=3, num_classes=10, image_size=image, size=size).to(fabric.device)
    from pathlib import Path

    run = Run(
        fabric=fabric, task=Diffuse(), data=data, model=model, methods=[chosen], trainer=Trainer(batch_size=batch),
        stages=Stages(Path("/tmp")),
    )  # fmt: skip
    runner.edit(run)
    runner.setup(run)
    ids = torch.arange(batch, device=fabric.device)
    x = torch.rand(batch, 3, image, image, device=fabric.device)
    reset_peak_memory(fabric.device)
    before = peak_memory(fabric.device) or 0
    for _ in range(3):
        runner.train_step(run, Batch(x, ids % 10, ids))
        run.step += 1
        run.optimizer.zero_grad()
    total = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return {
        "peak": ((peak_memory(fabric.device) or 0) - (0 if device != "cpu" else before)) / 2**20,
        "trainable": total,
    }


def main() -> None:
    """Measure every method in a process of its own and print the ratios to full fine-tuning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="large")
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method")
    options = parser.parse_args()
    settings = (options.size, options.image, options.batch, options.device)
    if options.method:
        print(json.dumps(measure(options.method, *settings)))
        return
    found = {}
    for method in METHODS:
        flags = [f"--{k}={v}" for k, v in zip(("size", "image", "batch", "device"), settings, strict=True)]
        command = [sys.executable, "-m", "bench.memory", f"--method={method}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[method] = json.loads(done.stdout.splitlines()[-1])
    print(f"peak training memory, unet {options.size}, {options.batch} images of {options.image} x {options.image}:")
    for method, values in found.items():
        share = values["peak"] / found["full"]["peak"]
        print(f"  {method:<11} {values['peak']:8.1f} MiB  {share:5.2f} x full  {values['trainable']:>12,.0f} trained")


if __name__ == "__main__":
    main()
