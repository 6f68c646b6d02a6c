"""``filtrun -m WORDS`` and ``sweep=NAME``: make the cells, leave out those that do not apply, run the rest, sum up."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filtrun.errors import UserError
from filtrun.sweeps.expand import check_hydra, expand, pull, split_rows
from filtrun.sweeps.jobs import Job, Outcome
from filtrun.sweeps.kept import KeptSweep, read_sweep
from filtrun.sweeps.launchers import launcher_of


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep, and where they run (`launcher` and `options` as for `filtrun.sweeps.jobs.run_jobs`).

    `skipped`: those that do not apply, with the reason; `same`: cells another stands for.
    """

    jobs: list[Job]
    skipped: list[tuple[Job, str]]
    same: int
    axes: tuple[str, ...]
    launcher: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """How many cells at a time."""
        return max((job.config["workers"] for job in self.jobs), default=1)


def read_command(flags: Sequence[str], words: Sequence[str]) -> Sweep:
    """The sweep that a command line means.

    Args:
        flags: Hydra's flags with their values.
        words: overrides, among them ``sweep=NAME`` and ``rows=...``.

    Raises:
        UserError: a word is not understood, or a cell cannot be composed.
    """
    from filtrun.hydra_errors import check_optional

    rest, name = pull(words, "sweep")
    rest, rows = pull(rest, "rows")
    folders = config_dirs(flags, rest)
    kept = read_sweep(name, folders) if name is not None else KeptSweep()
    rest, launcher, options = launcher_of([*kept.overrides, *rest], folders)
    check_hydra(rest, flags)
    if rows is not None:
        if kept.rows != ((),):
            raise UserError(f"rows=... and sweep={name} both list rows; use one of them")
        kept = replace(kept, rows=tuple(map(tuple, split_rows(_unquoted(rows)))))
    rest, sweep_dir = pull(rest, "hydra.sweep.dir")
    rest, _ = pull(rest, "hydra.searchpath")
    cells = expand(rest, kept.rows, folders)
    if not folders:
        for cell in cells:
            check_optional(cell)
    return replace(_composed(cells, kept, _folder(sweep_dir), folders), launcher=launcher, options=options)


def _composed(cells: Sequence[tuple[str, ...]], kept: KeptSweep, sweep_dir: Path, folders: Sequence[str]) -> Sweep:
    from filtrun.api import resolved
    from filtrun.cells import cell_digest
    from filtrun.composed import stamp
    from filtrun.shared_base import composed_on_base

    now = stamp(folders)
    shared = set.intersection(*map(set, cells)) if len(cells) > 1 else set()
    jobs: dict[str, Job] = {}
    for words in cells:
        label = " ".join(word for word in words if word not in shared) or " ".join(words) or "(defaults)"
        try:
            composed, choices = composed_on_base(words, folders, now)
            config = resolved(composed)
            digest = cell_digest(config)
        except UserError as error:
            raise UserError(f"{error}\nin the cell {label}" if len(cells) > 1 else str(error)) from error
        jobs.setdefault(digest, Job(label, tuple(words), config, choices, sweep_dir / digest))
    seen = {digest: as_record(job) for digest, job in jobs.items()}
    kept.check(list(seen.values()))
    reasons = {digest: kept.reason(cell) for digest, cell in seen.items()}
    axes = {word.partition("=")[0].lstrip("+") for words in cells for word in words if word not in shared}
    return Sweep(
        [job for digest, job in jobs.items() if not reasons[digest]],
        [(job, reasons[digest]) for digest, job in jobs.items() if reasons[digest]],
        len(cells) - len(jobs),
        tuple(key for key in dict.fromkeys(w.partition("=")[0] for c in cells for w in c) if key in axes),
    )


def as_record(job: Job) -> dict[str, Any]:
    """A cell as its record will be, as far as that is known before it is run: what conditions are asked of."""
    names = {key: job.choices.get(key, "") for key in ("task", "data", "model")}
    return {
        "config": job.config, "seed": job.config.get("seed"), "methods": list(job.config.get("method") or ()),
        "status": "", **names,
    }  # fmt: skip


