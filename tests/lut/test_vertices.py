"""Lookups at given vertices: a slow loop, the uniform lattice, gradients by differences, bins, bad arguments."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left

import numpy as np
import pytest
import torch
from torch import Tensor

from filtrun.errors import UserError
from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.lut.lattice import Lattice


def some_vertices(*shape: int, dtype: torch.dtype = torch.float64, narrow: float = 1.0) -> Tensor:
    """(*shape, D): from 0 to 1, uneven."""
    inner = (narrow * torch.randn(*shape[:-1], shape[-1] - 1, dtype=dtype)).softmax(-1).cumsum(-1)[..., :-1]
    return torch.cat([torch.zeros(*shape[:-1], 1, dtype=dtype), inner, torch.ones(*shape[:-1], 1, dtype=dtype)], dim=-1)


def slow(colour: list[float], lut: Tensor, vertices: list[list[float]]) -> list[float]:
    """One colour, trilinear, by bisection."""
    cell, frac = [], []
    for value, nodes in zip(colour, vertices, strict=True):
        k = min(max(bisect_left(nodes, value) - 1, 0), len(nodes) - 2)
        cell.append(k)
        frac.append(min(max((value - nodes[k]) / (nodes[k + 1] - nodes[k]), 0.0), 1.0))
    out = []
    for table in lut:
        total = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            weight = math.prod(f if bit else 1 - f for bit, f in zip(corner, frac, strict=True))
            r, g, b = (k + bit for k, bit in zip(cell, corner, strict=True))
            total += weight * float(table[b, g, r])
        out.append(total)
    return out


@pytest.mark.parametrize("size", [2, 3, 9])
def test_equals_a_slow_loop(size: int) -> None:
    torch.manual_seed(size)
    image = torch.rand(2, 3, 5, 4, dtype=torch.float64) * 1.4 - 0.2
    lut, vertices = torch.rand(2, 3, size, size, size, dtype=torch.float64), some_vertices(2, 3, size)
    image[0, :, 0, 0] = vertices[0, :, size // 2]
    for tables, nodes in itertools.product((lut, lut[0]), (vertices, vertices[1])):
        y = apply_lut(image, tables, vertices=nodes)
        for n, i, j in itertools.product(range(2), range(5), range(4)):
            table = tables[n] if tables.dim() == 5 else tables
            own = (nodes[n] if nodes.dim() == 3 else nodes).tolist()
            assert y[n, :, i, j].tolist() == pytest.approx(slow(image[n, :, i, j].tolist(), table, own), abs=1e-14)


@pytest.mark.parametrize("mode", ["trilinear", "tetrahedral"])
def test_is_a_uniform_lookup_after_a_warp_of_each_channel(mode: str) -> None:
    torch.manual_seed(0)
    size, image = 7, torch.rand(1, 3, 20, 20, dtype=torch.float64)
    lut, vertices = torch.rand(3, size, size, size, dtype=torch.float64), some_vertices(3, size)
    warped = [
        np.interp(c.numpy(), v.numpy(), np.arange(size) / (size - 1)) for c, v in zip(image[0], vertices, strict=True)
    ]
    expected = apply_lut(torch.from_numpy(np.stack(warped))[None], lut, mode)
    assert torch.allclose(apply_lut(image, lut, mode, vertices=vertices), expected, atol=1e-13)
    uniform = (torch.arange(size, dtype=torch.float64) / (size - 1)).expand(3, -1)
    assert torch.allclose(apply_lut(image, lut, mode, vertices=uniform), apply_lut(image, lut, mode), atol=1e-13)


def test_table_values_come_back_exactly_at_vertices_and_ends() -> None:
    torch.manual_seed(1)
    for size in (2, 6, 33):
        lut, vertices = torch.rand(3, size, size, size), some_vertices(3, size, dtype=torch.float32)
        blue, green, red = torch.meshgrid(vertices[2], vertices[1], vertices[0], indexing="ij")
        nodes = torch.stack([red, green, blue]).reshape(1, 3, size * size, size)
        assert torch.equal(apply_lut(nodes, lut, vertices=vertices).reshape(lut.shape), lut)
        ends = torch.tensor([-3.0, 7.0]).expand(1, 3, 1, 2)
        assert torch.equal(
            apply_lut(ends, lut, vertices=vertices)[0, :, 0].T, torch.stack([lut[:, 0, 0, 0], lut[:, -1, -1, -1]])
        )


@pytest.mark.parametrize("mode", ["trilinear", "tetrahedral"])
def test_gradients_to_image_table_and_vertices(mode: str) -> None:
    torch.manual_seed(2)
    image = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    for tables, nodes in (((1, 4, 4, 4), (2, 3, 4)), ((2, 2, 3, 3, 3), (3, 3)), ((2, 1, 4, 4, 4), (2, 3, 4))):
        lut = torch.rand(tables, dtype=torch.float64, requires_grad=True)
        vertices = some_vertices(*nodes).requires_grad_()
        leaves = (image, lut, vertices)
        assert torch.autograd.gradcheck(lambda x, t, v: apply_lut(x, t, mode, vertices=v), leaves, fast_mode=True)
    (gradient,) = torch.autograd.grad(apply_lut(image.detach(), lut.detach(), mode, vertices=vertices).sum(), vertices)
    assert bool((gradient != 0).any())  # also when the vertices alone want it


def test_the_vertex_gradient_by_hand() -> None:
    """One axis in use: f = (x - p) / (q - p) times a jump of 1."""
    lut = identity_lut(2, dtype=torch.float64)
    vertices = torch.tensor([[0.2, 0.8], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64).view(1, 3, 1, 1)
    (gradient,) = torch.autograd.grad(apply_lut(x, lut, vertices=vertices)[0, 0].sum(), vertices)
    assert gradient.tolist() == [pytest.approx([-0.5 / 0.6, -0.5 / 0.6]), [0.0, 0.0], [0.0, 0.0]]


def test_the_image_is_left_as_it_was_and_nan_stays() -> None:
    torch.manual_seed(3)
    image, vertices = torch.rand(1, 3, 200, 200), some_vertices(3, 5, dtype=torch.float32)
    image[0, 0, 0, 0] = torch.nan
    before = image.clone()
    y = apply_lut(image, identity_lut(5), vertices=vertices)
    assert torch.equal(image.nan_to_num(9), before.nan_to_num(9))
    assert y[0, :, 0, 0].isnan().all() and int(y.isnan().sum()) == 3


@pytest.mark.parametrize("narrow", [0.5, 3.0])
def test_large_images_search_in_bins_and_find_the_same(narrow: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    image, lut = torch.rand(2, 3, 140, 150), torch.rand(2, 3, 33, 33, 33)
    vertices = some_vertices(2, 3, 33, dtype=torch.float32, narrow=narrow)  # 3.0: several vertices share a bin
    image[0, :, 0, :33] = vertices[0]
    image[0, :, 1, :5] = torch.tensor([-1.0, 0.0, 1.0, 2.0, 0.5])
    lattice = Lattice(image, lut, vertices)
    assert lattice.searches is not None and (narrow < 1 or lattice.searches[0].steps > 1)
    results = []
    for bins, chunk in ((1024, 1 << 15), (10**9, 1 << 15), (1024, 1000)):
        monkeypatch.setattr("filtrun.lut.lattice.BINS", bins)
        monkeypatch.setattr("filtrun.lut.lattice.CHUNK", chunk)
        leaves = [t.clone().requires_grad_() for t in (image, lut, vertices)]
        y = apply_lut(leaves[0], leaves[1], vertices=leaves[2])
        results.append((y, *torch.autograd.grad((y * image.flip(2)).sum(), leaves)))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-3 * float(a.detach().abs().max()))


def test_vertices_in_one_place_and_half_precision() -> None:
    vertices = torch.tensor([0.0, 0.5, 0.5, 1.0]).expand(3, -1)
    assert apply_lut(torch.rand(1, 3, 9, 9).round(decimals=1), identity_lut(4), vertices=vertices).isfinite().all()
    image = torch.rand(1, 3, 4, 4, dtype=torch.bfloat16)
    assert apply_lut(image, identity_lut(4), vertices=vertices).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vertices", "more", "message"),
    [
        (torch.zeros(3, 5), {}, "D=4 are float"),
        (torch.zeros(2, 4), {}, r"float32 \(2, 4\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "int64"),
        (torch.zeros(3, 3, 4), {}, "3 sets of vertices for 2 images"),
        (torch.zeros(3, 4), {"domain_max": (2.0, 1.0, 1.0)}, "either vertices or domain_min"),
    ],
)
def test_bad_arguments(vertices: Tensor, more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_lut(torch.rand(2, 3, 4, 4), identity_lut(4), vertices=vertices, **more)
