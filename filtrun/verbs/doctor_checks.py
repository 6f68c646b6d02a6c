"""The checks of ``filtrun doctor``, each a name, a state and what to do about it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filtrun.catalogue import conf_dir, entries
from filtrun.config_file import read_yaml
from filtrun.errors import UserError
from filtrun.report.units import size

NEEDED = {
    "torch": "torch", "hydra": "hydra-core", "omegaconf": "omegaconf", "lightning_fabric": "lightning-fabric",
    "numpy": "numpy", "sklearn": "scikit-learn", "scipy": "scipy", "PIL": "pillow", "safetensors": "safetensors",
    "filelock": "filelock", "jsonschema": "jsonschema", "yaml": "pyyaml", "rich": "rich", "tensorboard": "tensorboard",
}  # fmt: skip
"""Module -> package, without which the embedded main job cannot run."""

EXTRAS = {"timm": ("timm",), "diffusers": ("diffusers",), "peft": ("peft", "transformers", "accelerate"),
          "pruning": ("torch_pruning",), "mlflow": ("mlflow",), "wandb": ("wandb",),
          "search": ("optuna",), "parquet": ("pyarrow",), "slurm": ("submitit",), "ray": ("ray",)}  # fmt: skip
"""Extra of filtrun -> the modules it brings."""

LITTLE_SPACE, NO_SPACE = 2e9, 2e8
"""Bytes free below which runs may fail soon, or cannot keep a base and checkpoints of the embedded job."""


@dataclass(frozen=True)
class Check:
    """One finding: `state` is ok, missing (something optional is) or broken (the embedded main job needs it)."""

    group: str
    name: str
    state: str
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return dataclasses.asdict(self)


def all_checks(data_root: str | None = None, stages_root: str | None = None) -> list[Check]:
    """Every check in the order they are shown; one that fails unexpectedly is reported, not raised."""
    steps: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("versions", versions),
        ("devices", devices),
        ("extras", extras),
        ("data sets", lambda: data_sets(data_root)),
        ("metrics", inception),
        ("configs", configs),
        ("folders", lambda: folders(stages_root)),
    ]
    found: list[Check] = []
    for group, step in steps:
        try:
            found += step()
        except Exception as error:  # a doctor must not fall ill over one symptom
            found.append(Check(group, group, "missing", f"could not be checked: {_reason(error)}"))
    return found


def versions() -> Iterator[Check]:
    """Python and the packages the main job imports, by really importing them; torchvision, which is optional."""
    yield Check("versions", "python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    yield Check("versions", "filtrun", "ok", importlib.import_module("filtrun").__version__)
    for module, package in NEEDED.items():
        yield _imported("versions", package, module, f"pip install {package}", "broken")
    try:
        from filtrun.compat import torchvision

        yield Check("versions", "torchvision", "ok", str(torchvision().__version__))
    except Exception as error:
        wanted = "pip install torchvision, from where torch came"
        yield Check("versions", "torchvision", "missing", f"{_reason(error)}; downloads and Inception need it", wanted)


def _imported(group: str, package: str, module: str, fix: str, otherwise: str) -> Check:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary raises anything
        return Check(group, package, otherwise, _reason(error), fix)
    try:
        return Check(group, package, "ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return Check(group, package, "ok", "there, version unknown")


def devices() -> Iterator[Check]:
    """CPU threads, and each CUDA device with its memory; a GPU that torch cannot use is pointed out."""
    try:
        import torch
    except Exception:  # said under versions
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("devices", "cpu", "ok", f"{cores} cores for this process, torch uses {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Check("devices", f"cuda:{i}", "ok", f"{name}, {size(free)} of {size(total)} free")
    if not count:
        driver = Path("/proc/driver/nvidia/version").exists()
        build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        fix = f"there is an NVIDIA driver, but torch is {build}: see https://pytorch.org/get-started" if driver else ""
        yield Check("devices", "cuda", "missing", "no CUDA device that torch can use; runs use the CPU", fix)


def extras() -> Iterator[Check]:
    """The optional packages, without importing them."""
    for extra, modules in EXTRAS.items():
        absent = [m for m in modules if importlib.util.find_spec(m) is None]
        if absent:
            yield Check("extras", extra, "missing", f"no {', '.join(absent)}", f"pip install 'filtrun[{extra}]'")
        else:
            yield Check("extras", extra, "ok", ", ".join(f"{m} {metadata.version(m)}" for m in modules))


def data_sets(root: str | None) -> Iterator[Check]:
    """Each data set: where it is, or how to get it. Only the embedded one is needed."""
    from filtrun.build import resolve

    seen = set()
    for entry in entries("data"):
        if entry.target in seen:
            continue
        seen.add(entry.target)
        embedded = entry.name == "digits"
        try:
            there, where = resolve(entry.target).available(None if embedded else root)
        except Exception as error:
            there, where = False, _reason(error)
        state = "ok" if there else "broken" if embedded else "missing"
        yield Check("data sets", entry.name, state, where)


def inception() -> Iterator[Check]:
    """The Inception weights that FID is measured with on larger images."""
    from filtrun.metrics.features import INCEPTION_VARIABLE, find_inception

    fix = f"set {INCEPTION_VARIABLE}=FILE, or put a state dict at ~/.cache/filtrun/inception.safetensors"
    try:
        path = find_inception()
    except UserError as error:
        yield Check("metrics", "Inception weights", "missing", str(error), fix)
        return
    if path is None:
        yield Check("metrics", "Inception weights", "missing", "FID uses a small classifier's features instead", fix)
    else:
        yield Check("metrics", "Inception weights", "ok", str(path))


def configs() -> Iterator[Check]:
    """The folder of configs, and those the main job is made of."""
    try:
        folder = conf_dir()
    except UserError as error:
        yield Check("configs", "conf", "broken", str(error), "install filtrun again")
        return
    yield Check("configs", "conf", "ok", str(folder))
    main_job = {"sara": "methods", "digits": "data", "unet": "models", "diffuse": "tasks", "trainer": "trainer"}
    for name, kind in main_job.items():
        problem = next((e.problem for e in entries(kind) if e.name == name), f"{name} is not there")
        if problem:
            yield Check("configs", name, "broken", problem, "install filtrun again")
    for kind in ("methods", "models", "data", "tasks", "papers"):
        for entry in entries(kind):
            if entry.problem:
                yield Check("configs", entry.name, "missing", entry.problem)


def folders(stages_root: str | None) -> Iterator[Check]:
    """Whether results and the stage cache can be written, and the space there."""
    if stages_root is None:
        stages_root = str(read_yaml(conf_dir() / "config.yaml")["stages"]["root"])
    for name, path in (("outputs", Path("outputs")), ("stage cache", Path(stages_root).expanduser())):
        yield folder(name, path.absolute())


def folder(name: str, path: Path) -> Check:
    """Whether a folder that may not be there yet can be made and written; nothing is left behind."""
    place = next(p for p in (path, *path.parents) if p.exists())
    fix = "start filtrun in another folder" if name == "outputs" else "choose another with stages.root=DIR"
    if not place.is_dir():
        return Check("folders", name, "broken", f"{place} is a file", fix)
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(b"filtrun")
            stream.flush()
    except OSError as error:
        return Check("folders", name, "broken", f"{place} cannot be written: {error.strerror or error}", fix)
    free = shutil.disk_usage(place).free
    detail = f"{path}, {size(free)} free"
    if free < NO_SPACE:
        return Check("folders", name, "broken", detail, f"free at least {size(NO_SPACE)}, or {fix}")
    if free < LITTLE_SPACE:
        return Check("folders", name, "missing", f"{detail}: little for checkpoints and samples", fix)
    return Check("folders", name, "ok", detail)


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
