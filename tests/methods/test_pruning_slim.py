"""Channels go from all coupled layers at once, and the slim model does what the masked one does."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.errors import Unfit, UserError
from filtrun.methods.pruning.removal import Removal, from_hex, tensors_of, to_hex
from filtrun.methods.pruning.selection import select, select_macs
from filtrun.methods.pruning.slim import Channels
from filtrun.models.espcn import ESPCN
from filtrun.models.mobilenet import MobileNetV2
from filtrun.models.resnet import cifar_resnet
from filtrun.models.vgg import VGG16
from filtrun.models.vit import ViT


def lived_in(model: nn.Module) -> nn.Module:
    """With weights and statistics as after some training, so that nothing is zero by chance."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(std=0.1)
    return model.eval()


class Joined(nn.Module):
    """Two branches concatenated, a 1x1 shortcut, a grouped output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.c, self.skip = nn.BatchNorm2d(10), nn.Conv2d(10, 8, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.head((self.c(h) + self.skip(x)).mean((2, 3)))


MODELS = {
    "resnet": lambda: cifar_resnet(width=4),
    "vgg": lambda: VGG16(width=0.0625),
    "mobilenet": lambda: MobileNetV2(width=0.1),
    "vit": lambda: ViT(3, 10, 32, size="nano", depth=2),
    "espcn": lambda: ESPCN(2, 3),
    "joined": Joined,
}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_slim_model_equals_the_masked_one(name):
    model, x = lived_in(MODELS[name]()), torch.rand(2, 3, 32, 32)
    channels = Channels(model, x[:1])
    drop = select(channels.importance("l2"), 0.4)
    dense = channels.layer_macs()
    expected = channels.macs(drop, dense)
    before = {n: t.clone() for n, t in tensors_of(model).items()}
    removal = channels.remove(drop)
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(model).items())  # made on a copy
    masked, slim = copy.deepcopy(model), copy.deepcopy(model)
    removal.mask(masked)
    again = Removal.from_json(json.loads(json.dumps(removal.to_json())))
    again.apply(slim)
    with torch.no_grad():
        assert (masked(x) - slim(x)).abs().max() < 1e-5 and (model(x) - slim(x)).abs().max() > 1e-4
    assert removal.gap < 1e-5
    parameters = sum(p.numel() for p in slim.parameters())
    assert parameters < 0.9 * sum(p.numel() for p in model.parameters())
    assert sum(Channels(slim, x[:1]).layer_macs().values()) == pytest.approx(expected)
    slim.train()(x).sum().backward()  # and it trains
    assert all(p.grad is None or p.grad.shape == p.shape for p in slim.parameters())


def test_option_a_shortcuts_keep_the_residual_stream():
    model, x = lived_in(cifar_resnet(depth=14, width=4)), torch.rand(1, 1 + 2, 16, 16)
    channels = Channels(model, x)
    assert sorted(g.name for g in channels.groups) == [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1)]
    removal = channels.remove(select(channels.importance("l1"), 0.5, "local"))
    removal.apply(model)
    assert [b.conv1.out_channels for s in (model.layer1, model.layer2, model.layer3) for b in s] == [2, 2, 4, 4, 8, 8]
    assert [b.conv2.out_channels for s in (model.layer1, model.layer2, model.layer3) for b in s] == [4, 4, 8, 8, 16, 16]
    assert model(x).shape == (1, 10)


def test_depthwise_layers_follow_their_producer():
    model, x = lived_in(MobileNetV2(width=0.1)), torch.rand(1, 3, 32, 32)
    channels = Channels(model, x)
    inherits = [p.inherits for g in channels.groups for p in g.norms]
    assert any(inherits) and not all(inherits)
    channels.remove(select(channels.importance("bn_scale"), 0.3)).apply(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            assert module.groups == module.in_channels == module.out_channels == len(module.weight)
    assert model(x).shape == (1, 10)


def test_parameter_objects_stay_and_an_optimizer_goes_on():
    model, x = lived_in(VGG16(width=0.0625)), torch.rand(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).sum().backward()
    ids = [id(p) for p in model.parameters()]
    channels = Channels(model, x[:1])
    channels.remove(select(channels.importance("l1"), 0.5)).apply(model)
    assert ids == [id(p) for p in model.parameters()] and model.features[0].weight.grad is None
    before = model.classifier.weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.classifier.weight)


def test_selection_counts_and_guards():
    table = [torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])]
    assert [d.tolist() for d in select(table, 0.5)] == [[0, 1, 2], []]  # one channel stays
    assert [d.tolist() for d in select(table, 0.5, "local")] == [[0, 1], [0, 1]]
    assert [d.tolist() for d in select(table, 1.0, least=[3, 2])] == [[0], [0, 1]]
    assert [d.tolist() for d in select(table, 0.0)] == [[], []]


def test_multiply_adds_are_reached_with_the_fewest_channels():
    model, x = lived_in(VGG16(width=0.0625)), torch.rand(1, 3, 32, 32)
    channels = Channels(model, x)
    scores, dense = channels.importance("l1"), channels.layer_macs()
    total = sum(dense.values())
    drop = select_macs(channels, scores, 0.5, dense)
    count = sum(len(d) for d in drop)
    assert channels.macs(drop, dense) <= 0.5 * total
    one_less = select(scores, (count - 1) / sum(len(s) for s in scores) + 1e-9)
    assert channels.macs(one_less, dense) > 0.5 * total
    assert sum(len(d) for d in select_macs(channels, scores, 0.0, dense)) == 0


def test_slimming_is_faster():
    model, x = lived_in(VGG16(width=0.5)), torch.rand(4, 3, 32, 32)
    slim = copy.deepcopy(model)
    channels = Channels(slim, x[:1])
    channels.remove(select(channels.importance("l1"), 0.75, "local")).apply(slim)

    def best(net: nn.Module) -> float:
        times = []
        with torch.no_grad():
            for _ in range(5):
                started = time.perf_counter()
                net(x)
                times.append(time.perf_counter() - started)
        return min(times)

    assert best(slim) < 0.7 * best(model)


def test_what_cannot_be_pruned_is_said():
    with pytest.raises(Unfit, match="no channels that can be taken out"):
        Channels(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(1, 3, 2, 2))
    with pytest.raises(UserError, match="ignore=feature names no module.*'features'"):
        Channels(VGG16(width=0.0625), torch.rand(1, 3, 32, 32), ignore=["feature"])
    with pytest.raises(Unfit, match="cannot be traced"):
        Channels(VGG16(width=0.0625), torch.rand(1, 5, 32, 32))
    channels = Channels(VGG16(width=0.0625), torch.rand(1, 3, 32, 32), ignore=["features.0"])
    assert "features.0" not in [g.name for g in channels.groups]
    removal = Removal({"a": {0: torch.tensor([True, False])}})
    with pytest.raises(UserError, match="no such tensor"):
        removal.apply(nn.Linear(1, 2))
    with pytest.raises(UserError, match="it has shape"):
        Removal({"weight": {0: torch.tensor([True, False])}}).apply(nn.Linear(1, 3))


def test_the_missing_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match=r"pip install 'filtrun\[pruning\]'"):
        Channels(VGG16(width=0.0625), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("bits", [[True], [False], [False, True, True], [True] * 9 + [False] * 8])
def test_keep_vectors_as_text(bits):
    assert from_hex(to_hex(torch.tensor(bits))).tolist() == bits
