"""Make the writers of this folder importable, whatever the import mode."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def files():
    """The module ``files.py``: sets in every layout."""
    spec = importlib.util.spec_from_file_location("filtrun_test_files", Path(__file__).with_name("files.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
