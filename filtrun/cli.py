"""The command ``filtrun``: a verb with its own arguments, or a run composed by Hydra."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filtrun.errors import RunFailure, UserError

VERBS = {
    "list": "filtrun.verbs.list_",
    "info": "filtrun.verbs.info",
    "show": "filtrun.verbs.show",
    "sample": "filtrun.verbs.sample",
    "check": "filtrun.verbs.check",
    "doctor": "filtrun.verbs.doctor",
}
MESSAGE_LINES = 6


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
    except KeyboardInterrupt:
        return complain(RunFailure("interrupted"))


def complain(error: UserError | RunFailure) -> int:
    """Print a message of at most six lines on stderr and return the exit code that goes with it."""
    lines = [line for line in str(error).splitlines() if line.strip()][:MESSAGE_LINES]
    print("filtrun: " + "\n         ".join(lines), file=sys.stderr)
    return error.exit_code


def run_command(arguments: list[str]) -> int:
    """Everything but the verbs: Hydra composes, then each job runs in its folder."""
    dry = "--dry-run" in arguments
    if dry:
        arguments = [a for a in arguments if a != "--dry-run"]
    arguments = _resumed(arguments)
    from filtrun.api import register_resolvers, with_default_model
    from filtrun.catalogue import conf_dir

    overrides = [a for a in arguments if not a.startswith("-") and "=" in a]
    arguments += [a for a in with_default_model(overrides) if a not in overrides]
    if dry:
        from filtrun.verbs.dry_run import DryRun

        job: Any = DryRun()
        arguments += job.overrides()
    else:
        job = Job(multirun=any(a in ("-m", "--multirun") for a in arguments))
    if int(os.environ.get("RANK", "0")) > 0:
        import tempfile  # a process started by torchrun beside the first one keeps out of the run folder

        arguments.append(f"hydra.run.dir={tempfile.mkdtemp()}")

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, and are told in one line
    register_resolvers()
    import hydra

    from filtrun.hydra_errors import translated

    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job.run)
    before, sys.argv = sys.argv, ["filtrun", *arguments]
    try:
        with translated(overrides), _folder_errors():
            entry()
    finally:
        sys.argv = before
    return job.close()


class _folder_errors:
    """Hydra makes the output folder itself: say in one line when it cannot."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
            raise UserError(f"{error.filename or 'the output folder'} cannot be written: {error.strerror}") from error


def _resumed(arguments: list[str]) -> list[str]:
    """Turn ``resume=RUN`` into the command that made RUN, in its folder."""
    given = [a for a in arguments if a.startswith("resume=") and a not in ("resume=null", "resume=")]
    if not given:
        return arguments
    from filtrun.record import Record

    folder = Path(given[-1].partition("=")[2])
    record = Record.read(folder)
    rest = [a for a in arguments if not a.startswith("resume=")]
    allowed = ("device=", "logger=", "workers=", "stages.root=", "data.root=", "-", "trust=")
    for override in rest:
        if not override.startswith(allowed):
            raise UserError(
                f"{override} cannot change with resume={folder}; only where it runs can (device, logger, roots)"
            )
    return [*record.overrides, *rest, f"hydra.run.dir={record.folder}"]


class Job:
    """What Hydra calls for each composed configuration; remembers how it went."""

    def __init__(self, multirun: bool) -> None:
        self.multirun = multirun
        self.codes: list[int] = []
        self.cells: list[tuple[str, Any]] = []

    def run(self, config: Any) -> None:
        """Carry out one configuration and print its table; a failing cell does not stop a sweep."""
        from hydra.core.hydra_config import HydraConfig

        from filtrun.api import plain
        from filtrun.launch import execute

        hydra = HydraConfig.get()
        overrides = [str(o) for o in hydra.overrides.task]
        try:
            values, choices = plain(_with_hydra(config, hydra))
            record = execute(values, choices, Path(hydra.runtime.output_dir), overrides)
        except (UserError, RunFailure) as error:
            self.codes.append(complain(error))
            self.cells.append((" ".join(overrides), None))
            return
        self.codes.append(0)
        self.cells.append((" ".join(overrides), record))
        if int(os.environ.get("RANK", "0")) == 0:
            _print_result(record)

    def close(self) -> int:
        """The exit code of all jobs: a failure (1) outweighs a user's mistake (2)."""
        if self.multirun and self.cells:
            failed = sum(record is None for _, record in self.cells)
            print(f"{len(self.cells)} cells: {len(self.cells) - failed} finished, {failed} failed")
        return 1 if 1 in self.codes else max(self.codes, default=0)


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
