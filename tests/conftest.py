"""One thread everywhere, also in processes that tests start, and one stage cache for all tests and workers."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stages_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and judges of smoke runs, trained once for all workers (the cache locks)."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "stages"


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


def _main(*words: str) -> Result:
    from filtrun import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """The command's `main` in this process, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    yield _main


@pytest.fixture
def smoke(cli: Callable[..., Result], stages_root: Path) -> Callable[..., Result]:
    """The command at smoke scale with the shared stage cache, on the CPU."""

    def run(*words: str) -> Result:
        return cli("scale=smoke", "device=cpu", "logger=none", f"stages.root={stages_root}", *words)

    return run
