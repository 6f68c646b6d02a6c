"""Tests of the project's own classifiers: ResNet, VGG, MobileNetV2, ViT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from filtrun.errors import UserError
from filtrun.models.mobilenet import MobileNetV2, scaled, strides_for
from filtrun.models.resnet import CifarResNet, OptionA, cifar_resnet
from filtrun.models.vgg import VGG16
from filtrun.models.vit import Attention, ViT, patch_for

BUILD: dict[str, Callable[..., nn.Module]] = {
    "resnet": lambda c, k, s: cifar_resnet(c, k),
    "vgg": partial(VGG16, width=0.125),
    "mobilenet": partial(MobileNetV2, width=0.35),
    "vit": partial(ViT, size="nano"),
}


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# 0.27, 0.46, 0.85 and 1.7 M in the paper's Table 6; the exact figures are those of the shared CIFAR-10 checkpoints
@pytest.mark.parametrize(("depth", "expected"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_resnet_parameters(depth: int, expected: int) -> None:
    assert count(cifar_resnet(depth=depth)) == expected


def test_vgg_and_mobilenet_parameters() -> None:
    with torch.device("meta"):
        vgg, mobile = VGG16(), MobileNetV2()
    convolutions = [m for m in vgg.modules() if isinstance(m, nn.Conv2d)]
    pairs = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)] + [(256, 256)] * 2 + [(256, 512)] + [(512, 512)] * 5
    assert [(m.in_channels, m.out_channels) for m in convolutions] == pairs
    assert count(vgg) == sum(9 * a * b + 2 * b for a, b in pairs) + 512 * 10 + 10 == 14_724_042
    # 3,504,872 is the published ImageNet form; only its head of 1000 classes differs
    assert count(mobile) == 3_504_872 - 1281 * 1000 + 1281 * 10 == 2_236_682


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32), (3, 31)])
def test_logits_for_every_image_size(name: str, channels: int, side: int) -> None:
    torch.manual_seed(0)
    net = BUILD[name](channels, 7, side).eval()
    x = torch.randn(3, channels, side, side)
    logits = net(x)
    assert logits.shape == (3, 7) and logits.isfinite().all()
    torch.testing.assert_close(logits[1:2], net(x[1:2]), atol=1e-4, rtol=1e-3)  # images do not see each other
    assert (logits[0] - logits[1]).abs().max() > 1e-6


@pytest.mark.parametrize("name", BUILD)
def test_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    net = BUILD[name](1, 5, 8)
    nn.functional.cross_entropy(net(torch.randn(16, 1, 8, 8)), torch.arange(16) % 5).backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("inputs", "outputs", "side"), [(16, 32, 8), (3, 6, 7)])
def test_option_a_equals_a_slow_reference(inputs: int, outputs: int, side: int) -> None:
    x = torch.randn(2, inputs, side, side)
    out = OptionA(inputs, outputs, 2)(x)
    half = (side + 1) // 2
    expected = torch.zeros(2, outputs, half, half)
    for c in range(inputs):
        for i in range(half):
            for j in range(half):
                expected[:, c + (outputs - inputs) // 2, i, j] = x[:, c, 2 * i, 2 * j]
    assert torch.equal(out, expected)


def test_resnet_has_the_keys_of_shared_checkpoints() -> None:
    state = cifar_resnet(depth=20).state_dict()
    names = {key.rsplit(".", 1)[0] for key in state}
    inner = {f"layer{s}.{b}.{part}" for s in (1, 2, 3) for b in (0, 1, 2) for part in ("conv1", "bn1", "conv2", "bn2")}
    assert names == inner | {"conv1", "bn1", "linear"}
    assert state["layer3.2.conv2.weight"].shape == (64, 64, 3, 3) and state["linear.weight"].shape == (10, 64)


def test_resnet_block_of_zero_convolutions_is_its_shortcut() -> None:
    net = CifarResNet(depth=8).eval()
    block = net.layer2[0]
    nn.init.zeros_(block.conv2.weight)  # type: ignore[union-attr, arg-type]
    x = torch.rand(1, 16, 8, 8)
    assert torch.equal(block(x), torch.cat([torch.zeros(1, 8, 4, 4), x[:, :, ::2, ::2], torch.zeros(1, 8, 4, 4)], 1))


@pytest.mark.parametrize(("side", "expected"), [(32, 4), (28, 3), (8, 2), (224, 7)])
def test_mobilenet_keeps_a_map(side: int, expected: int) -> None:
    out = side
    for stride in strides_for(side):
        out = -(-out // stride)
    assert out in (expected, expected + 1)
    if side <= 32:
        assert MobileNetV2(1, 10, side, width=0.35).features(torch.zeros(2, 1, side, side)).shape[-1] == out


def test_mobilenet_widths_round_as_published() -> None:
    assert [scaled(c * 0.35) for c in (32, 16, 24, 32, 64, 96, 160, 320)] == [16, 8, 8, 16, 24, 32, 56, 112]


def test_vgg_halves_as_often_as_the_image_allows() -> None:
    pools = {side: sum(isinstance(m, nn.MaxPool2d) for m in VGG16(1, 10, side, 0.125).features) for side in (8, 28, 32)}
    assert pools == {8: 3, 28: 4, 32: 5}


def test_vit_cuts_images_into_16_to_64_tokens() -> None:
    assert {side: patch_for(side) for side in (8, 16, 28, 32, 64)} == {8: 2, 16: 2, 28: 4, 32: 4, 64: 8}
    for side in range(8, 130):
        assert 16 <= (-(-side // patch_for(side))) ** 2 <= 64, side


def test_vit_attention_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_vit_sizes_and_names() -> None:
    assert 0.15e6 < count(ViT(size="nano")) < 0.25e6 < 1e6 < count(ViT()) < 1.5e6 < 5e6 < count(ViT(size="small")) < 8e6
    linears = {name for name, m in ViT(depth=1).named_modules() if isinstance(m, nn.Linear)}
    parts = {f"blocks.0.attn.{p}" for p in ("q", "k", "v", "proj")} | {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"}
    assert linears == parts
    with pytest.raises(ValueError, match="32x32"):
        ViT(size="nano")(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cifar_resnet(depth=21), r"model.depth=21 must be 6n \+ 2 .* nearest is 20"),
        (lambda: cifar_resnet(width=0), "model.width=0"),
        (lambda: VGG16(width=0.001), "leaves no channel"),
        (lambda: VGG16(dropout=-0.1), "model.dropout=-0.1"),
        (lambda: MobileNetV2(width=0.0), "model.width=0.0 must be above 0"),
        (lambda: MobileNetV2(dropout=1.5), "model.dropout=1.5"),
        (lambda: ViT(size="tini"), "did you mean 'tiny'"),
        (lambda: ViT(patch=33), r"allowed is \[1, 32\]"),
        (lambda: ViT(width=10, heads=4), "multiple of model.heads=4"),
    ],
)
def test_mistakes_are_told(build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
