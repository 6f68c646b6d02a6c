"""``filtrun search``: hyper-parameter search; each trial's cells are ordinary runs in outputs/sweeps."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.cells import MACHINE_KEYS
from filtrun.errors import Interrupted, UserError, closest, unknown
from filtrun.verbs import Parser, print_json

SPLITS = ("test", "tuned", "base")
GROUPS = ("task", "data", "model")
"""Parts of a setting, beside its methods and its scale, by which a table finds the searches for its rows."""
RUNGS = 4
"""Evaluations within a run, where trials are pruned."""


def main(argv: Sequence[str]) -> int:
    """Search, print the best trials; returns 1 when a trial failed. What Ctrl-C leaves, the same command goes on with.

    Raises KeyboardInterrupt from Interrupted after printing the best so far.
    """
    from filtrun.search.space import grid, overrides, parse_space
    from filtrun.search.study import Study, optuna

    options = parse(argv)
    space, words = parse_space(options.words)
    if options.sampler == "grid":
        grid(space)
    optuna()
    seeds, rungs = options.seeds, options.rungs if options.pruner != "none" else 0
    words, about, direction = checked(words, space, options)
    about |= {"seeds": seeds, "rungs": rungs}
    study = Study(
        Path("outputs/searches", options.study), space, about, direction, sampler=options.sampler,
        pruner=options.pruner, seed=options.seed, evaluations=len(seeds) * (rungs + 1),
    )  # fmt: skip
    told = f"{direction} {options.metric}, mean of {len(seeds)} seeds, on the {about['split']} split"
    print(f"objective: {told}", file=sys.stderr)
    from filtrun.search import shown
    from filtrun.search.cells import SweepCells
    from filtrun.search.loop import search

    def ended(number: int, state: str, mean: float | None, params: dict[str, Any], why: str) -> None:
        told = f": {why.splitlines()[0]}" if why else f" {mean:.6g}" if mean is not None else ""
        print(f"trial {number} {state.lower()}{told}  {' '.join(overrides(params))}", file=sys.stderr)

    failed, stopped = 0, False
    try:
        with SweepCells(words, options.metric, options.workers, rungs, Path("outputs/sweeps")) as cells:
            failed = search(
                study, cells, seeds, options.trials, workers=options.workers, rungs=rungs, timeout=options.timeout,
                ended=ended,
            )  # fmt: skip
    except KeyboardInterrupt:
        stopped = True
    finally:
        result = study.result()
    line = shown.command(words, result["best"]["params"], seeds) if result["best"] else None
    if options.json:
        print_json({**result, "command": line})
    else:
        shown.show(result, line)
    if stopped:
        trials = f"{result['tried']} of {options.trials} trials"
        raise KeyboardInterrupt from Interrupted(f"interrupted after {trials}; the same command goes on")
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked. Raises UserError."""
    from filtrun.search.study import PRUNERS, SAMPLERS

    parser = Parser("search", __doc__ or "")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides; log(a,b), range, int, choice search")
    parser.add_argument("--metric", required=True, help="such as test/fid")
    parser.add_argument("--study", required=True, metavar="NAME", help="the same name goes on with the search")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", default="0", metavar="N,N")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time, each in its own process")
    parser.add_argument("--sampler", default="tpe", help=", ".join(SAMPLERS))
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--direction", choices=("minimize", "maximize"), help="default: the metric's own")
    parser.add_argument("--pruner", help=f"{', '.join(PRUNERS)}: end bad trials early; seeds then run one by one")
    parser.add_argument("--prune", action="store_true", help="the same as --pruner median")
    parser.add_argument("--rungs", type=int, metavar="N", help=f"with a pruner: evaluations in a run (default {RUNGS})")
    parser.add_argument("--timeout", type=float, metavar="S", help="start no trial after S seconds")
    parser.add_json()
    options, rest = parser.parse_known_intermixed_args(list(argv))
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"{parser.prog}: {rest[0]} is no option{closest(rest[0].partition('=')[0], known)}")
    if options.sampler not in SAMPLERS:
        raise unknown("sampler", options.sampler, SAMPLERS)
    if options.prune and options.pruner not in (None, "median"):
        raise UserError(f"--prune means --pruner median, and --pruner {options.pruner} is given too")
    options.pruner = options.pruner or ("median" if options.prune else "none")
    if options.pruner not in PRUNERS:
        raise unknown("pruner", options.pruner, PRUNERS)
    if options.rungs is not None and (options.rungs < 0 or options.pruner == "none"):
        raise UserError(f"--rungs {options.rungs} goes with --pruner median or hyperband and is a whole number from 0")
    options.rungs = RUNGS if options.rungs is None else options.rungs
    if not re.fullmatch(r"\w[\w.-]*", options.study):
        raise UserError(f"--study {options.study}: letters, digits, '-', '_' and '.' only")
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        raise UserError(f"--seeds {options.seeds} must be whole numbers from 0, such as 0,1,2")
    if options.trials < 1 or options.seed < 0 or options.workers < 1:
        raise UserError("--trials and --workers must be at least 1 and --seed at least 0")
    options.seeds = list(dict.fromkeys(int(s) for s in options.seeds.split(",")))
    if options.pruner != "none" and not options.rungs and len(options.seeds) == 1:
        raise UserError(f"--pruner {options.pruner} with --rungs 0 and one seed has nothing to prune by")
    return options


def checked(
    words: list[str], space: Sequence[Any], options: argparse.Namespace
) -> tuple[list[str], dict[str, Any], str]:
    """(overrides, what is searched, direction) after both ends of the space were built. Raises UserError."""
    import dataclasses

    from filtrun.plan import make_plan
    from filtrun.search.space import overrides
    from filtrun.sweeps.jobs import make_jobs

    for word in [*words, *(f"{d.key}=" for d in space)]:
        if word.startswith("seed="):
            raise UserError(f"{word}: a search takes the runs' seeds from --seeds N,N")

    def plan(end: int) -> tuple[Any, Any]:
        point = overrides({d.key: d.ends()[end] for d in space})
        (job,) = make_jobs([*words, *point], [0], Path("outputs/sweeps").absolute())
        return job, make_plan(job.config, job.choices)

    job, found = plan(0)
    task = found.task
    has_split = any(f.name == "split" for f in dataclasses.fields(task))
    if has_split and not any(w.lstrip("+").startswith("task.split=") for w in words):
        words = [*words, "task.split=val"]
        task = plan(0)[1].task
    plan(-1)
    names = [f"{split}/{name}" for split in SPLITS for name in task.metrics]
    if options.metric not in names:
        raise UserError(f"--metric {options.metric}: no run has it{closest(options.metric, names)}")
    better = task.metrics[options.metric.partition("/")[2]].better
    direction = options.direction or ("maximize" if better == "higher" else "minimize")
    about = {
        "overrides": sorted(w for w in words if w.partition("=")[0].partition(".")[0] not in MACHINE_KEYS),
        "metric": options.metric, "split": str(task.split) if has_split else "test",
        "setting": {
            "methods": list(job.config.get("method") or {}), **{k: job.choices.get(k, "") for k in GROUPS},
            "scale": job.config.get("scale"),
        },
    }  # fmt: skip
    return words, about, direction
