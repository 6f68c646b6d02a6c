"""LLF-LUT: sizes, the identity it can express, its parts put together by hand, options, released names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from filtrun.errors import UserError
from filtrun.lut.edges import canny, luma
from filtrun.lut.interpolation import apply_lut
from filtrun.lut.local_laplacian import remap
from filtrun.lut.pyramid import gaussian_pyramid, laplacian_pyramid, reconstruct
from filtrun.lut.regularise import total_variation
from filtrun.models.checkpoint import load_weights
from filtrun.models.llf_lut import LLFLUT


@pytest.mark.parametrize(
    ("levels", "unused", "count"), [(3, True, 716_277), (6, True, 717_339), (3, False, 551_957), (6, False, 553_019)]
)
def test_parameters(levels: int, unused: bool, count: int) -> None:
    model = LLFLUT(levels=levels, unused_layers=unused)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.transformer.idle_parameters()) == (164_320 if unused else 0)


def shaken(**options: Any) -> LLFLUT:
    """A model with random tables and filters, so that every part counts."""
    torch.manual_seed(0)
    model = LLFLUT(lut_size=5, drop_path=0.0, **options).eval()
    with torch.no_grad():
        for table in model.tables():
            table.add_(0.2 * torch.rand_like(table))
        for name, parameter in model.named_parameters():
            if name.endswith("beta"):
                parameter.fill_(0.5)
    return model


def identity(**options: Any) -> LLFLUT:
    """W = 1 for the first table, w = (1, 0, 0), fact = 0."""
    model = LLFLUT(lut_size=9, **options).eval()
    net, block = model.transformer, model.laplacian_filter.block
    with torch.no_grad():
        for layer in (net.conv_last, net.head, block.model[-1], *(b[-1] for b in block.high_freq_blocks)):
            layer.weight.zero_()
            layer.bias.zero_()
        net.conv_last.bias[:3] = 1.0
        net.head.bias[0] = 1.0
    return model


@pytest.mark.parametrize("rule", ["released", "classical"])
@pytest.mark.parametrize("size", [(37, 53), (64, 48), (9, 9), (3, 70), (1, 1)])
@torch.no_grad()
def test_can_be_the_identity(size: tuple[int, int], rule: str) -> None:
    x = torch.rand(2, 3, *size)
    assert torch.allclose(identity(remap=rule)(x), x, atol=2e-6)


@torch.no_grad()
def test_parts_put_together_by_hand() -> None:
    model, x = shaken(), torch.rand(1, 3, 61, 83)
    low = gaussian_pyramid(x, 3)[-1]
    weight_map, weights = model.transformer(low)
    t0, t1, t2 = model.tables()
    tone = sum(weight_map[:, 3 * j : 3 * j + 3] * apply_lut(low, t) for j, t in enumerate((t0, t1, t2)))
    full = sum(weights[:, j] * apply_lut(x, t) for j, t in enumerate((t0, t1, t2)))
    gaussian, laplacian = gaussian_pyramid(full, 3), laplacian_pyramid(full, 3)
    block = model.laplacian_filter.block

    def near(image: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(image, size=like.shape[2:])

    g, detail = gaussian[2], laplacian[2]
    parameters = block.model(torch.cat([g, near(canny(luma(tone)), g), near(tone, g), near(gaussian[3], g)], dim=1))
    out2 = remap(g, detail, parameters[:, :1], parameters[:, 1:])
    coarse = near(near(tone, out2) + out2, laplacian[1])
    parameters = block.high_freq_blocks[0](torch.cat([coarse, laplacian[1], near(out2, coarse)], dim=1))
    out1 = remap(gaussian[1], laplacian[1], parameters[:, :1], parameters[:, 1:])
    coarse = near(near(coarse, out1) + out1, laplacian[0])
    parameters = block.high_freq_blocks[1](torch.cat([coarse, laplacian[0], near(out1, coarse)], dim=1))
    out0 = remap(gaussian[0], laplacian[0], parameters[:, :1], parameters[:, 1:])
    assert torch.allclose(model(x), reconstruct([out0, out1, out2, tone]), atol=1e-5)
    assert (model(x) - x).abs().max() > 0.05


@pytest.mark.parametrize(("levels", "size"), [(3, (37, 53)), (3, (53, 37)), (6, (8, 100)), (1, (16, 16)), (2, (4, 5))])
@torch.no_grad()
def test_any_size_and_batches(levels: int, size: tuple[int, int]) -> None:
    model, x = shaken(levels=levels), torch.rand(3, 3, *size)
    y = model(x)
    assert y.shape == x.shape and bool(y.isfinite().all())
    single = torch.cat([model(image[None]) for image in x])
    assert torch.allclose(single, y, atol=1e-4)


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shaken(), torch.rand(2, 3, 83, 41)
    whole = model(x)
    monkeypatch.setattr("filtrun.lut.detail_filter.STRIP", 1)  # strips of 16 rows
    monkeypatch.setattr("filtrun.lut.local_laplacian.ROWS", 1)
    with torch.no_grad():
        assert torch.allclose(model(x), whole, atol=1e-5)


@pytest.mark.parametrize("rule", ["released", "classical"])
@pytest.mark.parametrize("penalty", ["map", "point", "both"])
def test_gradients_reach_every_parameter(rule: str, penalty: str) -> None:
    model = shaken(levels=4, remap=rule, weight_penalty=penalty).train()
    x, target = torch.rand(2, 3, 70, 66), torch.rand(2, 3, 70, 66)
    loss = (model(x) - target).abs().mean() + sum(model.regularisers().values())
    loss.backward()
    idle = {id(p) for p in model.transformer.idle_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert (float(parameter.grad.abs().max()) == 0) == (id(parameter) in idle), name


def test_regularisers() -> None:
    model, x = shaken(lambda_smooth=0.5, lambda_mono=2.0), torch.rand(1, 3, 64, 64)
    tables = sum(total_variation(t) for t in model.tables())
    weight_map, weights = model.transformer(gaussian_pyramid(x, 3)[-1])
    for penalty, energy in (
        ("map", weight_map.square().mean()),
        ("point", weights.square().mean()),
        ("both", weight_map.square().mean() + weights.square().mean()),
    ):
        model.weight_penalty = penalty
        model(x)
        assert torch.allclose(model.regularisers()["lut_smooth"], 0.5 * (tables + energy))
    assert set(model.regularisers()) == {"lut_smooth", "lut_mono"}
    copy.deepcopy(model)
    with torch.no_grad():
        model(x)
        assert torch.allclose(model.regularisers()["lut_smooth"], 0.5 * tables)


def test_learns_a_local_curve() -> None:
    """What one table cannot draw: the same colour becomes darker on the left and brighter on the right."""
    torch.manual_seed(1)
    model = LLFLUT(lut_size=5, drop_path=0.0)
    x = 0.2 + 0.6 * torch.rand(1, 3, 40, 40)
    target = (x * torch.linspace(0.6, 1.4, 40)).clamp(0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    losses = []
    for _ in range(40):
        loss = (model(x) - target).abs().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + sum(model.regularisers().values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < 0.35 * losses[0] and losses[-1] < 0.12


@torch.no_grad()
def test_bfloat16_autocast_and_grey() -> None:
    model, x = identity(), torch.rand(1, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x).float(), x, atol=0.02)
    grey = identity(in_channels=1)
    assert torch.allclose(grey(x[:, :1]), x[:, :1], atol=2e-6)


def test_released_names(tmp_path: Path) -> None:
    for levels, unused in ((2, True), (3, False)):
        model = shaken(levels=levels, unused_layers=unused)
        path = tmp_path / f"{levels}.safetensors"
        save_file(model.state_dict(), path)
        loaded = LLFLUT.from_official(path)
        assert loaded.levels == levels and loaded.bin_margin == 1e-6 and not loaded.training
        loaded.bin_margin = 0.0
        x = torch.rand(1, 3, 32, 32)
        assert torch.equal(loaded(x), model(x))
        assert load_weights(LLFLUT(levels=levels, lut_size=5, unused_layers=unused), path) == []
    names = set(LLFLUT().state_dict())
    assert len(names) == 226
    assert {
        "LUT0.LUT",
        "transformer.encoder_layers.0.blocks.0.attn.qkv.weight",
        "transformer.decoder_layers.3.blocks.0.attn2.relative_position_index",
        "transformer.downsample.3.conv.0.bias",
        "laplacian_filter.block.model.2.sca.1.weight",
        "laplacian_filter.block.high_freq_blocks.1.4.bias",
    } <= names
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold an LLF-LUT model"):
        LLFLUT.from_official(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 2}, "needs RGB or grey images"),
        ({"levels": 0}, "model.levels=0"),
        ({"references": 1}, "model.references=1"),
        ({"dim": 40}, "model.dim=40 must be a positive multiple of 16"),
        ({"drop_path": 1.0}, "model.drop_path=1.0"),
        ({"remap": "classic"}, "did you mean 'classical'"),
        ({"latent": "resize"}, "unknown model.latent"),
        ({"weight_penalty": "none"}, "unknown model.weight_penalty"),
        ({"bin_margin": 1.0}, "model.bin_margin=1.0"),
        ({"lambda_smooth": float("nan")}, "model.lambda_smooth=nan"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLFLUT(**options)
