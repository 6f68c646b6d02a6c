"""SepLUT: sizes, curves then a table, parts left out, 8 bits, penalties, released names, training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.lut.cube import Cube, read_cube, write_cube
from filtrun.lut.curves import apply_curves
from filtrun.lut.interpolation import apply_lut
from filtrun.lut.regularise import monotonicity
from filtrun.models.checkpoint import load_weights
from filtrun.models.seplut import SepLUT

SMALL = {"lut3d_size": 5, "lut1d_size": 4, "width": 2}


def moved(**options: object) -> SepLUT:
    """A small model whose curves and tables depend on the image."""
    model = SepLUT(**{**SMALL, **options}).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        if model.lut3d_generator is not None:
            bank = model.lut3d_generator.basis_luts_bank.weight
            bank.add_(0.1 * torch.randn_like(bank))
        if model.lut1d_generator is not None:
            model.lut1d_generator.lut1d_generator.weight.mul_(20)
    return model


def with_lines(model: SepLUT) -> SepLUT:
    """The same with curves that are straight lines, up to the sigmoid's ends."""
    assert model.lut1d_generator is not None
    layer, size = model.lut1d_generator.lut1d_generator, model.lut1d_generator.size
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(
            (torch.arange(size) / (size - 1)).clamp(1e-7, 1 - 1e-7).logit().repeat(layer.out_features // size)
        )
    return model


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 119_791),
        ({"lut3d_size": 9, "lut1d_size": 9}, 75_967),
        ({"lut3d_size": 9, "lut1d_size": 9, "width": 6}, 47_175),
        ({"share": True}, 111_053),
        ({"lut1d_size": 0}, 106_684),
        ({"lut3d_size": 0}, 74_803),
    ],
)
def test_parameters(options: dict, parameters: int) -> None:
    assert sum(p.numel() for p in SepLUT(**options).parameters()) == parameters


def test_names_are_those_of_the_released_weights() -> None:
    names = set(SepLUT().state_dict())
    assert len(names) == 23
    assert {"backbone.0.0.weight", "backbone.3.2.bias", "lut1d_generator.lut1d_generator.weight"} <= names
    assert {"lut3d_generator.weights_generator.bias", "lut3d_generator.basis_luts_bank.weight"} <= names


@torch.no_grad()
def test_straight_curves_leave_the_table_alone() -> None:
    torch.manual_seed(0)
    model, x = with_lines(moved()), torch.rand(2, 3, 20, 31)
    curves, tables = model.tables_for(x)
    assert curves is not None and tables is not None
    assert torch.allclose(curves, (torch.arange(4) / 3).expand(2, 3, -1), atol=1e-6)
    assert torch.allclose(model(x), apply_lut(x, tables), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["trilinear", "tetrahedral"])
def test_is_curves_then_a_table(mode: str) -> None:
    torch.manual_seed(1)
    model, x = moved(interpolation=mode), torch.rand(3, 3, 20, 31)
    codes = model.backbone(x)
    assert codes.shape == (3, 64)  # 8 x 2 channels of 2 x 2 pixels
    assert model.lut1d_generator is not None and model.lut3d_generator is not None
    curves = model.lut1d_generator.lut1d_generator(codes).view(3, 3, 4).sigmoid()
    weights = model.lut3d_generator.weights_generator(codes)
    mixed: Tensor = sum(  # type: ignore[assignment]
        w[:, None, None, None, None] * t for w, t in zip(weights.T, model.lut3d_generator.tables(), strict=True)
    )
    expected = apply_lut(apply_curves(x, curves), mixed, mode)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert not torch.allclose(curves[0], curves[1], atol=1e-3)
    assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-5)


