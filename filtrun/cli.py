"""The command ``filtrun``: a verb with its own arguments, or a run composed by Hydra."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import Interrupted, RunFailure, Unfit, UserError

VERBS = {
    "list": "filtrun.verbs.list_",
    "info": "filtrun.verbs.info",
    "show": "filtrun.verbs.show",
    "sample": "filtrun.verbs.sample",
    "apply": "filtrun.verbs.apply",
    "table": "filtrun.verbs.table",
    "diff": "filtrun.verbs.diff",
    "report": "filtrun.verbs.report",
    "search": "filtrun.verbs.search",
    "check": "filtrun.verbs.check",
    "doctor": "filtrun.verbs.doctor",
}
MESSAGE_LINES = 6
FLAGS_WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun",
)  # fmt: skip
"""Hydra's flags that a word of their own follows."""
SHOWING = (
    "--cfg", "-c", "--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc",
)  # fmt: skip
"""Hydra's flags that show something and run nothing."""
FLAGS = (
    *FLAGS_WITH_VALUE, "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m",
    "--shell-completion", "-sc", "--info", "-i", "--dry-run",
    "--fail-fast",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 the user's mistake, 1 a failure."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in VERBS:
            return int(importlib.import_module(VERBS[arguments[0]]).main(arguments[1:]) or 0)
        if arguments and arguments[0].isalpha():
            from filtrun.errors import unknown

            raise unknown("command", arguments[0], VERBS)
        return run_command(arguments)
    except (UserError, RunFailure) as error:
        return complain(error)
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        return 0
    except KeyboardInterrupt as stop:
        told = stop.__cause__ if isinstance(stop.__cause__, Interrupted) else Interrupted("interrupted")
        return complain(told)


def complain(error: UserError | RunFailure) -> int:
    """Print a message of at most six lines on stderr and return the exit code that goes with it."""
    lines = [line for line in str(error).splitlines() if line.strip()][:MESSAGE_LINES]
    print("filtrun: " + "\n         ".join(lines), file=sys.stderr)
    return error.exit_code


def run_command(arguments: list[str]) -> int:
    """Everything but the verbs: Hydra composes, then each job runs in its folder."""
    dry = "--dry-run" in arguments
    fail_fast = "--fail-fast" in arguments
    flags, overrides = split_arguments([a for a in arguments if a not in ("--dry-run", "--fail-fast")])
    shows = any(flag.partition("=")[0] in SHOWING for flag in flags)
    sweeps = {"-m", "--multirun"} & set(flags) or any(word.startswith(("sweep=", "rows=")) for word in overrides)
    if sweeps and not shows:
        return _sweep(flags, overrides, dry=dry, fail_fast=fail_fast)
    if fail_fast:
        raise UserError("--fail-fast goes with -m: it ends a sweep at the first cell that fails")
    overrides = _resumed(overrides)
    if any(word.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher.")) for word in overrides):
        from filtrun.sweeps.command import config_dirs
        from filtrun.sweeps.launchers import launcher_of

        overrides, launcher, _ = launcher_of(overrides, config_dirs(flags, overrides))
        if launcher is not None and not sweeps:
            raise UserError("hydra/launcher goes with -m: it starts the cells of a sweep")
    from filtrun.api import register_resolvers, with_default_model
    from filtrun.catalogue import conf_dir

    overrides = with_default_model(overrides)
    more = []
    if dry:
        from filtrun.verbs.dry_run import DryRun

        job: Any = DryRun()
        more += job.overrides()
    else:
        job = Single()
    if int(os.environ.get("RANK", "0")) > 0:
        import tempfile  # a process started by torchrun beside the first one keeps out of the run folder

        more.append(f"hydra.run.dir={tempfile.mkdtemp()}")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, and are told in one line
    register_resolvers()
    import hydra

    from filtrun.hydra_errors import check_optional, translated

    if not {"--config-dir", "-cd"} & set(flags):
        check_optional(overrides)

    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job.run)
    before, sys.argv = sys.argv, ["filtrun", *flags, *overrides, *more]
    try:
        with translated(overrides), _folder_errors():
            entry()
    finally:
        sys.argv = before
    return job.close()


def _sweep(flags: list[str], words: list[str], *, dry: bool, fail_fast: bool) -> int:
    """Many runs: filtrun composes the cells itself, which costs a few milliseconds each."""
    from filtrun.sweeps.command import read_command, run_sweep

    sweep = read_command(flags, words)
    if not dry:
        return run_sweep(sweep, fail_fast=fail_fast)
    from filtrun.verbs.dry_run import DryRun

    run = DryRun(sweep=True)
    for job, reason in sweep.skipped:
        run.skip(job.label, Unfit(reason))
    for job in sweep.jobs:
        run.cell(job.label, job.config, job.choices)
    return run.close()


class _folder_errors:
    """Hydra makes the output folder itself: say in one line when it cannot."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
            raise UserError(f"{error.filename or 'the output folder'} cannot be written: {error.strerror}") from error


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(flags with their values, overrides): Hydra understands them in this order only.

    Raises UserError for a flag that does not exist.
    """
    from filtrun.errors import unknown

    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for word in arguments:
        if takes_value:
            flags.append(word)
        elif word.startswith("-"):
            if word.partition("=")[0] not in FLAGS:
                raise unknown("flag", word, FLAGS)
            flags.append(word)
        else:
            overrides.append(word)
        takes_value = not takes_value and word in FLAGS_WITH_VALUE
    return flags, overrides


def _resumed(arguments: list[str]) -> list[str]:
    """Turn ``resume=RUN`` into the overrides that made RUN, in its folder."""
    given = [a for a in arguments if a.startswith("resume=") and a not in ("resume=null", "resume=")]
    if not given:
        return arguments
    from filtrun.record import Record

    folder = Path(given[-1].partition("=")[2])
    record = Record.read(folder)
    rest = [a for a in arguments if not a.startswith("resume=")]
    allowed = ("device=", "logger=", "workers=", "stages.root=", "data.root=", "trust=")
    for override in rest:
        if not override.startswith(allowed):
            raise UserError(
                f"{override} cannot change with resume={folder}; only where it runs can (device, logger, roots)"
            )
    made = [o for o in record.overrides if not o.startswith(("force=", "resume=", "hydra.run.dir="))]
    quoted = str(record.folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*made, *rest, f"hydra.run.dir='{quoted}'"]


class Single:
    """What Hydra calls with the composed configuration of one run; remembers how it went."""

    def __init__(self) -> None:
        self.code = 0

    def run(self, config: Any) -> None:
        """Carry out the configuration and print its table."""
        from hydra.core.hydra_config import HydraConfig

        from filtrun.api import plain
        from filtrun.launch import execute

        hydra = HydraConfig.get()
        overrides = [str(o) for o in hydra.overrides.task]
        try:
            values, choices = plain(_with_hydra(config, hydra))
            record = execute(values, choices, Path(hydra.runtime.output_dir), overrides)
        except Interrupted as error:
            raise KeyboardInterrupt from error
        except (UserError, RunFailure) as error:
            self.code = complain(error)
            return
        if int(os.environ.get("RANK", "0")) == 0:
            _print_result(record)

    def close(self) -> int:
        """The exit code."""
        return self.code


def _with_hydra(config: Any, hydra: Any) -> Any:
    from omegaconf import OmegaConf, open_dict

    copy = config.copy()
    with open_dict(copy):
        copy["hydra"] = OmegaConf.create({"runtime": {"choices": dict(hydra.runtime.choices)}})
    return copy


def _print_result(record: Any) -> None:
    from rich.console import Console

    from filtrun.build import resolve
    from filtrun.report.table import result_table

    metrics = resolve(record.config["task"]["_target_"], record.config["trust"]).metrics
    Console().print(result_table(record.to_dict() | {"folder": str(record.folder)}, metrics))


if __name__ == "__main__":
    sys.exit(main())
