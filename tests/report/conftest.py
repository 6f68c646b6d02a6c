from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def records():
    """The module with example records."""
    spec = importlib.util.spec_from_file_location("report_records", Path(__file__).with_name("records.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cards():
    """The module with an example card and records of its cells."""
    spec = importlib.util.spec_from_file_location("report_cards", Path(__file__).with_name("cards.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def searches():
    """The module that writes searches by hand."""
    spec = importlib.util.spec_from_file_location("report_searches", Path(__file__).with_name("searches.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_sweeps(cards, records, tmp_path_factory):
    """A folder of sweeps with every cell of the example card at laptop scale; not to be changed."""
    sweeps = tmp_path_factory.mktemp("done") / "sweeps"
    cards.write_records(sweeps, records.make_record)
    return sweeps
