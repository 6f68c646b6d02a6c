"""Canny edges on pictures whose edges are known, and hysteresis against flood filling."""

from __future__ import annotations

import pytest
import torch

from filtrun.lut.edges import canny, luma


def test_luma() -> None:
    primaries = torch.eye(3).view(1, 3, 1, 3)
    assert luma(primaries).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


@pytest.mark.parametrize("turn", [0, 1])
def test_a_line_is_one_pixel_wide_on_each_side(turn: int) -> None:
    x = torch.zeros(1, 1, 20, 24)
    x[..., 10:11] = 1.0  # a bright line: its two flanks are edges, the line itself is flat
    x = x.transpose(2, 3) if turn else x
    edges = canny(x)
    edges = edges.transpose(2, 3) if turn else edges
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert edges[0, 0, 8].nonzero().flatten().tolist() == [9, 11]
    assert torch.equal(edges[0, 0, 8], edges[0, 0, 12])


def test_flat_and_faint_pictures_have_no_edges() -> None:
    assert float(canny(torch.full((2, 1, 9, 9), 0.7)).sum()) == 0
    ramp = torch.linspace(0, 0.1, 32).expand(1, 1, 32, 32)
    assert float(canny(ramp).sum()) == 0


def test_hysteresis_follows_weak_edges_from_strong_ones() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 1, 40, 40)
    x = torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
    weak, strong = canny(x, 0.2, 0.2) > 0, canny(x, 0.6, 0.6) > 0
    found, queue = strong[0, 0].clone(), strong[0, 0].nonzero().tolist()
    while queue:
        i, j = queue.pop()
        for a in range(max(i - 1, 0), min(i + 2, 40)):
            for b in range(max(j - 1, 0), min(j + 2, 40)):
                if weak[0, 0, a, b] and not found[a, b]:
                    found[a, b] = True
                    queue.append([a, b])
    assert torch.equal(canny(x, 0.2, 0.6)[0, 0] > 0, found)
    assert int(strong.sum()) < int(found.sum()) < int(weak.sum())


def test_tiny_images_batches_and_dtype() -> None:
    assert canny(torch.rand(1, 1, 2, 2)).shape == (1, 1, 2, 2)
    x = torch.rand(3, 1, 12, 15)
    assert torch.equal(canny(x)[1:2], canny(x[1:2]))
    assert canny(x.bfloat16()).dtype == torch.bfloat16
    assert not canny(x.requires_grad_()).requires_grad
