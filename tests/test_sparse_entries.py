"""Positions of trained entries: kept small, given back exactly, and no different to train with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from filtrun import sparse_entries
from filtrun.sparse_entries import SMALL, ScatterEntries, owners_of, pack_positions, positions


def spread(gap: int, count: int = SMALL + 50) -> torch.Tensor:
    """Ascending positions with every gap from 1 up, and one of `gap`."""
    gaps = torch.randint(1, 20, (count,), generator=torch.Generator().manual_seed(gap))
    gaps[0], gaps[count // 2] = 0, gap
    return gaps.cumsum(0)


@pytest.mark.parametrize(
    ("gap", "dtype"),
    [(255, torch.uint8), (256, torch.int16), (40_000, torch.int32), (2**31 - 1, torch.int32), (2**31, torch.int64)],
)
def test_positions_come_back_from_the_smallest_integers_that_hold_their_gaps(gap: int, dtype: torch.dtype) -> None:
    index = spread(gap)
    packed = pack_positions(index)
    assert packed.dtype == dtype
    assert torch.equal(positions(packed), index)


def test_few_positions_are_kept_as_they_are() -> None:
    index = spread(9, SMALL)
    assert pack_positions(index) is index and positions(index) is index
    first = torch.arange(300, 300 + SMALL + 1)  # the first gap is the first position: it counts, too
    assert pack_positions(first).dtype == torch.int16 and torch.equal(positions(pack_positions(first)), first)


def test_packed_entries_train_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for small in (0, 10**9):
        monkeypatch.setattr(sparse_entries, "SMALL", small)
        torch.manual_seed(0)
        layer = nn.Linear(40, 30)
        base = layer.weight.detach().clone()
        mask = base.abs() < 0.05
        entries = ScatterEntries("weight", layer.weight, mask, owners_of(layer)[id(layer.weight)])
        assert (entries._packed.dtype == torch.uint8) == (small == 0)
        optimizer = torch.optim.AdamW([entries.values], lr=1e-2)
        for _ in range(4):
            layer(torch.randn(8, 40)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            entries.sync()
        found[small] = entries.restore().detach()
        assert torch.equal(found[small][~mask], base[~mask]) and not torch.equal(found[small][mask], base[mask])
    assert torch.equal(found[0], found[10**9])


def test_a_dense_gradient_does_not_wait_for_the_layers_before() -> None:
    """Else the dense gradients of all layers would be there at once."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    entries = []
    for name, parameter in list(layers.named_parameters()):
        mask = torch.ones_like(parameter, dtype=torch.bool)
        entries.append(ScatterEntries(name, parameter, mask, owners_of(layers)[id(parameter)]))
    done: list[list[bool]] = []
    x = torch.randn(2, 8)
    for layer in layers:
        x = layer(x)
        x.register_hook(lambda _: done.append([e.values.grad is not None for e in entries]))
    x.square().sum().backward()
    assert done == [[False] * 6, [False] * 4 + [True] * 2, [False] * 2 + [True] * 4]
