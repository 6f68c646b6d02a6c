"""AdaptFormer: values against the block written out, other models and places, and what the errors say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filtrun.bench_run import BenchRun, probe
from filtrun.errors import UserError
from filtrun.methods.peft.adapter import Adapter, conv_pair
from filtrun.methods.peft.branches import Bottleneck, drop_path, free_name, on_rows
from filtrun.methods.peft.places import class_tokens, image_layers, projections, spatial_convs, transformer_blocks
from filtrun.models.resnet import CifarResNet
from filtrun.models.timm_models import timm_classifier
from filtrun.models.unet import UNet
from filtrun.models.vit import ViT

TIMM: dict[str, Any] = {"in_channels": 1, "image_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def randomise(model: nn.Module) -> None:
    """Give every trainable tensor values that are not its start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(1, 10, 8, size="nano", depth=2).eval()


def test_a_block_is_the_sum_written_out(vit: ViT) -> None:
    block: Any = vit.blocks[0]
    x = torch.randn(3, 17, 64)
    with torch.no_grad():
        middle = x + block.attn(block.norm1(x))
        plain = middle + block.mlp(block.norm2(middle))
        adapter = Adapter(dim=5, scale=0.1).attach(vit)
        assert torch.equal(block(x), plain)
        randomise(vit)
        a: Any = adapter.branches[0]
        by_hand = F.relu(middle @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias
        assert torch.allclose(block(x), plain + 0.1 * by_hand, atol=1e-5)
    assert a.stream is None
    assert sum(p.numel() for p in a.parameters()) == 2 * 64 * 5 + 5 + 64


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_timm_models(name: str) -> None:
    torch.manual_seed(0)
    if "vit" in name:
        model = timm_classifier(name, **TIMM, drop_path_rate=0.2, init_values=0.1)
    elif "swin" in name:
        options: dict[str, Any] = {
            "patch_size": 1,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        }
        model = timm_classifier(name, in_channels=1, image_size=8, **options)
    else:
        options = {"depths": [1] * 4, "dims": [8, 8, 16, 16], "ls_init_value": 1.0}
        model = timm_classifier(name, in_channels=1, image_size=32, **options)
    x = torch.randn(2, 1, 32 if "conv" in name else 8, 32 if "conv" in name else 8)
    model.eval()
    with torch.no_grad():
        want = model(x)
        adapter = Adapter(dim=3).attach(model)
        assert (model(x) - want).abs().max() < 1e-6
        randomise(model)
        assert (model(x) - want).abs().max() > 1e-3
    assert len(adapter.branches) == {"v": 2, "s": 3, "c": 4}[name[0]]
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for b in adapter.branches for p in b.parameters())


def test_layer_scale_and_stochastic_depth_do_not_act_on_the_adapter() -> None:
    model: Any = timm_classifier("vit_tiny_patch16_224", **TIMM, init_values=0.0, drop_path_rate=0.0).eval()
    block = model.blocks[0]
    x = torch.randn(2, 17, 32)
    with torch.no_grad():
        adapter = Adapter(dim=4).attach(model)
        randomise(model)
        middle = x + block.ls1(block.attn(block.norm1(x)))
        want = middle + block.ls2(block.mlp(block.norm2(middle))) + adapter.branches[0](middle)
        adapter.branches[0].stream = None
        assert torch.allclose(block(x), want, atol=1e-5)


def test_beside_a_convolution_stand_two_of_one_pixel() -> None:
    torch.manual_seed(0)
    model: Any = CifarResNet(1, 10, 8).eval()
    assert list(spatial_convs(model)) == [f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)]
    assert image_layers(model) == [model.conv1]
    conv, x = model.layer2[0].conv1, torch.randn(2, 16, 7, 7)
    with torch.no_grad():
        plain = conv(x)
        adapter = Adapter(dim=4, scale=0.5).attach(model)
        assert torch.equal(conv(x), plain)
        randomise(model)
        a: Any = conv.adapter
        middle = F.relu(F.conv2d(x, a.down.weight, a.down.bias, stride=2))
        assert torch.allclose(conv(x), plain + 0.5 * F.conv2d(middle, a.up.weight, a.up.bias), atol=1e-5)
    assert len(adapter.branches) == 6 and a.down.weight.shape == (4, 16, 1, 1)


def test_only_convolutions_that_keep_the_size_have_room() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 5, padding="same"), nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, stride=2), nn.Conv2d(8, 8, 2, stride=2),
    )  # fmt: skip
    assert list(spatial_convs(model)) == ["1", "2", "4"]
    down, up = conv_pair(spatial_convs(model)["4"], 3)
    x = torch.randn(1, 8, 9, 9)
    assert up(down(x)).shape == model[4](x).shape


def test_post_norm_blocks_read_the_input_of_the_mlp() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.norm2 = nn.Sequential(nn.Linear(6, 6)), nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm2(self.mlp(x))

    model = nn.Sequential(PostNorm()).eval()
    x = torch.randn(4, 6)
    with torch.no_grad():
        want = model(x)
        adapter = Adapter(dim=2).attach(model)
        randomise(model)
        assert torch.allclose(model(x), want + adapter.branches[0](x), atol=1e-6)


