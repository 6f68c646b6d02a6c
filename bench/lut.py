"""What a 3D table costs at 4K against ``grid_sample`` and against memory bandwidth, and the whole of LLF-LUT.

Run with ``python -m bench.lut [--device cuda] [--size 3840x2160] [--rounds 5] [--threads 2]``. One process; the ways to
look up take turns, the ratio of each pair is taken and the median printed. The floor is a copy of the image: the least
that reading it and writing the result can cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from filtrun.lut.fused import fused
from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.models.adaint import AdaInt
from filtrun.models.llf_lut import LLFLUT
from filtrun.models.lut3d import LUT3D
from filtrun.models.seplut import SepLUT


def plain_grid_sample(image: torch.Tensor, lut: torch.Tensor) -> torch.Tensor:
    """The lookup as one writes it first: colours as coordinates of a volume."""
    grid = (image * 2 - 1).permute(0, 2, 3, 1)[:, None]
    return F.grid_sample(lut[None], grid, mode="bilinear", padding_mode="border", align_corners=True)[:, :, 0]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, everything on the device finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def photograph(width: int, height: int, device: torch.device) -> torch.Tensor:
    """(1, 3, H, W) with smooth areas and fine grain, so that neighbouring pixels look up neighbouring cells."""
    torch.manual_seed(0)
    coarse = torch.rand(1, 3, max(2, height // 120), max(2, width // 120), device=device)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + 0.02 * torch.randn_like(smooth)).clamp(0, 1)


def report(name: str, times: list[float], plain: list[float], copy: list[float]) -> None:
    """One line: median time, and the medians of the ratios in each round."""
    faster = statistics.median(p / t for p, t in zip(plain, times, strict=True))
    floor = statistics.median(t / c for t, c in zip(times, copy, strict=True))
    print(f"{name:24s} {statistics.median(times) * 1e3:9.1f} ms   {faster:6.2f} x grid_sample   {floor:6.1f} x copy")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="3840x2160", help="width x height")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    width, height = (int(side) for side in arguments.size.lower().split("x"))
    device = torch.device(arguments.device)
    image = photograph(width, height, device)
    lut = identity_lut(33, device=device) + 0.05 * torch.rand(3, 33, 33, 33, device=device)

    vertices = F.pad(torch.randn(3, 32, device=device).softmax(-1).cumsum(-1), (1, 0))

    def compiled(interpolation: str) -> torch.Tensor:
        with fused():
            return apply_lut(image, lut, interpolation)

    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: image.clone(),
        "grid_sample": lambda: plain_grid_sample(image, lut),
        "apply_lut trilinear": lambda: apply_lut(image, lut),
        "apply_lut tetrahedral": lambda: apply_lut(image, lut, "tetrahedral"),
        "apply_lut at vertices": lambda: apply_lut(image, lut, vertices=vertices),
        "fused trilinear": lambda: compiled("trilinear"),
        "fused tetrahedral": lambda: compiled("tetrahedral"),
    }
    for work in ways.values():  # warm-up
        work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, work in ways.items():
            times[name].append(seconds(work, device))
    print(f"{width}x{height} on {device}, {torch.get_num_threads()} thread(s), {arguments.rounds} rounds, D = 33")
    for name in ways:
        report(name, times[name], times["grid_sample"], times["copy"])
    gap = (apply_lut(image, lut) - plain_grid_sample(image, lut)).abs().max().item()
    print(f"largest difference from grid_sample: {gap:.1e}")

    levels = 6 if min(width, height) > 1000 else 3
    models = {
        "lut3d": LUT3D(),
        "adaint": AdaInt(),
        "seplut": SepLUT(),
        f"llf_lut, {levels} levels": LLFLUT(levels=levels),
    }
    for name, model in models.items():
        model.eval().to(device)(image)
        spent = [seconds(lambda m=model: m(image), device) for _ in range(min(3, arguments.rounds))]  # type: ignore[misc]
        print(f"{name:24s} {statistics.median(spent) * 1e3:9.1f} ms a frame")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
