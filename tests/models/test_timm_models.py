"""Tests of filtrun.models.timm_models, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from filtrun.errors import UserError
from filtrun.models import hub
from filtrun.models.checkpoint import head_of, replace_head
from filtrun.models.timm_models import timm_classifier

VIT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "patch_size": 2, "depth": 1, "embed_dim": 24, "num_heads": 2}
CONV: dict[str, Any] = {"name": "mobilenetv3_small_050"}


@pytest.mark.parametrize("options", [VIT, CONV])
def test_any_architecture_takes_digits(options: dict) -> None:
    model = timm_classifier(**options, in_channels=1, num_classes=7, image_size=8)
    assert model.training and model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    name, head = head_of(model)
    assert name in ("head", "classifier") and isinstance(head, nn.Linear)
    replace_head(model, 3)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_weights_from_a_file(tmp_path: Path) -> None:
    source: Any = timm_classifier(**CONV, num_classes=5)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    again = timm_classifier(**CONV, num_classes=5, weights=str(tmp_path / "a.pth"))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), again.state_dict().values(), strict=True)
    )
    other: Any = timm_classifier(**CONV, num_classes=2, in_channels=1, weights=str(tmp_path / "a.pth"))
    assert torch.equal(source.blocks[1][0].conv_pw.weight, other.blocks[1][0].conv_pw.weight)
    torch.testing.assert_close(source.conv_stem.weight.sum(1, keepdim=True), other.conv_stem.weight)
    assert other.classifier.weight.shape[0] == 2
    with pytest.raises(UserError, match=r"mobilenetv3_small_075 cannot be built .*a.pth.*size mismatch"):
        timm_classifier("mobilenetv3_small_075", num_classes=5, weights=str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match="does not exist"):
        timm_classifier(**CONV, weights=str(tmp_path / "b.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mobilenetv3_smal_050"}, "unknown timm model .*'mobilenetv3_small_050'"),
        ({"name": "§§§§"}, "timm.list_models"),
        ({**CONV, "pach_size": 2}, "cannot be built with these options: .*pach_size"),
        ({**VIT, "patch_size": 16, "image_size": 8}, "8-pixel images"),
        ({"name": "mobilenetv3_small_050.nobody", "pretrained": True}, "publishes no weights"),
    ],
)
def test_mistakes_are_told(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm_classifier(**options)


def test_published_weights_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "reachable", lambda endpoint: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="could not be fetched .*\n.*model.weights=FILE"):
        timm_classifier(**CONV, pretrained=True, image_size=32)
    assert constants.HF_HUB_OFFLINE == before


def test_reachable_asks_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        server.listen()
        assert hub.reachable(f"http://127.0.0.1:{port}")
    assert not hub.reachable(f"http://127.0.0.1:{port}")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": "http://proxy"})
    assert hub.reachable(f"http://127.0.0.1:{port}")
