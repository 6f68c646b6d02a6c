"""VPT: prompts against the blocks run by hand, their start, what stays frozen, and models it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from filtrun.bench_run import BenchRun
from filtrun.errors import UserError
from filtrun.methods.peft.vpt import VPT, Prompts, with_prompts
from filtrun.models.resnet import CifarResNet
from filtrun.models.timm_models import timm_classifier
from filtrun.models.vit import ViT

TIMM: dict[str, Any] = {"in_channels": 1, "image_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 2}


def test_prompts_stand_behind_the_prefix() -> None:
    x = torch.arange(5.0).view(1, 5, 1)
    prompts = torch.tensor([[10.0], [11.0]])
    assert with_prompts(x, prompts, 1).flatten().tolist() == [0, 10, 11, 1, 2, 3, 4]
    assert with_prompts(x, prompts, 1, drop=2).flatten().tolist() == [0, 10, 11, 3, 4]
    assert with_prompts(x, prompts, 2).flatten().tolist() == [0, 1, 10, 11, 2, 3, 4]


@pytest.mark.parametrize("deep", [False, True])
def test_the_own_vit_block_by_block(deep: bool) -> None:
    torch.manual_seed(0)
    model = ViT(1, 10, 8, size="nano", depth=3).eval()
    twin = copy.deepcopy(model)
    vpt = VPT(tokens=4, deep=deep).attach(model)
    x, p = torch.randn(2, 1, 8, 8), vpt.prompts.tokens.detach()
    assert p.shape == (3 if deep else 1, 4, 64)
    with torch.no_grad():
        tokens = twin.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([twin.token.expand(2, -1, -1), tokens], dim=1) + twin.positions
        h = torch.cat([h[:, :1], p[0].expand(2, -1, -1), h[:, 1:]], dim=1)
        for i, block in enumerate(twin.blocks):
            if deep and i:
                h = torch.cat([h[:, :1], p[i].expand(2, -1, -1), h[:, 5:]], dim=1)
            h = block(h)
        want = twin.head(twin.norm(h)[:, 0])
        assert torch.allclose(model(x), want, atol=1e-5)
        assert (model(x) - twin(x)).abs().max() > 1e-4


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm_vit_with_registers_and_both_kinds_of_pooling(pool: str) -> None:
    torch.manual_seed(0)
    model: Any = timm_classifier("vit_tiny_patch16_224", **TIMM, global_pool=pool, reg_tokens=2).eval()
    twin = copy.deepcopy(model)
    vpt = VPT(tokens=3).attach(model)
    x, p = torch.randn(2, 1, 8, 8), vpt.prompts.tokens.detach()
    with torch.no_grad():
        h = twin._pos_embed(twin.patch_embed(x))
        assert h.shape[1] == 3 + 16
        for i, block in enumerate(twin.blocks):
            h = torch.cat([h[:, :3], p[i].expand(2, -1, -1), h[:, 3:] if i == 0 else h[:, 6:]], dim=1)
            h = block(h)
        h = torch.cat([h[:, :3], h[:, 6:]], dim=1)
        assert torch.allclose(model(x), twin.forward_head(twin.norm(h)), atol=1e-5)


def test_start_is_uniform_in_the_bound_of_patch_and_width() -> None:
    torch.manual_seed(0)
    tokens = Prompts(12, 50, 192, None, 3 * 16 * 16, 0.0).tokens.detach()
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert tokens.abs().max() < bound and tokens.abs().max() > 0.999 * bound
    assert abs(tokens.std().item() - bound / math.sqrt(3)) < 1e-3


def test_projected_prompts() -> None:
    torch.manual_seed(0)
    prompts = Prompts(2, 3, 16, 4, 27, 0.0)
    projection: Any = prompts.projection
    assert prompts.tokens.shape == (2, 3, 4)
    assert torch.allclose(prompts.of(1), prompts.tokens[1] @ projection.weight.T + projection.bias)


def test_backbone_dropout_stays_off_until_the_end(tmp_path: Path) -> None:
    setting = BenchRun("vpt", ["model=vit", "model.size=nano", "model.depth=1", "model.dropout=0.5"], tmp_path)
    run = setting.fresh()
    run.model.train()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(run.model(x), run.model(x))
    run.each_reversed("finish")
    run.model.train()
    assert not torch.equal(run.model(x), run.model(x))


def test_dropout_on_prompts_acts_in_training() -> None:
    model = ViT(1, 10, 8, size="nano", depth=1, dropout=0.5)
    VPT(dropout=0.5).attach(model)
    x = torch.randn(4, 1, 8, 8)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_only_prompts_and_head_train(tmp_path: Path) -> None:
    words = ["model=vit", "model.size=nano", "model.depth=2", "method.vpt.tokens=3"]
    run = BenchRun("vpt", words, tmp_path).fresh()
    names = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert names == {"prompts.tokens", "head.weight", "head.bias"}
    assert run.methods[0].report(run) == {"prompt_tokens": 3, "prompt_layers": 2, "prompt_params": 2 * 3 * 64}


@pytest.mark.parametrize(
    "model",
    [
        CifarResNet(1, 10, 8),
        nn.Sequential(nn.Linear(2, 2)),
        timm_classifier("swin_tiny_patch4_window7_224", in_channels=1, image_size=8, patch_size=1, embed_dim=8,
                        depths=[1], num_heads=[2], window_size=4),
        timm_classifier("beit_base_patch16_224", in_channels=1, image_size=8, patch_size=2, embed_dim=8, depth=1,
                        num_heads=2),
    ],
    ids=["resnet", "mlp", "swin", "beit"],
)  # fmt: skip
def test_other_models_are_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"method\.vpt (needs a vision transformer|cannot add tokens)"):
        VPT().attach(model)


def test_bad_options() -> None:
    with pytest.raises(UserError, match="tokens=0 is out of range"):
        VPT(tokens=0)


def test_operations_of_a_prompted_model_are_counted(tmp_path: Path) -> None:
    from filtrun.cost import operations

    for extra in ([], ["method.vpt.project=8"]):
        words = ["model=vit", "model.size=nano", "model.depth=1", "method.vpt.tokens=3", *extra]
        run = BenchRun("vpt", words, tmp_path).fresh()
        with run.evaluating():
            macs = operations(lambda: run.task.probe(run))["macs"]  # noqa: B023
        plain = 16 * 4 * 64 + 64 * 10  # patches and head
        assert macs == plain + 20 * 12 * 64**2 + (3 * 8 * 64 / 16 if extra else 0)
