"""Curves per channel: numpy's interp, gradients by differences, chunks, bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from filtrun.errors import UserError
from filtrun.lut.curves import apply_curves


@pytest.mark.parametrize("size", [2, 5, 17])
def test_equals_numpy(size: int) -> None:
    torch.manual_seed(size)
    image, curves = torch.rand(2, 3, 6, 7, dtype=torch.float64) * 1.4 - 0.2, torch.rand(2, 3, size, dtype=torch.float64)
    nodes = np.arange(size) / (size - 1)
    for given in (curves, curves[0]):
        own = given.expand(2, -1, -1)
        expected = [[np.interp(image[n, c].numpy(), nodes, own[n, c].numpy()) for c in range(3)] for n in range(2)]
        assert torch.allclose(apply_curves(image, given), torch.from_numpy(np.array(expected)), atol=1e-14)


def test_line_and_nodes() -> None:
    line = (torch.arange(17) / 16).expand(3, -1)
    image = torch.rand(1, 3, 8, 8)
    assert torch.allclose(apply_curves(image, line), image, atol=1e-7)
    values = torch.rand(3, 17)
    assert torch.equal(apply_curves(line.view(1, 3, 1, 17), values), values.view(1, 3, 1, 17))
    assert apply_curves(torch.full((1, 3, 1, 1), torch.nan), values).isnan().all()
    assert apply_curves(torch.empty(0, 3, 4, 4), values).shape == (0, 3, 4, 4)
    assert apply_curves(image.half(), values).dtype == torch.float16


def test_gradients() -> None:
    torch.manual_seed(0)
    image = (torch.rand(2, 3, 2, 3, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()
    for shape in ((3, 6), (2, 3, 6), (3, 2)):
        curves = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(apply_curves, (image, curves), fast_mode=True)
    (gradient,) = torch.autograd.grad(apply_curves(image.detach(), curves).sum(), curves)
    assert gradient.sum().item() == pytest.approx(image.numel())  # weights of a pixel add up to one


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    image, curves, results = torch.rand(2, 3, 11, 13), torch.rand(2, 3, 9), []
    for chunk in (7, 1 << 15):
        monkeypatch.setattr("filtrun.lut.curves.CHUNK", chunk)
        leaves = [t.clone().requires_grad_() for t in (image, curves)]
        y = apply_curves(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (4, 5), (3, 3, 5), (2, 2, 5)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"curves are \(C, D\) or \(N, C, D\)"):
        apply_curves(torch.rand(2, 3, 4, 4), torch.rand(shape))
    with pytest.raises(UserError, match="float images and tables"):
        apply_curves(torch.rand(2, 3, 4, 4), torch.ones(3, 4, dtype=torch.int64))
