"""Operations, multiply-adds by layer and latency, against closed forms and published counts."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from filtrun.cost import latency, layer_macs, operations, sparse_macs
from filtrun.models.mobilenet import MobileNetV2
from filtrun.models.resnet import cifar_resnet
from filtrun.models.vit import ViT


@pytest.mark.parametrize(
    ("build", "macs"),
    [
        (lambda: cifar_resnet(depth=20), 40_551_040),
        (lambda: cifar_resnet(depth=56), 125_485_696),
        (lambda: MobileNetV2(), 87_976_448),
    ],
)
def test_multiply_adds_are_those_the_field_counts(build, macs):
    model, x = build().eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = operations(lambda: model(x))
    assert found == {"flops": 2 * macs, "macs": macs}


def test_attention_products_are_operations_but_not_multiply_adds_of_layers():
    model, x = ViT(1, 10, 8, size="nano").eval(), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        found, layers = operations(lambda: model(x)), layer_macs(model, lambda: model(x))
    assert found["macs"] == sum(layers.values())
    tokens, width, depth = 17, 64, 4
    assert found["flops"] - 2 * found["macs"] == pytest.approx(depth * 2 * 2 * tokens * tokens * width)


def test_layers_have_their_own_counts_and_sparse_ones_by_share():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(4 * 9, 5)
    )
    x = torch.rand(1, 2, 5, 5)
    layers = layer_macs(model, lambda: model(x))
    assert layers == {"0": 25 * 4 * 2 * 9, "1": 9 * 4 * 9, "3": 36 * 5}
    assert sparse_macs(layers, {"0.weight": 0.25, "3.weight": 0.5}) == 25 * 2 * 9 + 9 * 4 * 9 + 90
    assert layer_macs(nn.Linear(3, 7), lambda: nn.Linear(3, 7)(torch.rand(1, 3))) in ({}, {"": 21})


def test_latency_is_the_median_and_brief():
    calls = []

    def probe():
        calls.append(1)
        time.sleep(0.2 if len(calls) == 3 else 0.002)
        return torch.zeros(1)

    started = time.perf_counter()
    assert 0.002 <= latency(probe, torch.device("cpu"), budget=0.05) < 0.05
    assert time.perf_counter() - started < 2 and len(calls) >= 4
    calls[:] = [1] * 10

    def slow():
        calls.append(1)
        time.sleep(0.1)
        return torch.zeros(1)

    calls.clear()
    latency(slow, torch.device("cpu"), budget=0.05)
    assert len(calls) == 2  # one to warm up, one measured: what takes long is not repeated
