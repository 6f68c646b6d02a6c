"""AdaInt: sizes, the uniform start, moving nodes, penalties, rates of the interval layer, released names, training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from filtrun.errors import UserError
from filtrun.lut.cube import Cube, read_cube, write_cube
from filtrun.lut.interpolation import apply_lut
from filtrun.lut.regularise import monotonicity
from filtrun.models.adaint import AdaInt, vertices_from
from filtrun.models.checkpoint import load_weights


def moved(**options: object) -> AdaInt:
    """A small model whose tables and vertices depend on the image."""
    model = AdaInt(**{"lut_size": 5, **options}).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        bank = model.lut_generator.basis_luts_bank.weight
        bank.add_(0.1 * torch.randn_like(bank))
        if model.adaint is not None:
            model.adaint.intervals_generator.weight.normal_(0, 0.1)
    return model


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, 619_724), ({"adaptive": False}, 593_516), ({"share": True}, 586_892)],
)
def test_parameters(options: dict, parameters: int) -> None:
    assert sum(p.numel() for p in AdaInt(**options).parameters()) == parameters


def test_resnet18_backbone() -> None:
    model = AdaInt(backbone="resnet18", luts=5, lut_size=4)
    assert sum(p.numel() for p in model.backbone.parameters()) == 11_176_512  # ImageNet's ResNet-18 without its head
    assert model.lut_generator.weights_generator.in_features == 512
    assert model(torch.rand(2, 3, 20, 30)).shape == (2, 3, 20, 30)


def test_names_are_those_of_the_released_weights() -> None:
    names = set(AdaInt(lut_size=3).state_dict())
    assert len(names) == 23
    assert {"backbone.0.0.weight", "backbone.0.2.weight", "backbone.4.0.bias"} <= names
    assert {"lut_generator.weights_generator.bias", "lut_generator.basis_luts_bank.weight"} <= names
    assert {"adaint.intervals_generator.weight", "adaint.intervals_generator.bias"} <= names


def test_vertices() -> None:
    torch.manual_seed(0)
    assert torch.allclose(vertices_from(torch.full((3, 8), 2.5)), torch.arange(9) / 8, atol=1e-6)
    raw = torch.randn(4, 3, 32)
    vertices = vertices_from(raw)
    assert vertices.shape == (4, 3, 33)
    assert bool((vertices[..., 0] == 0).all()) and bool((vertices[..., -1] == 1).all())
    assert bool((vertices.diff(dim=-1) > 0).all())
    assert torch.allclose(vertices.diff(dim=-1), raw.softmax(-1), atol=1e-6)
    raw = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(vertices_from, (raw,))


@torch.no_grad()
def test_starts_as_a_scaled_identity_on_the_uniform_lattice() -> None:
    torch.manual_seed(1)
    model, x = AdaInt(lut_size=9).eval(), torch.rand(2, 3, 37, 53)
    tables, vertices = model.tables_for(x)
    assert vertices is not None and torch.allclose(vertices, (torch.arange(9) / 8).expand(2, 3, -1), atol=1e-6)
    weights = model.lut_generator.weights_generator(model.backbone(x))
    assert torch.allclose(model(x), x * weights[:, :1, None, None], atol=1e-6)  # the other tables are zero
    assert torch.allclose(model(x), apply_lut(x, tables), atol=1e-5)
    assert torch.allclose(model(x), model.requires_grad_(False)(x))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["trilinear", "tetrahedral"])
def test_is_one_lookup_in_mixed_tables_at_own_vertices(mode: str) -> None:
    torch.manual_seed(2)
    model, x = moved(interpolation=mode), torch.rand(3, 3, 20, 31)
    weights = model.lut_generator.weights_generator(model.backbone(x))
    tables, vertices = model.tables_for(x)
    mixed = sum(w[:, None, None, None, None] * t for w, t in zip(weights.T, model.lut_generator.tables(), strict=True))
    assert torch.allclose(tables, mixed, atol=1e-6)
    assert vertices is not None and not torch.allclose(vertices[0], vertices[1])
    assert torch.allclose(model(x), apply_lut(x, mixed, mode, vertices=vertices), atol=1e-6)
    assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-5)
    uniform = (torch.arange(5) / 4).expand(3, -1)
    assert not torch.allclose(model(x), apply_lut(x, mixed, mode, vertices=uniform), atol=1e-3)


@torch.no_grad()
def test_shared_and_fixed_lattices() -> None:
    torch.manual_seed(3)
    x = torch.rand(1, 3, 16, 16)
    _, vertices = moved(share=True).tables_for(x)
    assert vertices is not None and bool((vertices == vertices[:, :1]).all())
    fixed = moved(adaptive=False)
    tables, vertices = fixed.tables_for(x)
    assert vertices is None and fixed.param_groups() == []
    assert torch.equal(fixed(x), apply_lut(x, tables))


def test_penalties() -> None:
    torch.manual_seed(4)
    model, x = moved(lambda_sparse=0.5, lambda_smooth=2.0, lambda_mono=3.0), torch.rand(2, 3, 16, 16)
    assert model.regularisers()["lut_sparse"].item() == 0
    model(x)
    terms = model.regularisers()
    weights = model.lut_generator.weights_generator(model.backbone(x))
    assert torch.allclose(terms["lut_sparse"], 0.5 * weights.square().mean())
    tables = model.lut_generator.tables()
    smooth = sum(t.diff(dim=axis).square().mean() for t in tables for axis in (1, 2, 3))
    assert torch.allclose(terms["lut_smooth"], 2.0 * smooth)
    assert torch.allclose(terms["lut_mono"], 3.0 * sum(monotonicity(t) for t in tables))
    terms["lut_sparse"].backward()
    assert model.lut_generator.weights_generator.weight.grad is not None
    assert set(AdaInt(lut_size=3).regularisers()) == {"lut_sparse", "lut_mono"}
    copy.deepcopy(model)  # what is remembered must not be in the way


def test_group_of_the_interval_layer() -> None:
    model = AdaInt(lut_size=3)
    (group,) = model.param_groups()
    assert model.adaint is not None
    assert [id(p) for p in group["params"]] == [id(p) for p in model.adaint.parameters()]
    assert (group["lr_factor"], group["hold_epochs"], group["hold_share"]) == (0.1, 5.0, 0.0125)


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (300, 40)])
def test_any_size_and_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(5)
    model = moved().train()
    x = torch.rand(2, 3, *size)
    y = model(x)
    assert y.shape == x.shape
    (y.square().mean() + sum(model.regularisers().values())).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    used = [n for n, p in model.named_parameters() if p.grad.abs().sum() > 0]
    assert "adaint.intervals_generator.weight" in used and "lut_generator.basis_luts_bank.weight" in used


@torch.no_grad()
def test_grey_images_and_autocast() -> None:
    torch.manual_seed(6)
    model = moved(in_channels=1)
    x = torch.rand(2, 1, 8, 8)
    y = model(x)
    assert y.shape == x.shape
    model.in_channels = 3
    assert torch.allclose(model(x.expand(2, 3, 8, 8)).mean(1, keepdim=True), y)
    with torch.autocast("cpu", torch.bfloat16):
        tables, vertices = model.tables_for(x.expand(2, 3, 8, 8))
    assert vertices is not None and tables.dtype == vertices.dtype == torch.float32


@torch.no_grad()
def test_cube_files_get_a_uniform_grid(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model, x = moved(), torch.rand(1, 3, 16, 16)
    errors = []
    for size in (9, 129):
        table = model.table_for(x, size)
        assert table.shape == (1, 3, size, size, size)
        errors.append((apply_lut(x, table) - model(x)).abs().max().item())
    assert errors[1] < 0.2 * errors[0]
    nodes = (torch.randint(0, 9, (1, 3, 16, 16)) / 8).clamp(0, 1)
    tables, vertices = model.tables_for(x)
    exact = apply_lut(nodes, tables, vertices=vertices)
    assert torch.allclose(apply_lut(nodes, model.table_for(x, 9)), exact, atol=1e-6)  # at the grid's nodes
    write_cube(tmp_path / "look.cube", Cube(model.table_for(x, 9)[0]))
    assert torch.allclose(read_cube(tmp_path / "look.cube").apply(nodes), exact, atol=1e-6)


def test_vertices_learn_where_a_curve_bends() -> None:
    """Steep below 0.1, flat above: more of the few nodes have to stand in the shadows."""
    torch.manual_seed(8)
    model = AdaInt(lut_size=4, luts=1, dropout=0.0)
    assert model.adaint is not None
    bend = model.adaint.intervals_generator.bias
    tables = model.lut_generator.basis_luts_bank.weight
    optimizer = torch.optim.Adam([{"params": [bend], "lr": 0.05}, {"params": [tables], "lr": 0.02}])
    model.lut_generator.weights_generator.requires_grad_(False)
    x = torch.rand(1, 3, 40, 40)
    target = (x / 0.1).clamp(max=1.0)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _, vertices = model.tables_for(x)
    assert vertices is not None and bool((vertices[0, :, 1] < 0.25).all())  # 1/3 at the start
    assert losses[-1] < 0.25 * losses[0]


def test_released_files(tmp_path: Path) -> None:
    torch.manual_seed(9)
    x = torch.rand(1, 3, 12, 12)
    for options in ({}, {"share": True, "luts": 2}, {"adaptive": False}):
        model = moved(**options)
        state = model.state_dict()
        save_file(state, tmp_path / "own.safetensors")
        extra = {"cnt_iters": torch.zeros(1)}
        torch.save({"state_dict": {**state, **extra}, "meta": {"iter": 3}}, tmp_path / "theirs.pth")
        other = AdaInt(lut_size=5, **options).eval()
        assert load_weights(other, tmp_path / "own.safetensors") == []
        loaded = AdaInt.from_official(tmp_path / "theirs.pth")
        assert not loaded.training
        assert torch.equal(other(x), model(x)) and torch.equal(loaded(x), model(x))
    save_file({"a": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="does not hold an AdaInt model"):
        AdaInt.from_official(tmp_path / "wrong.safetensors")
    state["backbone.0.0.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match="does not fit AdaInt: backbone.0.0.weight differ"):
        AdaInt.from_official(tmp_path / "shape.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 4}, "model=adaint needs RGB or grey images"),
        ({"luts": 0}, "model.luts=0"),
        ({"lut_size": 1}, "model.lut_size=1"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"interpolation": "cubic"}, "unknown model.interpolation 'cubic'"),
        ({"backbone": "resnet"}, "unknown model.backbone 'resnet'"),
        ({"pretrained": True}, "model.pretrained=true is for model.backbone=resnet18"),
        ({"lambda_sparse": -1.0}, "model.lambda_sparse=-1.0"),
        ({"lambda_smooth": -1.0}, "model.lambda_smooth=-1.0"),
        ({"lr_factor": -0.1}, "model.lr_factor=-0.1"),
        ({"hold_epochs": -1}, "model.hold_epochs=-1"),
        ({"hold_share": 1.5}, "model.hold_share=1.5"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdaInt(**options)


def test_pretrained_weights_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="needs torchvision's resnet18-f37072fd.pth"):
        AdaInt(backbone="resnet18", pretrained=True)
    assert isinstance(AdaInt(lut_size=2).backbone, nn.Sequential)
