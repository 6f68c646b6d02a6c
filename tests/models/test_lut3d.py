"""Image-adaptive 3D LUTs: size, start, penalties, any image, released names, training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from filtrun.errors import UserError
from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.lut.regularise import monotonicity, total_variation
from filtrun.models.checkpoint import load_weights
from filtrun.models.lut3d import LUT3D


def test_parameters_and_names() -> None:
    model = LUT3D()
    assert sum(p.numel() for p in model.parameters()) == 593_516
    names = set(model.state_dict())
    assert {"lut0", "lut1", "lut2", "classifier.model.1.weight", "classifier.model.16.bias"} <= names
    assert len(names) == 23
    assert bool((model.classifier.model[16].bias == 1).all())


@torch.no_grad()
def test_starts_as_a_scaled_identity() -> None:
    torch.manual_seed(0)
    model, x = LUT3D(lut_size=5).eval(), torch.rand(2, 3, 37, 53)
    weights = model.classifier(x)
    assert torch.allclose(model(x), x * weights[:, 0].view(2, 1, 1, 1), atol=1e-6)  # the other tables are zero


@torch.no_grad()
def test_is_the_weighted_sum_of_lookups() -> None:
    torch.manual_seed(1)
    for mode in ("trilinear", "tetrahedral"):
        model, x = LUT3D(lut_size=4, interpolation=mode).eval(), torch.rand(2, 3, 20, 31)
        for table in model.tables():
            table.copy_(torch.rand_like(table))
        weights = model.classifier(x)
        parts = torch.stack([apply_lut(x, table, mode) for table in model.tables()], dim=1)
        assert torch.allclose(model(x), (weights.view(2, 3, 1, 1, 1) * parts).sum(dim=1), atol=1e-5)
        assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)
        assert torch.allclose(apply_lut(x, model.table_for(x), mode), model(x))


def test_regularisers() -> None:
    torch.manual_seed(2)
    model = LUT3D(lut_size=6, lambda_smooth=0.5, lambda_mono=3.0).eval()
    with torch.no_grad():
        model.lut1.normal_()
    tables = sum(total_variation(t) for t in model.tables())
    assert torch.allclose(model.regularisers()["lut_smooth"], 0.5 * tables)
    x = torch.rand(1, 3, 16, 16)
    weights = model.classifier(x)
    model(x)
    terms = model.regularisers()
    assert torch.allclose(terms["lut_smooth"], 0.5 * (weights.square().mean() + tables))
    assert torch.allclose(terms["lut_mono"], 3.0 * monotonicity(model.lut1))
    terms["lut_smooth"].backward()
    assert model.classifier.model[16].weight.grad is not None
    copy.deepcopy(model)  # what is remembered must not be in the way


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (37, 53), (300, 40)])
def test_any_size_and_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(3)
    model = LUT3D(lut_size=9)
    with torch.no_grad():
        for table in model.tables():
            table.add_(torch.rand_like(table))
    x = torch.rand(2, 3, *size)
    y = model(x)
    assert y.shape == x.shape
    (y.square().mean() + sum(model.regularisers().values())).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if "lut" in n)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    if min(size) > 1:
        # biases before an instance norm have no effect on the output
        some = [n for n, p in model.named_parameters() if p.grad.abs().sum() == 0]
        assert not [n for n in some if not n.endswith("bias")]


@torch.no_grad()
def test_grey_images_and_half_precision() -> None:
    model, x = LUT3D(in_channels=1, lut_size=5).eval(), torch.rand(2, 1, 8, 8)
    y = model(x)
    assert y.shape == x.shape
    model.in_channels = 3
    assert torch.allclose(model(x.expand(2, 3, 8, 8)).mean(1, keepdim=True), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.expand(2, 3, 8, 8)).isfinite().all()


def test_tables_learn_a_colour_curve() -> None:
    torch.manual_seed(4)
    model = LUT3D(lut_size=5, lambda_mono=0.01).eval()
    model.classifier.requires_grad_(False)
    optimizer = torch.optim.Adam(model.tables(), lr=2e-2)
    x = torch.rand(2, 3, 24, 24)
    target = x.sqrt()
    first = (model(x) - target).square().mean().item()
    for _ in range(30):
        loss = (model(x) - target).square().mean() + sum(model.regularisers().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x) - target).square().mean().item() < 0.05 * first


def test_released_files(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = LUT3D(lut_size=3).eval()
    with torch.no_grad():
        model.lut2.normal_()
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    theirs = {f"LUT{n[3:]}.LUT" if n.startswith("lut") else n[11:]: t for n, t in model.state_dict().items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    x = torch.rand(1, 3, 12, 12)
    other = LUT3D(lut_size=3).eval()
    assert load_weights(other, tmp_path / "own.safetensors") == []
    assert torch.equal(other(x), model(x))
    for name in ("own", "theirs"):
        loaded = LUT3D.from_official(tmp_path / f"{name}.safetensors")
        assert loaded.bin_margin == 1e-4 and not loaded.training
        loaded.bin_margin = 0.0
        assert torch.equal(loaded(x), model(x))
    nested = {name[3:-4]: {"LUT": t} for name, t in theirs.items() if name.startswith("LUT")}
    torch.save(nested, tmp_path / "LUTs.pth")
    torch.save({n: t for n, t in theirs.items() if n.startswith("model.")}, tmp_path / "classifier.pth")
    loaded = LUT3D.from_official(tmp_path)  # as it is published: two files
    loaded.bin_margin = 0.0
    assert torch.equal(loaded(x), model(x))
    torch.save({"0": {"LUT": 1}}, tmp_path / "LUTs.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        LUT3D.from_official(tmp_path)
    del theirs["model.1.weight"]
    save_file(theirs, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="does not hold an image-adaptive 3D LUT model"):
        LUT3D.from_official(tmp_path / "part.safetensors")
    theirs["model.1.weight"] = torch.zeros(1)
    save_file(theirs, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="does not fit LUT3D: classifier.model.1.weight differ"):
        LUT3D.from_official(tmp_path / "wrong.safetensors")


def test_bin_margin_is_the_released_cell_size() -> None:
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    model = LUT3D(lut_size=5, bin_margin=1e-4).double().eval()
    weight = model.classifier(x)[0, 0]
    assert torch.allclose(model(x), weight * apply_lut(x / 1.0001, identity_lut(5, dtype=x.dtype)), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 4}, "needs RGB or grey images"),
        ({"luts": 0}, "model.luts=0"),
        ({"lut_size": 1}, "model.lut_size=1"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"interpolation": "cubic"}, "unknown model.interpolation 'cubic'"),
        ({"bin_margin": -1.0}, "model.bin_margin=-1.0"),
        ({"lambda_mono": -1.0}, "model.lambda_mono=-1.0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LUT3D(**options)
