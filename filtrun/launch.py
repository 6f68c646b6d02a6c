"""Carry out a composed configuration in its folder: lock, record, device, processes, and what to say when it fails."""

from __future__ import annotations

import datetime
import errno
import functools
import logging
import os
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filtrun.errors import Busy, Interrupted, RunFailure, Stopped, Unfit, UserError
from filtrun.record import FILE, Record
from filtrun.stopping import stops_at

log = logging.getLogger("filtrun")


def execute(
    config: dict[str, Any],
    choices: dict[str, str],
    folder: Path,
    overrides: list[str],
    *,
    quiet: bool = False,
    cell: bool = False,
    fit: Callable[[Any], None] | None = None,
) -> Record:
    """Do the run, or find it done, in `folder`; returns its record.

    A folder that holds this run finished is not run again (``force=true`` does, keeping the old files aside); one
    that holds it unfinished is resumed; one that holds another run is refused, unless it is the folder of a sweep's
    `cell` that did not finish, by other code say: its files are kept aside and it is done anew. A cell whose parts do
    not go together is recorded as skipped.

    `fit` trains in the place of `runner.fit`, where the run is one process.

    Raises:
        UserError, RunFailure: after the reason was written into the record, where the folder is this run's.
        Busy: another process is running in the folder.
    """
    folder = folder.absolute()
    if isinstance(config.get("stages"), dict) and isinstance(config["stages"].get("root"), str):
        root = Path(config["stages"]["root"]).expanduser().absolute()  # found again from any other folder
        config = {**config, "stages": {**config["stages"], "root": str(root)}}
    lock = own(folder)
    record = Record(
        folder=folder, overrides=overrides, config=config, seed=config["seed"], data=choices.get("data", "")
    )
    owned = False
    handler = _LogFile(folder / "filtrun.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        record.task, record.model = choices.get("task", ""), choices.get("model", "")
        record.methods = list(config.get("method") or {})
        previous = _previous(folder)
        owned = previous is None or not previous.key
        plan, record.key, record.name = prepare(config, choices)
        if previous is not None and previous.key:
            if previous.key == record.key and not config["force"]:
                if previous.status == "finished":
                    return previous
            elif config["force"] or (cell and previous.status != "finished"):
                _set_aside(folder)
            else:
                raise UserError(
                    f"{folder} holds another run ({previous.name}, {previous.status}): its configuration, data or code "
                    "differs\nchoose another hydra.run.dir, or force=true to keep its files aside and run here"
                )
        owned = True
        _write_config(folder, config, overrides)
        record.write()
        with stops_at([signal.SIGTERM]):
            return _on_devices(plan, config, choices, folder, record, quiet, fit)
    except BaseException as error:
        failure = explain(error, folder)
        log.error("%s\n%s", failure, traceback.format_exc())
        if owned:
            skipped = cell and isinstance(error, Unfit)
            record.status = (
                "interrupted" if isinstance(failure, (Interrupted, Stopped)) else "skipped" if skipped else "failed"
            )
            record.error = str(failure)
            try:
                record.write()
            except (RunFailure, ValueError):
                log.error("the record could not be written")
        if failure is error:
            raise
        raise failure from error
    finally:
        log.removeHandler(handler)
        handler.close()
        lock.release()


class _LogFile(logging.FileHandler):
    """The run's log; a full disk loses a line of it, and is told elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def prepare(config: dict[str, Any], choices: dict[str, str]) -> tuple[Any, str, str]:
    """Check the configuration and read the data: (plan, key, name)."""
    from filtrun.plan import make_plan

    plan = make_plan(config, choices)
    plan.data.setup(config["split_seed"])
    plan.data.split("train", plan.which)  # nothing to train on should be said before a base is trained for it
    return plan, plan.key(), plan.name


def own(folder: Path) -> Any:
    """Make the folder and lock it for this process. Raises UserError when it is not writable, Busy when it is taken."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise Busy(f"another process is running in {folder}; wait for it or choose another hydra.run.dir") from error
    except OSError as error:
        raise UserError(f"hydra.run.dir={folder} cannot be written: {error.strerror or error}") from error
    return lock


def make_fabric(plan: Any, device: str, devices: int) -> Any:
    """Lightning Fabric for a plan. Raises UserError when the device is not there."""
    import torch
    from lightning_fabric import Fabric

    kind, _, number = str(device).partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise UserError(f"device={device} is not allowed; choose auto, cpu, cuda or cuda:N")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) + (1 if number else devices) > max(there, 0 if number else there):
        if not there:
            raise UserError(
                f"device={device}: this machine has no CUDA device, or torch is a CPU build; use device=cpu"
            )
        raise UserError(f"device={device} with trainer.devices={devices}: this machine has {there} CUDA device(s)")
    if kind == "auto":
        kind = "cuda" if there else "cpu"
    if kind == "cpu" and plan.trainer.precision == "16":
        raise UserError("trainer.precision=16 needs a CUDA device; use bf16 or 32 on a CPU")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = plan.trainer.nodes
    if world > 1:  # torchrun started the processes and says how many there are
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        nodes = world // devices
    several = world > 1 or nodes > 1 or devices > 1
    strategy = ddp(plan, spawn=world == 1 and nodes == 1) if several else "auto"
    chosen: Any = [int(number)] if number else devices
    _plugins_looked_up_once()
    plugins = _mixed(plan.trainer.precision, kind)
    return Fabric(accelerator=kind, devices=chosen, num_nodes=nodes, strategy=strategy, plugins=plugins)


