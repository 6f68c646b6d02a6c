"""Pieces cover everything once, errors come through, settings of other threads stay as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.lut.workers import for_pieces


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "step"), [(10, 3), (9, 3), (1, 5), (0, 2), (100, 1)])
@pytest.mark.parametrize("parallel", [True, False])
def test_covers_everything_once(three_threads: None, count: int, step: int, parallel: bool) -> None:
    seen = torch.zeros(count)

    def work(start: int, end: int) -> None:
        assert end - start <= step and not torch.is_grad_enabled()
        seen[start:end] += 1

    for_pieces(work, count, step, parallel)
    assert bool((seen == 1).all())


def test_threads_have_one_core_each_and_calls_nest(three_threads: None) -> None:
    inner, names, cores = torch.zeros(6, 4), set(), set()

    def work(start: int, end: int) -> None:
        torch.ones(200_000).mul_(2)  # an operation torch would split
        cores.add(torch.get_num_threads())
        names.add(threading.current_thread().name)
        for_pieces(lambda a, b: inner[start, a:b].add_(1), 4, 1)

    for_pieces(work, 6, 1)
    assert cores == {1} and all(name.startswith("filtrun-lut") for name in names)
    assert bool((inner == 1).all())
    assert torch.get_num_threads() == 3


def test_errors_come_through(three_threads: None) -> None:
    def work(start: int, end: int) -> None:
        if start == 2:
            raise ValueError("piece 2")

    with pytest.raises(ValueError, match="piece 2"):
        for_pieces(work, 4, 1)


def test_lookups_in_threads_and_inference_mode(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filtrun.lut.lattice.CHUNK", 50)
    torch.manual_seed(0)
    image, lut = torch.rand(2, 3, 20, 21), torch.rand(3, 6, 6, 6)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        x, t = image.clone().requires_grad_(), lut.clone().requires_grad_()
        y = apply_lut(x, t)
        y.square().sum().backward()
        assert x.grad is not None and t.grad is not None
        results.append((y.detach(), x.grad, t.grad))
        with torch.inference_mode():
            assert torch.equal(apply_lut(image, lut), y)
            fresh = torch.rand(1, 3, 20, 20)  # an inference tensor
            assert torch.allclose(apply_lut(fresh, identity_lut(5)), fresh, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.allclose(results[0][2], results[1][2], atol=1e-4)
