"""Lookups in one compiled loop: the formulas against the slow path, and the compiled code against the formulas."""

from __future__ import annotations

import shutil

import pytest
import torch

from filtrun.lut import fused as module
from filtrun.lut.fused import applies, fused, fused_lookup, tetrahedral, trilinear
from filtrun.lut.interpolation import apply_lut, identity_lut

FORMULAS = {"trilinear": trilinear, "tetrahedral": tetrahedral}


def colours() -> torch.Tensor:
    """Random colours, some outside [0, 1], nodes, equal coordinates in every combination, and both ends."""
    torch.manual_seed(0)
    some = torch.rand(3, 6, 50) * 1.2 - 0.1
    nodes = torch.randint(0, 5, (3, 6, 20)) / 4
    equal = torch.rand(6, 10).expand(3, 6, 10).clone()
    two = [torch.rand(3, 6, 10) for _ in range(3)]
    for image, (a, b) in zip(two, ((0, 1), (0, 2), (1, 2)), strict=True):
        image[a] = image[b]
    ends = torch.tensor([0.0, 1.0]).expand(3, 6, 2)
    return torch.cat([some, nodes, equal, *two, ends], dim=-1)


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_formulas_are_those_of_the_chunked_lookup(kind: str) -> None:
    image = colours()
    for size, channels in ((2, 3), (5, 3), (17, 1)):
        table = torch.randn(channels, size, size, size)
        made = FORMULAS[kind](image, table.reshape(channels, -1), size)
        torch.testing.assert_close(made, apply_lut(image[None], table, kind)[0], rtol=0, atol=5e-6)
    same = FORMULAS[kind](image, identity_lut(9).reshape(3, -1), 9)
    torch.testing.assert_close(same, image.clamp(0, 1), rtol=0, atol=1e-6)
    image[0, 0, 0] = float("nan")
    made = FORMULAS[kind](image, identity_lut(9).reshape(3, -1), 9)
    assert made[0, 0, 0].isnan() and not made[:, 1:].isnan().any()


def test_only_where_it_is_asked_for_and_nothing_needs_gradients() -> None:
    image, table = torch.rand(1, 3, 4, 4), identity_lut(5)
    assert not applies(image, table, None)
    with fused():
        assert applies(image, table, None)
        assert not applies(image, table.clone().requires_grad_(), None)
        assert not applies(image.double(), table.double(), None)
        assert not applies(image, table, torch.linspace(0, 1, 5).expand(3, 5))
        with torch.no_grad():
            assert applies(image, table.clone().requires_grad_(), None)
        with fused(False):
            assert not applies(image, table, None)
    assert not module._wanted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("kind", FORMULAS)
def test_the_compiled_loop_gives_the_same(kind: str) -> None:
    images = torch.stack([colours(), colours().flip(-1)])
    one, each = torch.randn(3, 5, 5, 5), torch.randn(2, 3, 5, 5, 5)
    plain = [apply_lut(images, table, kind) for table in (one, each)]
    with torch.no_grad(), fused():
        made = [apply_lut(images, table, kind) for table in (one, each)]
        low = apply_lut(images, one, kind, domain_min=(-0.5,) * 3, domain_max=(1.5,) * 3)
    for a, b in zip(made, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    wide = apply_lut(images, one, kind, domain_min=(-0.5,) * 3, domain_max=(1.5,) * 3)
    torch.testing.assert_close(low, wide, rtol=0, atol=5e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", FORMULAS)
def test_the_kernel_gives_the_same(kind: str) -> None:
    image, table = colours()[None].cuda(), torch.randn(3, 33, 33, 33, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(fused_lookup(image, table, kind), apply_lut(image, table, kind), rtol=0, atol=2e-4)
