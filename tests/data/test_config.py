"""Every conf/data/*.yaml names a class and exactly its fields, with its defaults."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from filtrun.data.base import Data

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


def test_there_are_configs():
    assert {"digits", "cifar", "cifar10", "cifar100", "mnist", "fashion_mnist", "folder"} <= {c.stem for c in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_yaml_equals_the_defaults_of_its_class(path):
    node = OmegaConf.to_container(OmegaConf.load(path))
    module, name = node.pop("_target_").rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    if not issubclass(cls, Data):
        pytest.skip("paired data")
    assert OmegaConf.to_container(OmegaConf.structured(cls)) == node
    assert path.read_text().startswith("#") and "icence" in path.read_text()