@torch.no_grad()
def test_parts_left_out_and_shared() -> None:
    torch.manual_seed(2)
    x = torch.rand(2, 3, 16, 16)
    only_table, only_curves, shared = moved(lut1d_size=0), moved(lut3d_size=0), moved(share=True)
    curves, tables = only_table.tables_for(x)
    assert curves is None and tables is not None and torch.equal(only_table(x), apply_lut(x, tables))
    curves, tables = only_curves.tables_for(x)
    assert tables is None and curves is not None and torch.equal(only_curves(x), apply_curves(x, curves))
    assert only_curves.regularisers() == {}
    curves, _ = shared.tables_for(x)
    assert curves is not None and bool((curves == curves[:, :1]).all())


def test_penalties() -> None:
    torch.manual_seed(3)
    model, x = moved(lambda_sparse=0.5, lambda_smooth=2.0, lambda_mono=3.0), torch.rand(2, 3, 16, 16)
    model(x)
    terms = model.regularisers()
    assert model.lut3d_generator is not None
    weights, tables = model.lut3d_generator.weights_generator(model.backbone(x)), model.lut3d_generator.tables()
    assert torch.allclose(terms["lut_sparse"], 0.5 * weights.square().mean())
    smooth = sum(t.diff(dim=axis).square().mean() for t in tables for axis in (1, 2, 3))
    assert torch.allclose(terms["lut_smooth"], 2.0 * smooth)
    assert torch.allclose(terms["lut_mono"], 3.0 * sum(monotonicity(t) for t in tables))
    assert set(SepLUT(**SMALL).regularisers()) == {"lut_sparse"}  # the paper's setting
    copy.deepcopy(model)


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (300, 40)])
def test_any_size_and_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(4)
    model = moved().train()
    x = torch.rand(2, 3, *size)
    y = model(x)
    assert y.shape == x.shape
    (y.square().mean() + sum(model.regularisers().values())).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    for name in ("lut1d_generator.lut1d_generator.weight", "lut3d_generator.basis_luts_bank.weight"):
        assert bool(model.get_parameter(name).grad.abs().sum() > 0)  # type: ignore[union-attr]


@torch.no_grad()
def test_grey_images_and_autocast() -> None:
    torch.manual_seed(5)
    model, x = moved(in_channels=1), torch.rand(2, 1, 8, 8)
    y = model(x)
    assert y.shape == x.shape
    model.in_channels = 3
    assert torch.allclose(model(x.expand(2, 3, 8, 8)).mean(1, keepdim=True), y)
    with torch.autocast("cpu", torch.bfloat16):
        curves, tables = model.tables_for(x.expand(2, 3, 8, 8))
    assert curves is not None and tables is not None and curves.dtype == tables.dtype == torch.float32


@torch.no_grad()
def test_cube_files_one_after_the_other_or_in_one(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model, x = moved(), torch.rand(1, 3, 16, 16)
    curves, tables = model.tables_for(x)
    assert curves is not None and tables is not None
    write_cube(tmp_path / "curves.cube", Cube(curves[0]))
    write_cube(tmp_path / "table.cube", Cube(tables[0]))
    after = read_cube(tmp_path / "table.cube").apply(read_cube(tmp_path / "curves.cube").apply(x))
    assert torch.allclose(after, model(x), atol=1e-6)
    errors = [(apply_lut(x, model.table_for(x, size)) - model(x)).abs().max().item() for size in (9, 129)]
    assert errors[1] < 0.2 * errors[0]
    nodes = torch.randint(0, 9, (1, 3, 16, 16)) / 8
    exact = apply_lut(apply_curves(nodes, curves), tables)
    assert torch.allclose(apply_lut(nodes, model.table_for(x, 9)), exact, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [9, 17])
def test_8_bit_evaluation(size: int) -> None:
    torch.manual_seed(7)
    model = moved(lut3d_size=size, lut1d_size=size, quantized=True)
    x = torch.rand(2, 3, 24, 31)
    y = model(x)
    levels = y * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4) and 0 <= y.min() and y.max() <= 1
    assert torch.equal(model(x)[1:], model(x[1:]))
    model.quantized = False
    plain = model(x).clamp(0, 1)
    assert (y - plain).abs().mean() < 0.05 and (y - plain).abs().max() > 1 / 255
    model.quantized = True
    assert torch.allclose(model.train().eval()(x), y)
    grey = copy.deepcopy(model)
    grey.in_channels = 1
    assert grey(x[:, :1]).shape == (2, 1, 24, 31)


