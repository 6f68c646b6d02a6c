"""Ten seeds of a small network trained at once against the same ten one after the other, in one process.

``python -m bench.vectorize [--device cuda] [--seeds 10] [--width 16] [--batch 64] [--steps 100] [--rounds 3]``: the two
take turns; printed are images a second of all seeds together (training only, by the records) and their ratio. The aim
is 4 x on a GPU for resnet20.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from filtrun.sweeps.jobs import make_jobs, run_jobs

WORDS = ["data=digits", "task=classify", "model=resnet20", "model.base=scratch", "method=full", "logger=none",
         "trainer.evaluate=false", "trainer.checkpoint_every=0"]  # fmt: skip


def seconds(words: list[str], seeds: int, folder: Path, at_once: bool) -> float:
    """Seconds all seeds take to train."""
    extra = [f"stages.root={folder}/stages", f"vectorize={str(at_once).lower()}"]
    jobs = make_jobs([*WORDS, *words], range(seeds), folder / str(at_once), extra=extra)
    for job in jobs:
        job.config["force"] = True
    records = [outcome.record for outcome in run_jobs(jobs)]
    if any((record.cost.get("together") == seeds) != at_once for record in records):
        raise SystemExit("the seeds were not trained as asked")
    each = [record.cost["train_seconds"] for record in records]
    return max(each) if at_once else sum(each)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    for name, default in (("seeds", 10), ("width", 16), ("batch", 64), ("steps", 100), ("rounds", 3), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    words = [
        f"device={given.device}", f"model.width={given.width}", f"trainer.batch_size={given.batch}",
        f"trainer.steps={given.steps}", *([f"threads={given.threads}"] if given.threads else []),
    ]  # fmt: skip
    images = given.seeds * given.steps * given.batch
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        for turn in range(given.rounds + 1):
            at_once, alone = (seconds(words, given.seeds, Path(name), way) for way in (True, False))
            if turn:  # the first is to warm up
                ratios.append(alone / at_once)
                print(f"at once {images / at_once:.0f} images/s, in turn {images / alone:.0f}: {ratios[-1]:.2f} x")
    print(f"{given.seeds} seeds on {given.device}: {sorted(ratios)[len(ratios) // 2]:.2f} x (median)")


if __name__ == "__main__":
    main()
