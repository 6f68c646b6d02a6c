"""A grid at laptop scale on two workers: how much of its time is the cells' own work, and what survives kill -9.

``python -m bench.grid [--kill]``: 4 methods x 2 data sets x 3 seeds. The second data set is a folder of images, the
digits mirrored and in negative. With ``--kill`` the grid is run a second time in another folder while a worker, then
the command itself, are killed in the middle; the same command again ends it, and both sets of records must be equal in
every metric.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filtrun.sweeps.jobs import Job, make_jobs, run_jobs

WORKERS = 2
METHODS = ("sara", "lora", "bitfit", "full")
SEEDS = (0, 1, 2)
WORDS = ["task=diffuse", "model=unet", "threads=1", "device=cpu", "logger=none"]
DIGITS = ["data=digits"]
FOLDER = [
    "data=folder", "data.size=8", "data.channels=1", "data.target=[7,8,9]", "trainer.steps=300", "trainer.lr=5e-4",
    "trainer.warmup=10", "pretrain.steps=600", "pretrain.lr=2e-3", "pretrain.warmup=50", "pretrain.ema=0.99",
    "task.guidance=2", "task.judge_steps=150", "task.samples=400",
]  # fmt: skip
"""The digits' recipe at laptop scale, which the other data set has none of."""


def mirrored(folder: Path) -> Path:
    """Write the second data set: folder/CLASS/NUMBER.png."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 - image[:, ::-1] * 255 / 16).astype("uint8")).save(path)
    return folder


def cells(root: Path, images: Path) -> list[Job]:
    """The grid's jobs below ``root``; their own stage cache is there too."""
    extra = [f"stages.root={root}/stages"]
    rows = [
        make_jobs([*WORDS, *data, f"method={method}"], SEEDS, root / "sweeps", label=method, extra=extra)
        for method in METHODS
        for data in (DIGITS, [*FOLDER, f"data.root={images}"])
    ]
    # the data sets in turn: two workers that begin with one data set would wait for each other's base
    return [job for pair in zip(rows[::2], rows[1::2], strict=True) for both in zip(*pair, strict=True) for job in both]


def once(root: Path, images: Path) -> None:
    """Run the grid and print how its wall time compares with the cells' own."""
    jobs = cells(root, images)
    began = time.perf_counter()
    outcomes = run_jobs(jobs, workers=WORKERS)
    wall = time.perf_counter() - began
    failed = [o for o in outcomes if o.record is None]
    if failed:
        raise SystemExit(f"{len(failed)} cells failed: {failed[0].error}")
    own = sum(o.record.cost["total_seconds"] for o in outcomes)
    trained = sum(not s["cached"] for o in outcomes for s in o.record.stages)
    print(f"{len(jobs)} cells on {WORKERS} workers: {wall:.1f} s; cells' own time / {WORKERS}: {own / WORKERS:.1f} s")
    print(f"wall / own = {wall * WORKERS / own:.3f}; shared stages made: {trained}")


def at_work(root: Path, done: int) -> Iterator[int]:
    """Process numbers of workers, once `done` records are finished and a further cell is training."""
    while True:
        finished = sum('"status": "finished"' in p.read_text() for p in root.glob("sweeps/*/record.json"))
        busy = [p for p in root.glob("sweeps/*/metrics.jsonl") if time.time() - p.stat().st_mtime < 1]
        if finished >= done and busy:
            break
        time.sleep(0.05)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        text = path.read_bytes() if path.exists() else b""
        if b"filtrun.sweeps.worker" in text and str(root).encode() in text:
            yield int(path.parent.name)


def disturbed(root: Path, images: Path) -> None:
    """Run the grid in a process of its own, kill a worker and then the process, and run it again until it is done."""
    command = [sys.executable, "-m", "bench.grid", "--in", str(root), str(images)]
    first = subprocess.Popen(command)
    worker = next(at_work(root, 4))
    os.kill(worker, signal.SIGKILL)
    next(at_work(root, 9))
    first.kill()
    first.wait()
    subprocess.run(command, check=False)  # its first call retries what was killed
    subprocess.run(command, check=True)


def results(root: Path, images: Path) -> list[Any]:
    """Metrics of all cells in the grid's order."""
    from filtrun.record import Record

    found = [Record.read(job.folder) for job in cells(root, images)]
    return [(record.status, record.methods, record.seed, record.metrics, record.report) for record in found]


def main(argv: list[str]) -> None:
    """Measure and print."""
    if argv[:1] == ["--in"]:
        return once(Path(argv[1]), Path(argv[2]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = mirrored(folder / "images")
        once(folder / "calm", images)
        if "--kill" in argv:
            disturbed(folder / "killed", images)
            same = results(folder / "calm", images) == results(folder / "killed", images)
            print(f"killed worker and command, then run again: records {'equal' if same else 'DIFFER'}")


if __name__ == "__main__":
    main(sys.argv[1:])
