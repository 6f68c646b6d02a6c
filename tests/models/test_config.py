"""Every file in conf/model builds what it names, for digits and for colour photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from filtrun.build import build
from filtrun.errors import UserError

FOLDER = Path(__file__).parents[2] / "conf" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))


def make(name: str, side: int, channels: int, **overrides: object) -> nn.Module:
    node: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml").model)
    sizes: dict[str, Any] = {"num_classes": 10, "in_channels": channels, "image_size": side, "scale": 2}
    node = {key: value for key, value in node.items() if not str(value).startswith("${")}  # taken from elsewhere
    sizes = {key: value for key, value in sizes.items() if key not in node}
    return build({**node, **overrides}, nn.Module, "model", **sizes)


@pytest.mark.parametrize("name", [f.stem for f in FILES])
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3)])
def test_builds_and_runs(name: str, side: int, channels: int) -> None:
    node = OmegaConf.load(FOLDER / f"{name}.yaml").model
    model = make(name, side, channels).eval()
    x = torch.randn(1, channels, side, side)
    with torch.no_grad():
        if "diffuse" in node.tasks:
            assert model(x, torch.tensor([0.5]), torch.tensor([10])).shape == x.shape
        elif "superres" in node.tasks:
            assert model(x).shape == (1, channels, 2 * side, 2 * side)
        elif "classify" not in node.tasks:
            pytest.skip("images of the size and kind its own tests give it")
        else:
            assert model(x).shape == (1, 10)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_says_what_it_is(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0] == "# @package _global_"  # Hydra reads it on the first line only
    assert lines[1].startswith("# ") and max(map(len, lines)) <= 120
    node = OmegaConf.load(file)
    assert {"_target_", "tasks", "base", "checkpoint", "normalize"} <= set(node.model)
    assert node.defaults[0] == {"override /task": node.model.tasks[0]}


def test_wrong_keys_and_types_are_told() -> None:
    with pytest.raises(UserError, match=r"unknown key model.dept.*did you mean 'depth'"):
        make("resnet20", 8, 1, dept=20)
    with pytest.raises(UserError, match="model.width='wide' must be a whole number or null"):
        make("unet", 8, 1, width="wide")
    assert make("unet", 8, 1, multipliers=[1, 2], attention=[]).levels == 2
