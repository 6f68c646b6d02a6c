"""BitFit, linear probe, full and none: which tensors move, and the first step of each by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun, probe
from filtrun.context import Run
from filtrun.errors import UserError
from filtrun.methods.peft.bitfit import BitFit
from filtrun.methods.peft.linear_probe import LinearProbe
from filtrun.task import normalizer

VIT = ["model=vit", "model.size=nano", "model.depth=1"]
RESNET = ["model=resnet20", "model.width=4"]
UNET = ["model=unet", "model.size=nano"]
SGD = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "clip": 0.0, "steps": 1}


def moved(run: Run, base: nn.Module) -> set[str]:
    before = dict(base.named_parameters())
    return {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}


def one_step_by_hand(setting: BenchRun, names: set[str], frozen: bool = False) -> dict[str, torch.Tensor]:
    """Plain gradient descent on the first batch, computed with torch alone; `frozen` features are those of the base."""
    run = setting.fresh(edit=False)
    model = run.model.train(not frozen)
    batch = next(iter(run.batches(0, skip=0)))
    mean, std = normalizer(run)
    F.cross_entropy(model((batch.x - mean) / std), batch.y).backward()
    return {n: (p - 0.1 * p.grad if n in names else p).detach() for n, p in model.named_parameters()}  # type: ignore[operator]


@pytest.mark.parametrize("model", [VIT, RESNET])
def test_linear_probe_moves_the_head_by_its_gradient(tmp_path: Path, model: list[str]) -> None:
    setting = BenchRun("linear_probe", model, tmp_path)
    run = setting.trained(**SGD)
    head = {n for n in run.weights if n.startswith(("head.", "linear.", "fc."))}
    assert len(head) == 2 and moved(run, setting.base) == head
    want = one_step_by_hand(setting, head, frozen=True)
    assert all(torch.allclose(p, want[n], atol=1e-6) for n, p in run.model.named_parameters())
    statistics = dict(setting.base.named_buffers())
    assert all(torch.equal(b, statistics[n]) for n, b in run.model.named_buffers())


def test_linear_probe_refuses_a_denoiser(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method=linear_probe works with task=classify, not task=diffuse"):
        BenchRun("linear_probe", UNET, tmp_path)


@pytest.mark.parametrize("head", [True, False])
def test_bitfit_moves_biases_by_their_gradient(tmp_path: Path, head: bool) -> None:
    setting = BenchRun("bitfit", [*VIT, f"method.bitfit.head={str(head).lower()}"], tmp_path)
    run = setting.trained(**SGD)
    names = {n for n in run.weights if n.endswith("bias")} | ({"head.weight"} if head else set())
    allowed = moved(run, setting.base)
    assert allowed <= names and names - allowed <= {"blocks.0.attn.k.bias"}  # softmax does not see a shift of the keys
    want = one_step_by_hand(setting, names)
    assert all(torch.allclose(p, want[n], atol=1e-6) for n, p in run.model.named_parameters())


def test_bitfit_in_a_denoiser_trains_biases_only(tmp_path: Path) -> None:
    setting = BenchRun("bitfit", UNET, tmp_path)
    run = setting.trained()
    assert moved(run, setting.base) == {n for n in run.weights if n.endswith("bias")}


def test_bitfit_without_a_bias_says_so(tmp_path: Path) -> None:
    setting = BenchRun("bitfit", VIT, tmp_path)
    for module in setting.base.modules():
        if getattr(module, "bias", None) is not None:
            module.register_parameter("bias", None)
    with pytest.raises(UserError, match="found no bias"):
        setting.fresh()


def test_full_moves_everything_by_its_gradient(tmp_path: Path) -> None:
    setting = BenchRun("full", VIT, tmp_path)
    run = setting.trained(**SGD)
    names = set(run.weights)
    assert names - moved(run, setting.base) <= {"blocks.0.attn.k.bias"}
    want = one_step_by_hand(setting, names)
    assert all(torch.allclose(p, want[n], atol=1e-6) for n, p in run.model.named_parameters())


def test_full_beside_a_part_trains_the_part(tmp_path: Path) -> None:
    setting = BenchRun("[full,linear_probe]", VIT, tmp_path)
    assert moved(setting.trained(), setting.base) == {"head.weight", "head.bias"}


def test_none_makes_no_optimizer_and_changes_no_bit(tmp_path: Path) -> None:
    setting = BenchRun("none", UNET, tmp_path)
    run = setting.fresh()
    before = probe(run)
    runner.setup(run)
    runner.fit(run)
    assert run.optimizer is None and run.step == 0
    assert moved(run, setting.base) == set() and torch.equal(before, probe(run))


def small_classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3))


def test_bitfit_alone_on_any_model() -> None:
    model = small_classifier()
    BitFit().attach(model, head=model[4].parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias", "1.bias", "4.weight", "4.bias"]
    BitFit(head=False).attach(model, head=model[4].parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.bias", "1.bias", "4.bias"]
    with pytest.raises(UserError, match="found no bias"):
        BitFit().attach(nn.Linear(2, 2, bias=False))


def test_linear_probe_alone_on_any_model() -> None:
    model, x = small_classifier(), torch.randn(8, 1, 4, 4)
    features = model[:4].eval()(x)
    statistics = model[1].running_mean.clone()
    probe_ = LinearProbe().attach(model, model[4].parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["4.weight", "4.bias"]
    model.train()
    assert torch.equal(model(x), model[4](features)) and torch.equal(model[1].running_mean, statistics)
    probe_.release()
    model.train()
    assert model[1].training and model[2].training
    model(x)
    assert not torch.equal(model[1].running_mean, statistics)
    with pytest.raises(UserError, match="got none"):
        LinearProbe().attach(model, [])