def test_training_is_not_quantised() -> None:
    torch.manual_seed(8)
    model, x = moved(lut3d_size=9, lut1d_size=9, quantized=True, dropout=0.0).train(), torch.rand(1, 3, 16, 16)
    model(x).sum().backward()
    assert model.lut1d_generator is not None
    assert model.lut1d_generator.lut1d_generator.weight.grad is not None
    model.quantized = False
    y = model(x)
    assert torch.equal(y, model.eval()(x))


def test_curves_learn_a_gamma() -> None:
    torch.manual_seed(9)
    model = with_lines(SepLUT(lut3d_size=3, lut1d_size=9, width=2, luts=1))
    assert model.lut1d_generator is not None
    model.backbone.requires_grad_(False)
    optimizer = torch.optim.Adam(model.lut1d_generator.parameters(), lr=0.05)
    x = torch.rand(1, 3, 24, 24)
    model.lut3d_generator.weights_generator.weight.data.zero_()  # type: ignore[union-attr]
    losses = []
    for _ in range(25):
        loss = (model(x) - x.sqrt()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_released_files(tmp_path: Path) -> None:
    torch.manual_seed(10)
    x = torch.rand(1, 3, 12, 12)
    for options in ({}, {"share": True, "luts": 2}, {"lut1d_size": 0}, {"lut3d_size": 0, "width": 3}):
        model = moved(**options)
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "theirs.pth")
        other = SepLUT(**{**SMALL, **options}).eval()  # type: ignore[arg-type]
        assert load_weights(other, tmp_path / "own.safetensors") == []
        loaded = SepLUT.from_official(tmp_path / "theirs.pth", share=bool(options.get("share")))
        assert not loaded.training
        assert torch.equal(other(x), model(x)) and torch.equal(loaded(x), model(x))
    save_file({"a": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="does not hold a SepLUT model"):
        SepLUT.from_official(tmp_path / "wrong.safetensors")
    state = moved().state_dict() | {"backbone.0.0.bias": torch.zeros(1)}
    save_file(state, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match="does not fit SepLUT: backbone.0.0.bias differ"):
        SepLUT.from_official(tmp_path / "shape.safetensors")


def test_resnet18_backbone() -> None:
    model = SepLUT(backbone="resnet18", lut3d_size=4, lut1d_size=4)
    assert model.lut1d_generator is not None
    assert model.lut1d_generator.lut1d_generator.in_features == 512 and not isinstance(model.backbone, nn.Sequential)
    assert model(torch.rand(2, 3, 20, 30)).shape == (2, 3, 20, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 2}, "model=seplut needs RGB or grey images"),
        ({"luts": 0}, "model.luts=0"),
        ({"lut3d_size": 1}, "model.lut3d_size=1"),
        ({"lut1d_size": -1}, "model.lut1d_size=-1"),
        ({"lut1d_size": 0, "lut3d_size": 0}, "leave nothing"),
        ({"width": 0}, "model.width=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"interpolation": "cubic"}, "unknown model.interpolation 'cubic'"),
        ({"backbone": "vgg"}, "unknown model.backbone 'vgg'"),
        ({"lambda_sparse": -1.0}, "model.lambda_sparse=-1.0"),
        ({"lambda_mono": -1.0}, "model.lambda_mono=-1.0"),
        ({"quantized": True, "lut3d_size": 16}, "model.quantized=true needs lut3d_size=lut1d_size=9 or 17"),
        ({"quantized": True, "interpolation": "tetrahedral"}, "not 17, 17 and tetrahedral"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SepLUT(**options)
