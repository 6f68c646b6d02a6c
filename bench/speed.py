"""What ``speed`` changes on this machine: seconds of a training step by way, and what ``auto`` chooses.

Run with ``python -m bench.speed [--model resnet20] [--rounds 9] [--compile] [--device cuda]``. The ways take turns,
step by step, on copies of one model and on one batch; the least and the median of each are printed: on a CPU the time
of one thread, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

WORDS = {
    "resnet20": ["model=resnet20"],
    "unet": ["model=unet"],
    "airbench94": ["recipe=speedrun"],
}


def main() -> None:
    """Time the ways and print their ratios to the plain one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20", choices=WORDS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="compiled ways, too (minutes on a CPU)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import torch
    from torch import nn

    from filtrun.api import compose
    from filtrun.build import build
    from filtrun.speed import Way

    if options.device == "cpu":
        torch.set_num_threads(1)
    config, _, _ = compose(*WORDS[options.model], "data=cifar")
    model = build(config["model"], nn.Module, "model", num_classes=10, in_channels=3, image_size=options.image)
    model = model.to(options.device).train()
    x = torch.randn(options.batch, 3, options.image, options.image, device=options.device)
    more = (torch.zeros(options.batch, device=options.device),) if options.model == "unet" else ()
    mode = "reduce-overhead" if options.device == "cuda" else "default"
    layouts = [Way(), Way(channels_last=True)]
    ways = [(way, bf16) for way in layouts for bf16 in (False, True)]
    ways += [(Way(way.channels_last, mode), bf16) for way, bf16 in ways] if options.compile else []

    clock = time.process_time if options.device == "cpu" else time.perf_counter

    def step(net: nn.Module, bf16: bool) -> float:
        start = clock()
        with torch.autocast(options.device, torch.bfloat16, enabled=bf16):
            out = net(x, *more)
        out.float().square().mean().backward()
        if options.device == "cuda":
            torch.cuda.synchronize()
        net.zero_grad()
        return clock() - start

    nets = {}
    for way, bf16 in ways:
        twin = copy.deepcopy(model)
        way.lay_out(twin)
        nets[way, bf16] = way.wrapped(twin)
        first = step(nets[way, bf16], bf16)
        if way.compile:
            print(f"  {way}{', bf16' * bf16}: first step {first:.1f} s")
    taken: dict[tuple[Way, bool], list[float]] = {key: [] for key in nets}
    for _ in range(options.rounds):
        for (way, bf16), net in nets.items():
            taken[way, bf16].append(step(net, bf16))
    plain = min(taken[Way(), False])
    print(f"{options.model}, {options.batch} images of {options.image} x {options.image}, {options.device}:")
    for (way, bf16), seconds in taken.items():
        least, middle = min(seconds), statistics.median(seconds)
        name = f"{way}{', bf16' * bf16}"
        print(f"  {name:<40} least {1e3 * least:8.1f} ms ({plain / least:4.2f} x plain)  median {1e3 * middle:8.1f} ms")


if __name__ == "__main__":
    main()
