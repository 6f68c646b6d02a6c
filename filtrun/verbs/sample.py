"""``filtrun sample RUN``: draw images from a trained denoiser."""

from __future__ import annotations

import argparse
from pathlib import Path

from filtrun.errors import UserError, unknown


def main(argv: list[str]) -> int:
    """Draw samples into one PNG grid; returns the exit code."""
    parser = argparse.ArgumentParser(prog="filtrun sample", description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("-n", type=int, default=64, help="how many images (default 64)")
    parser.add_argument("--out", default="samples.png", help="PNG file to write (default samples.png)")
    parser.add_argument("--classes", help="class names or ids, separated by commas (default: those the run adapted to)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--steps", type=int, help="solver steps (default: the run's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the run's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(argv)
    out = Path(options.out)
    if options.n < 1:
        raise UserError(f"-n {options.n}: at least one image is needed")
    if out.exists() and not options.force:
        raise UserError(f"{out} exists; choose another --out, or --force to replace it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")

    import torch

    from filtrun.images import save_grid
    from filtrun.reload import reload
    from filtrun.tasks.diffuse import Diffuse

    changes = {"sample_steps": options.steps, "guidance": options.guidance}
    run, record = reload(
        options.run, device=options.device, overrides={k: v for k, v in changes.items() if v is not None}
    )
    task = run.task
    if not isinstance(task, Diffuse) or task.kind != "diffuse":
        raise UserError(f"{options.run} is a run of task={record.task}; only task=diffuse can draw samples")
    rules = [method.slug for method in run.methods if method.combines]
    if options.guidance is not None and rules:
        raise UserError(f"--guidance {options.guidance:g}: this run is guided by method={rules[0]}, by its own options")
    if options.classes:
        names = [str(c) for c in run.data.classes]
        ids = [_class_id(word.strip(), names) for word in options.classes.split(",")]
        wanted = torch.tensor(ids)[torch.arange(options.n) % len(ids)]
    else:
        wanted = task.classes(run, run.which, options.n)
    with run.evaluating():
        images, evaluations = task.generate(run, wanted.sort().values, options.seed)
    save_grid(images, out, columns=max(1, round(options.n**0.5)))
    print(f"{out}: {options.n} samples, {evaluations:g} network evaluations each")
    return 0


def _class_id(word: str, names: list[str]) -> int:
    if word in names:
        return names.index(word)
    if word.isdigit() and int(word) < len(names):
        return int(word)
    raise unknown("class", word, names)