def _mixed(precision: str, kind: str) -> Any:
    """Fabric's plugin for `precision` on a kind of device; None for full precision."""
    if precision == "32":
        return None
    from filtrun.mixed import Mixed

    return Mixed("bf16-mixed" if precision == "bf16" else "16-mixed", device=kind)


@functools.cache
def _plugins_looked_up_once() -> None:
    """Every Fabric reads the metadata of all installed packages, which takes 12 ms and is the same for all cells."""
    from lightning_fabric.utilities import registry

    if hasattr(registry, "entry_points"):
        setattr(registry, "entry_points", functools.cache(registry.entry_points))  # noqa: B010 (mypy)


def ddp(plan: Any, *, spawn: bool) -> Any:
    """Fabric's strategy for several processes.

    Looking for tensors without a gradient costs time in every step, so it is done only where a method of the plan
    says by `unused_params` that there may be some.

    Args:
        spawn: this process starts the others; False: torchrun did, or Fabric does for several nodes.
    """
    from lightning_fabric.strategies import DDPStrategy

    more: dict[str, Any] = {}
    if any(method.unused_params for method in plan.methods):
        more["find_unused_parameters"] = True
    return DDPStrategy(start_method="spawn" if spawn else "popen", **more)


def _on_devices(
    plan: Any, config: dict[str, Any], choices: dict[str, str], folder: Path, record: Record, quiet: bool,
    fit: Callable[[Any], None] | None,
) -> Record:  # fmt: skip
    warnings.filterwarnings("ignore", module="lightning_fabric")
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    for name in ("lightning.fabric", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fabric = make_fabric(plan, config["device"], plan.trainer.devices)
    if plan.trainer.devices > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return fabric.launch(_in_process, config, choices, folder, record, quiet)
    fabric.launch()
    folder = Path(fabric.broadcast(str(folder)))  # processes that torchrun started have folders of their own
    return _work(fabric, plan, folder, record, quiet, fit)


def _in_process(
    fabric: Any, config: dict[str, Any], choices: dict[str, str], folder: Path, record: Record, quiet: bool
) -> Record:
    """One process of several on this machine: it composes nothing, but builds its own plan."""
    plan, _, _ = prepare(config, choices)
    return _work(fabric, plan, folder, record, quiet)


def _work(
    fabric: Any, plan: Any, folder: Path, record: Record, quiet: bool, fit: Callable[[Any], None] | None = None
) -> Record:
    from filtrun.console import progress
    from filtrun.experiment import experiment

    with progress(quiet or fabric.global_rank > 0) as (bar, say):

        def tell(line: str) -> None:
            log.info(line)
            say(line)

        log.info("%s in %s on %s", plan.name, folder, fabric.device)
        with _cpu_threads(plan.config.get("threads")):
            done = experiment(plan, fabric, folder, record, bar, tell, fit)
        log.info("finished: %s", done.metrics)
        return done


@contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads for a while (None: as many as it likes)."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def explain(error: BaseException, folder: Path) -> BaseException:
    """The UserError or RunFailure to show for `error`, itself if it is one."""
    if isinstance(error, (UserError, RunFailure)):
        return error
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"interrupted; go on with: filtrun resume={folder}")
    if type(error).__name__ == "ProcessRaisedException":  # one of several processes, with its whole traceback
        told = re.findall(r"^filtrun\.errors\.(UserError|RunFailure|Stopped): (.*)", text, re.MULTILINE | re.DOTALL)
        if told:
            kinds: dict[str, type[Exception]] = {"UserError": UserError, "RunFailure": RunFailure, "Stopped": Stopped}
            return kinds[told[-1][0]](told[-1][1].strip())
        text = text.strip().splitlines()[-1]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return RunFailure("out of memory; lower trainer.batch_size or task.sample_batch, or raise trainer.accumulate")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC or "No space left" in text:
        return RunFailure(
            f"no disk space left while writing below {folder}; free some and go on: filtrun resume={folder}"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{error.filename or folder} cannot be written: {error.strerror}")
    line = text.strip().splitlines()[0] if text.strip() else "no message"
    return RunFailure(f"{type(error).__name__}: {line}\nthe full traceback is in {folder / 'filtrun.log'}")


def _previous(folder: Path) -> Record | None:
    return Record.read(folder) if (folder / FILE).exists() else None


def _set_aside(folder: Path) -> None:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    aside = folder / f"before-{stamp}"
    aside.mkdir()
    for path in folder.iterdir():
        if path.name not in (".lock", "filtrun.log") and not path.name.startswith("before-"):
            os.replace(path, aside / path.name)


def _write_config(folder: Path, config: dict[str, Any], overrides: list[str]) -> None:
    import yaml

    hydra = folder / ".hydra"
    hydra.mkdir(exist_ok=True)
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    (hydra / "config.yaml").write_text(yaml.dump(config, Dumper=dumper, sort_keys=False))
    (hydra / "overrides.yaml").write_text(yaml.dump(overrides, Dumper=dumper))