def run_sweep(sweep: Sweep, *, fail_fast: bool = False) -> int:
    """Run the cells and print what came out; returns the exit code: 0, 1 when one failed, 2 for a user's mistake.

    Raises KeyboardInterrupt (from Interrupted) when stopped.
    """
    from filtrun.sweeps.view import run_shown

    where: dict[str, Any] = {"launcher": sweep.launcher, "options": sweep.options}
    if (sweep.workers > 1 or sweep.launcher) and any(job.config.get("vectorize") for job in sweep.jobs):
        other = f"hydra/launcher={sweep.launcher}" if sweep.launcher else f"workers={sweep.workers}"
        raise UserError(f"{other} and vectorize do not go together: vectorize trains cells at once in one process")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep starts its own processes and cannot run under torchrun; set trainer.devices=N instead")
    skipped = [note_skipped(job, reason) for job, reason in sweep.skipped]
    for outcome in skipped:
        print(f"{outcome.job.label}: skipped: {outcome.error}", file=sys.stderr)
    ran = run_shown(sweep.jobs, sweep.workers, fail_fast=fail_fast, **where) if sweep.jobs else []
    outcomes = [*skipped, *ran]
    _show(sweep, outcomes)
    if len(ran) < len(sweep.jobs):
        print(f"stopped at the first failure: {len(sweep.jobs) - len(ran)} cells were not run", file=sys.stderr)
    codes = {outcome.code for outcome in outcomes}
    if outcomes and all(outcome.skipped for outcome in outcomes):
        return 2
    return 1 if 1 in codes else max(codes, default=0)


def note_skipped(job: Job, reason: str) -> Outcome:
    """Record that a cell does not apply, unless it has a finished record all the same."""
    from filtrun.launch import own
    from filtrun.sweeps.pool import mark

    lock = own(job.folder)
    try:
        mark(job, "skipped", reason)
    finally:
        lock.release()
    return Outcome(job, error=reason, skipped=True)


def _show(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """The cells that finished as a table, seeds together, and how many there are of each kind."""
    from filtrun.report.index import read_records
    from filtrun.report.many import Question, folder_sheet
    from filtrun.report.terminal import show
    from filtrun.sweeps.view import counted
    from filtrun.verbs import terminal

    done = [outcome for outcome in outcomes if outcome.record is not None]
    if done:
        root = done[0].job.folder.parent
        names = {outcome.job.folder.name for outcome in done}
        records = [r for r in read_records(root, finished=True) if Path(r["folder"]).name in names]
        by = tuple(dict.fromkeys("methods" if axis == "method" else axis for axis in sweep.axes if axis != "seed"))
        if records:
            show(terminal(), [folder_sheet(records, root, Question(by=_known(by, records), limit=60))])
    print(counted(outcomes))
    if sweep.same:
        print(f"{sweep.same} more compute the same as one of these")


def _known(by: tuple[str, ...], records: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The keys that tell the groups apart, as far as records have them: a recipe's name is in none."""
    from filtrun.report.select import ABSENT, value_of

    return tuple(k for k in by if any(value_of(r, k) is not ABSENT for r in records)) or ("methods",)


def config_dirs(flags: Sequence[str], words: Sequence[str]) -> list[str]:
    """The folders of configs that a command names. Raises UserError for one that is not there."""
    found = [word.partition("=")[2] for word in flags if word.startswith(("--config-dir=", "-cd="))]
    found += [after for word, after in zip(flags, flags[1:], strict=False) if word in ("--config-dir", "-cd")]
    given = [word for word in words if word.startswith("hydra.searchpath=")]
    for word in given:
        for part in word.partition("=")[2].strip("[]").split(","):
            if part.strip():
                found.append(_unquoted(part.strip()).removeprefix("file://"))
    for folder in found:
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"--config-dir {folder}: there is no such folder")
    return found


def _folder(given: str | None) -> Path:
    from filtrun.catalogue import conf_dir
    from filtrun.config_file import read_yaml

    usual = read_yaml(conf_dir() / "config.yaml")["hydra"]["sweep"]["dir"]
    return Path(_unquoted(given) if given else usual).expanduser().absolute()


def _unquoted(text: str) -> str:
    """A value without the quotes Hydra would take off."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0]).replace("\\\\", "\\")
    return text