def test_norms_and_the_learned_scale() -> None:
    x = torch.randn(3, 6)
    for where in ("in", "out"):
        torch.manual_seed(1)
        branch = Bottleneck(nn.Linear(6, 2), nn.Linear(2, 6), scale=3.0, learn_scale=True, norm=where, width=6).eval()
        assert branch.scale.item() == 1  # type: ignore[union-attr]
        inner = F.layer_norm(x, (6,)) if where == "in" else x
        want = branch.up(F.relu(branch.down(inner)))
        assert torch.allclose(branch(x), want if where == "in" else F.layer_norm(want, (6,)), atol=1e-6)


def test_a_copy_has_adapters_of_its_own(vit: ViT) -> None:
    Adapter(dim=3).attach(vit)
    twin = copy.deepcopy(vit)
    x = torch.randn(2, 1, 8, 8)
    before = vit(x).detach()
    randomise(twin)
    assert torch.equal(vit(x), before) and not torch.equal(twin(x), before)


def test_some_features_of_an_output() -> None:
    x = torch.arange(6.0).view(1, 6)
    assert on_rows(x, 2, 4, lambda part: -part).tolist() == [[0, 1, -2, -3, 4, 5]]
    assert on_rows(x, 0, 6, lambda part: part + 1).tolist() == [[1, 2, 3, 4, 5, 6]]
    layer = nn.Linear(2, 2)
    assert (free_name(layer, "adapter"), free_name(layer, "weight")) == ("adapter", "weight2")


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    assert drop_path(x, 0.3, training=False) is x
    y = drop_path(x, 0.3, training=True)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert torch.equal(y, y[:, :1, :1].expand_as(y)) and abs(y.mean().item() - 1) < 0.05


def test_places_of_the_own_models(vit: ViT) -> None:
    assert list(transformer_blocks(vit)) == ["blocks.0", "blocks.1"] and class_tokens(vit) == [vit.token]
    assert [p.name for p in projections(vit, "qv")] == [f"blocks.{i}.attn.{n}" for i in range(2) for n in "qv"]
    net = UNet(size="nano")
    found = projections(net)
    channels = found[0].module.in_features
    assert [(p.role, p.start) for p in found[:3]] == [("q", 0), ("k", channels), ("v", 2 * channels)]
    assert not transformer_blocks(net) and not class_tokens(net)


def test_no_place_is_told() -> None:
    with pytest.raises(UserError, match="place=auto: Sequential has no place for adapters"):
        Adapter().attach(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(UserError, match="place=mlp: CifarResNet has no transformer block"):
        Adapter(place="mlp").attach(CifarResNet(1, 10, 8))
    with pytest.raises(UserError, match="norm=in is for adapters beside an MLP"):
        Adapter(norm="in").attach(CifarResNet(1, 10, 8))
    with pytest.raises(UserError, match="place=side is not allowed"):
        Adapter(place="side")


def test_what_trains_in_a_run(tmp_path: Path) -> None:
    words = ["model=vit", "model.size=nano", "model.depth=2", "method.adapter.dim=3"]
    run = BenchRun("adapter", words, tmp_path).fresh()
    report: dict[str, Any] = run.methods[0].report(run)
    assert report == {"bottleneck": 3, "adapters": 2, "adapter_params": 2 * (2 * 64 * 3 + 3 + 64)}
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert trainable == report["adapter_params"] + 64 * 10 + 10


def test_it_composes_with_bitfit(tmp_path: Path) -> None:
    words = ["model=vit", "model.size=nano", "model.depth=1", "method.adapter.dim=2"]
    for order in ("adapter,bitfit", "bitfit,adapter"):
        setting = BenchRun(f"[{order}]", words, tmp_path)
        run, base = setting.trained(), dict(setting.base.named_parameters())
        moved = {n for n, p in run.weights.items() if not torch.equal(p, base[n])}
        assert moved == {n for n in run.weights if n.endswith("bias") or n.startswith("head.")}


@pytest.mark.parametrize("other", ["ssf", "lora"])
def test_what_merges_into_a_convolution_leaves_its_adapter_alone(tmp_path: Path, other: str) -> None:
    words = ["model=resnet20", "model.depth=8", "model.width=8", "method.adapter.dim=2"]
    for order in (f"adapter,{other}", f"{other},adapter"):
        run = BenchRun(f"[{order}]", words, tmp_path).trained()
        assert run.methods[order.startswith("lora") or order.startswith("ssf")].report(run)["adapters"] == 6
        before = probe(run)
        run.each_reversed("finish")
        assert (probe(run) - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)


def test_prompts_leave_behind_the_adapters_of_the_last_block(tmp_path: Path) -> None:
    words = ["model=vit", "model.size=nano", "model.depth=1", "method.adapter.dim=2"]
    outputs = []
    for order in ("adapter,vpt", "vpt,adapter"):
        run = BenchRun(f"[{order}]", words, tmp_path).fresh()
        with torch.no_grad():
            run.model.prompts.tokens.fill_(0.1)  # type: ignore[union-attr, operator]
            for name, parameter in run.model.named_parameters():
                if "adapter" in name:
                    parameter.fill_(0.01)
        outputs.append(probe(run))
    assert torch.equal(outputs[0], outputs[1])
