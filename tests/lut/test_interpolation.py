"""Lookups against slow loops in float64, exactness at nodes, gradients, domains, dtypes and bad arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from filtrun.errors import UserError
from filtrun.lut.interpolation import apply_lut, grid_lookup, identity_lut

MODES = ("trilinear", "tetrahedral")


def slow(colour: list[float], lut: Tensor, mode: str) -> list[float]:
    """One colour through one table, by the textbook."""
    size = lut.shape[-1]
    cell, frac = [], []
    for value in colour:
        place = min(max(value, 0.0), 1.0) * (size - 1)
        cell.append(min(int(math.floor(place)), size - 2))
        frac.append(place - cell[-1])

    def node(r: int, g: int, b: int, c: int) -> float:
        return float(lut[c, cell[2] + b, cell[1] + g, cell[0] + r])

    out = []
    for c in range(lut.shape[0]):
        if mode == "trilinear":
            total = 0.0
            for corner in itertools.product((0, 1), repeat=3):
                weight = math.prod(f if bit else 1 - f for bit, f in zip(corner, frac, strict=True))
                total += weight * node(*corner, c)
        else:  # walk from the first corner to the last, along the largest fraction first
            order = sorted(range(3), key=lambda axis: -frac[axis])
            at = [0, 0, 0]
            here = total = node(*at, c)
            for axis in order:
                at[axis] = 1
                there = node(*at, c)
                total += frac[axis] * (there - here)
                here = there
        out.append(total)
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3, 4, 7, 17])
def test_equals_a_slow_loop(mode: str, size: int) -> None:
    torch.manual_seed(size)
    image = torch.rand(2, 3, 5, 7, dtype=torch.float64) * 1.4 - 0.2
    image[0, :, 0, 0] = 0.3  # a grey: all fractions equal
    image[0, :, 0, 1] = torch.tensor([0.2, 0.6, 0.2])
    lut = torch.rand(2, 3, size, size, size, dtype=torch.float64)
    for tables in (lut, lut[0]):
        y = apply_lut(image, tables, mode)
        for n, i, j in itertools.product(range(2), range(5), range(7)):
            table = tables[n] if tables.dim() == 5 else tables
            expected = slow(image[n, :, i, j].tolist(), table, mode)
            assert y[n, :, i, j].tolist() == pytest.approx(expected, abs=1e-14)
        assert torch.equal(y.float(), apply_lut(image, tables, mode).float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", range(2, 34))
def test_nodes_and_identity(mode: str, size: int) -> None:
    torch.manual_seed(size)
    lut = torch.rand(3, size, size, size)
    nodes = identity_lut(size).reshape(1, 3, size * size, size)  # every node's own colour, in the table's order
    y = apply_lut(nodes, lut, mode).reshape(lut.shape)
    whole = (nodes * (size - 1) == (nodes * (size - 1)).round()).all(dim=1).reshape(size, size, size)
    assert torch.equal(y[:, whole], lut[:, whole])
    assert (y - lut).abs().max() <= 3 * 2**-24 * (size - 1)  # half an ulp of value * (D - 1) on each axis
    if size in (2, 3, 5, 9, 17, 33):  # powers of two: no rounding at all
        assert bool(whole.all())
    image = torch.rand(1, 3, 37, 53)
    assert (apply_lut(image, identity_lut(size), mode) - image).abs().max() <= 3e-7


def test_axis_order_and_identity_values() -> None:
    lut = identity_lut(3, dtype=torch.float64)
    assert lut[:, 2, 1, 0].tolist() == [0.0, 0.5, 1.0]  # [c, b, g, r]
    lut = torch.zeros(3, 2, 2, 2)
    lut[0, 0, 0, 1], lut[1, 0, 1, 0], lut[2, 1, 0, 0] = 1.0, 2.0, 3.0
    primaries = torch.eye(3).view(1, 3, 1, 3)  # pixels: pure red, green, blue
    assert torch.equal(apply_lut(primaries, lut)[0, :, 0], torch.diag(torch.tensor([1.0, 2.0, 3.0])))


def test_tetrahedral_is_exact_for_planes_and_keeps_greys() -> None:
    torch.manual_seed(0)
    lut = identity_lut(5, dtype=torch.float64)
    lut = torch.einsum("cd,dbgr->cbgr", torch.rand(3, 3, dtype=torch.float64), lut) + 0.1
    image = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    assert torch.allclose(apply_lut(image, lut, "tetrahedral"), apply_lut(image, lut), atol=1e-14)
    rough = torch.rand(1, 4, 4, 4, dtype=torch.float64).expand(3, 4, 4, 4)  # equal channels give greys for greys
    y = apply_lut(torch.rand(1, 1, 9, 9, dtype=torch.float64).expand(1, 3, 9, 9), rough, "tetrahedral")
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode: str) -> None:
    torch.manual_seed(1)
    image = (torch.rand(2, 3, 3, 4, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()
    for shape in ((3, 4, 4, 4), (2, 3, 3, 3, 3), (5, 2, 2, 2)):
        lut = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, t: apply_lut(x, t, mode), (image, lut))
    outside = torch.tensor([-0.2, 1.3, 0.5]).view(1, 3, 1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(apply_lut(outside, identity_lut(4), mode).sum(), outside)
    assert gradient.flatten().tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    image, lut = torch.rand(3, 3, 11, 13), torch.rand(3, 3, 6, 6, 6)
    for mode in MODES:
        results = []
        for chunk in (7, 1 << 15):
            monkeypatch.setattr("filtrun.lut.lattice.CHUNK", chunk)
            x, t = image.clone().requires_grad_(), lut.clone().requires_grad_()
            y = apply_lut(x, t, mode)
            y.square().sum().backward()
            results.append((y, x.grad, t.grad))
        assert torch.equal(results[0][0], results[1][0])
        for one, two in zip(results[0][1:], results[1][1:], strict=True):
            assert torch.allclose(one, two, atol=1e-4)


def test_grid_sample_path_agrees() -> None:
    torch.manual_seed(3)
    image = torch.rand(2, 3, 10, 9, dtype=torch.float64) * 1.2 - 0.1
    for shape in ((3, 6, 6, 6), (2, 3, 6, 6, 6)):
        lut = torch.rand(shape, dtype=torch.float64)
        assert torch.allclose(grid_lookup(image, lut), apply_lut(image, lut), atol=1e-13)


def test_domain_rescales_the_input() -> None:
    torch.manual_seed(4)
    lut, unit = torch.rand(3, 5, 5, 5, dtype=torch.float64), torch.rand(1, 3, 6, 6, dtype=torch.float64)
    low, high = [-1.0, 0.0, 0.5], [1.0, 4.0, 2.5]
    start, end = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (low, high))
    y = apply_lut(unit * (end - start) + start, lut, domain_min=low, domain_max=high)
    assert torch.allclose(y, apply_lut(unit, lut), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(5)
    image, lut = torch.rand(1, 3, 8, 8).to(dtype), torch.rand(3, 9, 9, 9)
    y = apply_lut(image, lut, mode)
    assert y.dtype == dtype
    assert torch.equal(y, apply_lut(image.float(), lut, mode).to(dtype))
    lut.requires_grad_()
    apply_lut(image, lut.to(dtype), mode).sum().backward()
    assert lut.grad is not None and lut.grad.sum() == pytest.approx(3 * 64, rel=1e-2)


def test_nan_empty_and_output_channels() -> None:
    image = torch.full((1, 3, 1, 2), 0.5)
    image[0, 1, 0, 0] = float("nan")
    for mode in MODES:
        y = apply_lut(image, identity_lut(5), mode)
        assert bool(y[..., 0].isnan().any()) and y[..., 1].flatten().tolist() == [0.5] * 3
    assert apply_lut(torch.rand(2, 3, 0, 4), torch.rand(6, 3, 3, 3)).shape == (2, 6, 0, 4)
    stacked = torch.rand(6, 3, 3, 3)
    image = torch.rand(2, 3, 4, 4)
    assert torch.equal(apply_lut(image, stacked)[:, 3:], apply_lut(image, stacked[3:]))


@pytest.mark.parametrize(
    ("shape", "lut", "options", "message"),
    [
        ((1, 3, 4, 4), (3, 4, 4, 4), {"interpolation": "trilinar"}, "did you mean 'trilinear'"),
        ((1, 1, 4, 4), (3, 4, 4, 4), {}, "needs RGB images"),
        ((3, 4, 4), (3, 4, 4, 4), {}, "needs RGB images"),
        ((1, 3, 4, 4), (3, 4, 4, 5), {}, r"D >= 2, not \(3, 4, 4, 5\)"),
        ((1, 3, 4, 4), (3, 1, 1, 1), {}, "D >= 2"),
        ((2, 3, 4, 4), (3, 3, 4, 4, 4), {}, "3 tables for 2 images"),
        ((1, 3, 4, 4), (3, 4, 4, 4), {"domain_min": (0, 0, 1)}, "must be below domain_max"),
    ],
)
def test_bad_arguments(shape: tuple, lut: tuple, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_lut(torch.rand(shape), torch.rand(lut), **options)


def test_bad_dtype_and_size() -> None:
    with pytest.raises(UserError, match="needs float images"):
        apply_lut(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), identity_lut(3))
    with pytest.raises(UserError, match="2 or more nodes"):
        identity_lut(1)
