"""Gradient checkpointing: the same outputs, gradients, statistics and draws, with less kept for the backward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.bench_run import BenchRun, losses_of
from filtrun.cells import cell_digest
from filtrun.cost import saved_for_backward
from filtrun.errors import UserError
from filtrun.models.resnet import cifar_resnet
from filtrun.models.unet import UNet
from filtrun.models.vit import ViT
from filtrun.recompute import recompute_blocks


def unet() -> tuple[nn.Module, tuple[Any, ...]]:
    net = UNet(in_channels=1, num_classes=10, image_size=8, size="nano", dropout=0.3)
    nn.init.normal_(net.out.weight)
    return net, (torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4))


CASES = {
    "unet": unet,
    "resnet": lambda: (cifar_resnet(1, 10, depth=14, width=4), (torch.randn(6, 1, 8, 8),)),
    "vit": lambda: (ViT(1, 10, 8, size="nano", dropout=0.3), (torch.randn(6, 1, 8, 8),)),
}


def gradients(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    out = net(*inputs)
    out.square().sum().backward()
    torch.rand(1)
    return out.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_statistics_are_those_of_the_plain_network(name: str) -> None:
    torch.manual_seed(0)
    plain, inputs = CASES[name]()
    net = copy.deepcopy(plain)
    assert recompute_blocks(net) > 1
    for _ in range(2):  # running statistics of the second step start from those of the first
        plain.zero_grad(), net.zero_grad()
        (out, grads), (again, recomputed) = gradients(plain, inputs), gradients(net, inputs)
        assert torch.equal(out, again) and grads.keys() == recomputed.keys()
        for key, expected in grads.items():
            torch.testing.assert_close(recomputed[key], expected, atol=1e-6, rtol=1e-6)
    for (key, one), two in zip(plain.named_buffers(), net.buffers(), strict=True):
        assert torch.equal(one, two), key
    assert net.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(3)
    plain.train(), plain(*inputs)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    net(*inputs).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)  # recomputing draws nothing new


def test_dropout_is_drawn_again_as_it_was() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)) for _ in range(2)))

    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    plain = nn.Sequential(*(Block(part) for part in net))
    other = copy.deepcopy(plain)
    assert recompute_blocks(other) == 2
    (_, expected), (_, found) = (gradients(m, (torch.ones(3, 8),)) for m in (plain, other))
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_less_is_kept_for_the_backward_pass() -> None:
    net = cifar_resnet(3, 10, depth=44, width=8)
    x = torch.randn(8, 3, 16, 16)
    before = saved_for_backward(lambda: net(x), net)
    assert recompute_blocks(net) == 21
    after = saved_for_backward(lambda: net(x), net)  # the blocks' inputs are among them
    assert 21 * 2048 * 4 < after < 0.3 * before


def test_a_copy_recomputes_with_its_own_weights() -> None:
    net = cifar_resnet(1, 10, depth=8, width=4)
    recompute_blocks(net)
    twin = copy.deepcopy(net)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    net(x).sum().backward()
    assert all(p.grad is None for p in twin.parameters()) and not torch.equal(net(x), twin(x))
    assert recompute_blocks(net) == 3  # once more changes nothing
    assert not hasattr(net.layer1[0].forward.forward, "block")  # type: ignore[union-attr, index]


def test_a_network_without_blocks() -> None:
    with pytest.raises(UserError, match="needs a network of repeated blocks; Sequential has none"):
        recompute_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize("method", ["full", "sara", "lora"])
def test_runs_compute_the_same(tmp_path: Path, method: str) -> None:
    bench = BenchRun(method, ["model=unet", "model.size=nano", "model.dropout=0.1"], tmp_path)
    losses, weights = [], []
    for recomputed in (False, True):
        run = bench.fresh(steps=4, checkpoint_activations=recomputed)
        runner.setup(run)
        runner.fit(run)
        losses.append(torch.stack(losses_of(run)))
        weights.append(run.model.state_dict())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-4)


def test_it_is_in_no_key() -> None:
    config: dict[str, Any] = {"trainer": {"lr": 1e-3}}
    assert cell_digest({"trainer": {"lr": 1e-3, "checkpoint_activations": True}}) == cell_digest(config)
