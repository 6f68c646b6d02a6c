"""``filtrun search``: hyper-parameter search; each trial's cells are ordinary runs in outputs/sweeps."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.cells import MACHINE_KEYS
from filtrun.errors import UserError, closest, unknown
from filtrun.verbs import Parser, print_json, terminal

SPLITS = ("test", "tuned", "base")


def main(argv: Sequence[str]) -> int:
    """Search, print the best trials; returns 1 when a trial failed."""
    from filtrun.search.space import grid, overrides, parse_space
    from filtrun.search.study import Study, optuna

    options = parse(argv)
    space, words = parse_space(options.words)
    if options.sampler == "grid":
        grid(space)
    optuna()
    seeds = options.seeds
    words, used, direction = checked(words, space, options)
    same = sorted(w for w in words if w.partition("=")[0].partition(".")[0] not in MACHINE_KEYS)
    about = {"overrides": same, "metric": options.metric, "split": used, "seeds": seeds}
    folder = Path("outputs/searches", options.study)
    study = Study(folder, space, about, direction, sampler=options.sampler, seed=options.seed)
    print(f"objective: {direction} {options.metric}, mean of {len(seeds)} seeds, on the {used} split", file=sys.stderr)
    from filtrun.search.loop import TrialFailed, search
    from filtrun.sweep import make_jobs, run_jobs

    def score(params: dict[str, Any], part: Sequence[int]) -> list[float]:
        try:
            jobs = make_jobs([*words, *overrides(params)], part, Path("outputs/sweeps").absolute())
        except UserError as error:
            raise TrialFailed(str(error)) from error
        found = {o.job.folder: o for o in run_jobs(jobs)}
        values = []
        for job in jobs:
            outcome = found[job.folder]
            value = outcome.record.metrics.get(options.metric) if outcome.record else None
            if value is None:
                raise TrialFailed(outcome.error or f"{job.folder} has no {options.metric}")
            values.append(float(value))
        return values

    def ended(number: int, state: str, mean: float | None, params: dict[str, Any], why: str) -> None:
        told = f": {why.splitlines()[0]}" if why else f" {mean:.6g}"
        print(f"trial {number} {state.lower()}{told}  {' '.join(overrides(params))}", file=sys.stderr)

    try:
        failed = search(
            study, score, seeds, options.trials, prune=options.prune, timeout=options.timeout, ended=ended
        )  # fmt: skip
    finally:
        result = study.result()
    show(result, words, options.json)
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked. Raises UserError."""
    from filtrun.search.study import SAMPLERS

    parser = Parser("search", __doc__ or "")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides; log(a,b), range, int, choice search")
    parser.add_argument("--metric", required=True, help="such as test/fid")
    parser.add_argument("--study", required=True, metavar="NAME", help="the same name goes on with the search")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", default="0", metavar="N,N")
    parser.add_argument("--sampler", default="tpe", help=", ".join(SAMPLERS))
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--direction", choices=("minimize", "maximize"), help="default: the metric's own")
    parser.add_argument("--prune", action="store_true", help="seed by seed; stop trials worse than the median")
    parser.add_argument("--timeout", type=float, metavar="S", help="start no trial after S seconds")
    parser.add_json()
    options, rest = parser.parse_known_intermixed_args(list(argv))
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"{parser.prog}: {rest[0]} is no option{closest(rest[0].partition('=')[0], known)}")
    if options.sampler not in SAMPLERS:
        raise unknown("sampler", options.sampler, SAMPLERS)
    if not re.fullmatch(r"\w[\w.-]*", options.study):
        raise UserError(f"--study {options.study}: letters, digits, '-', '_' and '.' only")
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        raise UserError(f"--seeds {options.seeds} must be whole numbers from 0, such as 0,1,2")
    if options.trials < 1 or options.seed < 0:
        raise UserError("--trials must be at least 1 and --seed at least 0")
    options.seeds = list(dict.fromkeys(int(s) for s in options.seeds.split(",")))
    return options


def checked(words: list[str], space: Sequence[Any], options: argparse.Namespace) -> tuple[list[str], str, str]:
    """(overrides, split, direction) after both ends of the space were built. Raises UserError."""
    import dataclasses

    from filtrun.plan import make_plan
    from filtrun.search.space import overrides
    from filtrun.sweep import make_jobs

    def plan(end: int) -> Any:
        point = overrides({d.key: d.ends()[end] for d in space})
        (job,) = make_jobs([*words, *point], [0], Path("outputs/sweeps").absolute())
        return make_plan(job.config, job.choices)

    task = plan(0).task
    has_split = any(f.name == "split" for f in dataclasses.fields(task))
    if has_split and not any(w.lstrip("+").startswith("task.split=") for w in words):
        words = [*words, "task.split=val"]
        task = plan(0).task
    plan(-1)
    names = [f"{split}/{name}" for split in SPLITS for name in task.metrics]
    if options.metric not in names:
        raise UserError(f"--metric {options.metric}: no run has it{closest(options.metric, names)}")
    better = task.metrics[options.metric.partition("/")[2]].better
    direction = options.direction or ("maximize" if better == "higher" else "minimize")
    return words, str(task.split) if has_split else "test", direction


def show(result: dict[str, Any], words: Sequence[str], as_json: bool) -> None:
    """The best trials and the line that runs the best."""
    from rich.table import Table

    from filtrun.search.space import overrides

    best = result["best"]
    line = " ".join(["filtrun", *words, *overrides(best["params"])]) if best else None
    if as_json:
        print_json({**result, "command": line})
        return
    done = [t for t in result["trials"] if t["state"] == "complete"]
    done.sort(key=lambda t: t["value"], reverse=result["direction"] == "maximize")
    keys = [d["key"] for d in result["space"]]
    table = Table("trial", result["metric"], *keys)
    for trial in done[:10]:
        table.add_row(str(trial["number"]), f"{trial['value']:.6g}", *(f"{trial['params'][k]}" for k in keys))
    terminal().print(table)
    print(f"{result['tried']} trials tried, {len(done)} complete, measured on the {result['split']} split")
    if line:
        print(line)
