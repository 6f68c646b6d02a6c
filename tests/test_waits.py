"""What a watch sees of operations whose meaning on a GPU is known, and that numbers are what they are without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.constants import constant
from filtrun.waits import DEVICE, HOST, Watch


def seen(work: Callable[[Tensor, Tensor], Any]) -> list[str]:
    """``kind operation`` of each event of some work on a (4, 3) tensor of the device and one of the host."""
    with Watch() as watch:
        there, here = torch.rand(4, 3, device=DEVICE), torch.rand(4, 3)
        work(there, here)
    return [f"{event.kind} {event.operation}" for event in watch.events]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x, h: x.sum().item(), "waits item"),
        (lambda x, h: float(x.sum()), "waits item"),
        (lambda x, h: x.any() and 1, "waits item"),
        (lambda x, h: x.tolist(), "waits tolist"),
        (lambda x, h: x.nonzero(), "waits nonzero"),
        (lambda x, h: torch.where(x > 0), "waits nonzero"),
        (lambda x, h: x[x > 0.5], "waits index with a mask"),
        (lambda x, h: x.masked_select(x > 0.5), "waits masked_select"),
        (lambda x, h: x.index_put_((x >= 0,), x.flatten() + 1), "waits index_put_ with a mask"),
        (lambda x, h: x[[0, 2]], "waits index with indices of the host"),
        (lambda x, h: x[torch.arange(2)], "waits index with indices of the host"),
        (lambda x, h: x.unique(), "waits _unique2"),
        (lambda x, h: torch.equal(x, x), "waits equal"),
        (lambda x, h: x.cpu(), "waits copy to the host"),
        (lambda x, h: x.to("cpu"), "waits copy to the host"),
        (lambda x, h: h.to(x.device), "waits copy to the device"),
        (lambda x, h: h.to(x), "waits copy to the device"),
        (lambda x, h: x.copy_(h), "waits copy_ between host and device"),
        (lambda x, h: torch.tensor([1.0], device=x.device), "waits tensor of values of the host"),
        (lambda x, h: torch.as_tensor(1.0, device=x.device), "waits as_tensor of values of the host"),
        (lambda x, h: x.new_tensor([1.0]), "waits new_tensor of values of the host"),
        (lambda x, h: torch.linalg.svdvals(x), "waits _linalg_svd"),
        (lambda x, h: x + h, "mixes add"),
        (lambda x, h: h[x[:, 0].long()], "mixes index"),
        (lambda x, h: F.linear(x, h), "mixes mm"),
        (lambda x, h: torch.rand(2, device=x.device, generator=torch.Generator()), "mixes rand with a generator"),
        (lambda x, h: torch.rand(2, generator=torch.Generator(x.device)), "mixes rand with a generator"),
        (lambda x, h: x.numpy(), "reads numpy"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_do_is_noted(work: Callable[[Tensor, Tensor], Any], expected: str) -> None:
    found = seen(work)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_what_goes_on_without_waiting_is_not() -> None:
    def work(x: Tensor, h: Tensor) -> None:
        x * 2.0 + torch.tensor(3.0)  # a scalar of the host goes into the kernel
        torch.full((3,), 2.0, device=x.device)
        torch.arange(3, device=x.device)
        x.new_zeros(3) + torch.zeros(3, device=x.device)
        x[x > 0.5] = 1.0
        x[0, 1] = 2.0
        x[torch.arange(2, device=x.device)]
        torch.where(x > 0.5, x, 0.0)
        h.to(x.device, non_blocking=True) + x
        x.to(x.device).to(torch.float64).to(DEVICE)
        torch.randn(3, device=x.device, generator=torch.Generator(x.device))
        h.tolist(), h.numpy(), h[h > 0.5], float(h.sum()), torch.randperm(3).tolist()
        nn.utils.clip_grad_norm_([nn.Parameter(x)], 1.0)

    assert seen(work) == []


def test_devices_are_told_to_whoever_asks() -> None:
    with Watch():
        here, there = torch.zeros(2), torch.zeros(2, device=DEVICE)
        layer = nn.Linear(2, 2)
        assert (here.device, there.device, (there + 1).device, there[:1].device) == (HOST, DEVICE, DEVICE, DEVICE)
        assert layer.weight.device == HOST
        layer.to(DEVICE)
        assert layer.weight.device == copy.deepcopy(layer).weight.device == layer(there).device == DEVICE
        assert there.cpu().device == HOST and there.to(here.device).device == HOST
        assert there.to(DEVICE) is there
    assert there.device == HOST, "outside the watch they are the CPU's"


def test_the_line_the_function_and_the_step_are_named() -> None:
    with Watch() as watch:
        watch.step = 7
        torch.zeros((), device=DEVICE).item()
    (event,) = watch.events
    assert (event.module, event.step) == (__name__, 7)
    assert event.function == "test_the_line_the_function_and_the_step_are_named"
    assert str(event) == f"{__name__}:{event.line} {event.function}: item waits for the device (step 7)"


class Halved(torch.autograd.Function):
    """Waits in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert grad.device == DEVICE
        return grad * torch.tensor(0.5, device=grad.device)


def test_the_backward_of_a_custom_function_is_seen() -> None:
    with Watch() as watch:
        x = torch.ones(3, device=DEVICE, requires_grad=True)
        Halved.apply(x).sum().backward()
    assert [event.function for event in watch.events] == ["Halved.backward"]
    assert x.grad is not None and x.grad.tolist() == [0.5] * 3


def trained() -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(16, 5, device=DEVICE)), torch.arange(16, device=DEVICE) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_numbers_are_what_they_are_without_it() -> None:
    with Watch() as watch:
        watched = trained()
    assert torch.equal(watched, trained())
    assert {(event.kind, event.operation) for event in watch.events} == {("waits", "copy to the device")}


def test_a_constant_is_copied_once_and_may_need_gradients() -> None:
    with torch.inference_mode():
        first = constant((1.0, 2.5), torch.float32, HOST)
    assert constant((1.0, 2.5), torch.float32, HOST) is first
    assert torch.equal(first, torch.tensor([1.0, 2.5]))
    assert constant((1.0, 2.5), torch.float64, HOST).dtype == torch.float64
    x = torch.ones(2, requires_grad=True)
    (x * first).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.5]
    made = torch.func.vmap(lambda v: v * constant((3.0, 4.0), torch.float32, HOST))(torch.ones(2, 2))
    assert torch.equal(made, torch.tensor([[3.0, 4.0]] * 2))
    assert torch.equal(constant((3.0, 4.0), torch.float32, HOST), torch.tensor([3.0, 4.0])), "none of vmap's own"
