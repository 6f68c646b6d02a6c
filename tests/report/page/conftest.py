from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def _module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_record():
    """A finished record as JSON values, with some keys changed."""
    return _module("page_records", Path(__file__).parents[1] / "records.py").make_record


@pytest.fixture(scope="session")
def sweeps():
    """The module that makes folders of runs."""
    return _module("page_sweeps", Path(__file__).with_name("sweeps.py"))


@pytest.fixture(scope="session")
def folder(sweeps, make_record, tmp_path_factory):
    """A small sweep; not to be changed."""
    return sweeps.sweep(tmp_path_factory.mktemp("page") / "sweep", make_record)
