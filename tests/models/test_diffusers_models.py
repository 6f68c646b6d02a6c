"""Tests of filtrun.models.diffusers_models, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from filtrun.errors import UserError
from filtrun.models import hub
from filtrun.models.diffusers_models import CLASSES, diffusers_denoiser


@pytest.mark.parametrize("cls", CLASSES)
def test_contract(cls: str) -> None:
    torch.manual_seed(0)
    net = diffusers_denoiser(cls, in_channels=1, num_classes=4, image_size=9)
    assert net.time_input == "timestep" and net.conditional and sum(p.numel() for p in net.parameters()) < 1.5e6
    for p in net.parameters():  # DiT starts with zero gates, which hide everything behind them
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(5, 1, 9, 9), torch.linspace(0.5, 900, 5), torch.arange(5)
    out = net.train()(x, t, y)
    assert out.shape == x.shape
    (out * torch.randn_like(out)).sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert missing == []

    with torch.no_grad():
        assert torch.equal(net(x, t, y), net(x, t, y))  # no label is dropped at random, in training mode too
        net.eval()
        base = net(x, t, y)
        assert (net(x, t + 50, y) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-5
        assert (net(x, t, (y + 1) % 5) - base).abs().amax(dim=(1, 2, 3)).min() > 1e-5
        assert torch.equal(net(x, t), net(x, t, torch.full((5,), 4)))  # no class is the id K
        alone = net(x[2:3], t[2:3], y[2:3])
        torch.testing.assert_close(base[2:3], alone, atol=1e-5, rtol=1e-4)
        scalar = net(x, torch.tensor(7), y)
        assert torch.equal(scalar, net(x, torch.full((5,), 7), y))


def test_weights_from_a_folder(tmp_path: Path) -> None:
    source: Any = diffusers_denoiser(in_channels=1, image_size=8, layers_per_block=2).eval()
    source.net.save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    said = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    again = diffusers_denoiser(weights=str(tmp_path), in_channels=1, image_size=8).eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 500]), torch.tensor([0, 10])
    assert torch.equal(source(x, t, y), again(x, t, y))
    assert again.schedule["beta_schedule"] == "scaled_linear" and again.schedule["prediction_type"] == "v_prediction"
    assert again.schedule["num_train_timesteps"] == 1000 and "clip_sample" not in again.schedule

    folder = str(tmp_path)
    for options, message in [
        ({"in_channels": 3}, "for 1 channels, the images have 3"),
        ({"in_channels": 1, "num_classes": 4}, "11 class embeddings, the data need 5"),
        ({"in_channels": 1, "cls": "DiTTransformer2DModel"}, "is a UNet2DModel"),
        ({"in_channels": 1, "dropout": 0.1}, "model.dropout cannot be set beside model.weights"),
    ]:
        with pytest.raises(UserError, match=message):
            diffusers_denoiser(weights=folder, image_size=8, **options)  # type: ignore[arg-type]
    pickled = next((tmp_path / "unet").glob("*.safetensors"))
    torch.save(source.net.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    pickled.unlink()
    with pytest.raises(UserError, match="only safetensors are read"):
        diffusers_denoiser(weights=folder, in_channels=1, image_size=8)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        diffusers_denoiser(weights=folder, in_channels=1, image_size=8)


def test_unconditional_weights_ignore_the_class(tmp_path: Path) -> None:
    net = diffusers_denoiser(in_channels=1, image_size=8, num_class_embeds=None)
    assert not net.conditional
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert torch.equal(net.eval()(x, t, torch.tensor([0, 1])), net(x, t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls": "UNet2DModell"}, "did you mean 'UNet2DModel'"),
        ({"layer_per_block": 2}, "did you mean 'layers_per_block'"),
        ({"block_out_channels": [8]}, "UNet2DModel cannot be built"),
        ({"weights": "./nowhere"}, "neither a folder here nor a hub id"),
        ({"pretrained": True}, "needs model.weights"),
    ],
)
def test_mistakes_are_told(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusers_denoiser(**options)


def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda endpoint: False)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        diffusers_denoiser(weights="nobody/not-in-any-cache")
