"""Time of an optimizer step on one square matrix by its width, over the number of entries: AdamW, Muon, AuON in turn.

Run with ``python -m bench.optimizers [--widths 512 1024 2048] [--device cuda]``. A rule in linear time takes the
same time an entry at every width; Newton-Schulz steps are matrix products, whose time an entry grows with the width.
"""

from __future__ import annotations

import argparse
import time

import torch

from filtrun.optimizers import AuON, Muon


def main() -> int:
    """Measure and print; returns 1 when AuON's time an entry grows by more than half over the widths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=(512, 1024, 2048))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    cuda = options.device != "cpu"
    clock = time.perf_counter if cuda else time.process_time
    if not cuda:
        torch.set_num_threads(1)
    rules = {
        "adamw": lambda p: torch.optim.AdamW([p], lr=1e-3, fused=True),
        "muon": lambda p: Muon([p], lr=1e-3),
        "auon": lambda p: AuON([p], lr=1e-3),
        "hybrid auon": lambda p: AuON([p], lr=1e-3, steps=1),
    }
    found: dict[str, list[float]] = {name: [] for name in rules}
    for width in options.widths:
        made = {}
        for name, rule in rules.items():
            parameter = torch.nn.Parameter(torch.randn(width, width, device=options.device))
            parameter.grad = torch.randn_like(parameter)
            made[name] = rule(parameter)
        best = dict.fromkeys(rules, float("inf"))
        repeats = max(1, (1024 // width) ** 2)
        for i in range(options.rounds + 1):  # the first is for warming up
            for name, optimizer in made.items():
                if cuda:
                    torch.cuda.synchronize()
                start = clock()
                for _ in range(repeats):
                    optimizer.step()
                if cuda:
                    torch.cuda.synchronize()
                if i:
                    best[name] = min(best[name], (clock() - start) / repeats)
        for name, seconds in best.items():
            found[name].append(seconds / width**2 * 1e9)
    where = torch.cuda.get_device_name() if cuda else "one CPU thread, CPU time"
    print(f"nanoseconds an entry and step by width, {where}, best of {options.rounds}:")
    print("  " + " " * 12 + "".join(f"{width:>9}" for width in options.widths))
    for name, values in found.items():
        print(f"  {name:<12}" + "".join(f"{value:9.2f}" for value in values) + f"   {values[-1] / values[0]:.2f} x")
    return int(found["auon"][-1] > 1.5 * found["auon"][0])


if __name__ == "__main__":
    raise SystemExit(main())
