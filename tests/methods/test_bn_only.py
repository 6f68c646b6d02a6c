"""BN-only: what trains and what does not, the paper's counts, the starts, the controls, switched-off features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.bench_run import BenchRun
from filtrun.errors import UserError
from filtrun.methods.peft.bn_only import BNOnly, batch_norms, init_batch_norm, random_entries, share_below
from filtrun.models.resnet import cifar_resnet

RESNET = ["model=resnet20", "model.depth=8", "model.width=4"]


class Block(nn.Module):
    """A residual block with a 1x1 convolution and batch norm on the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def paper_resnet(depth: int, width: int = 16) -> nn.Sequential:
    """The network of the paper: depth 6 D + 2 with shortcuts that have parameters."""
    blocks, now = [], width
    for wide in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            blocks.append(Block(now, wide))
            now = wide
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(now, 10))


@pytest.mark.parametrize(
    ("depth", "width", "total", "norms"),
    [(14, 16, 175_258, 1_120), (20, 16, 272_474, 1_568), (32, 16, 466_906, 2_464), (56, 16, 855_770, 4_256),
     (20, 64, 4_327_754, 6_272)],
)  # fmt: skip
def test_counts_of_the_official_builder(depth: int, width: int, total: int, norms: int) -> None:
    model = paper_resnet(depth, width)
    assert sum(p.numel() for p in model.parameters()) == total
    BNOnly(init="keep").attach(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == norms
    assert len(trained) == 2 * (1 + 6 * ((depth - 2) // 6) + 2)  # 42 tensors at depth 20


def test_starts_are_those_of_the_official_initialisers() -> None:
    norm = nn.BatchNorm2d(20_000)
    for kind, low, high, mean, beta in (
        ("uniform", 0, 1, 0.5, 0), ("positivenegative", -1, 1, 0, 0), ("ones", 1, 1, 1, 0), ("oneone", 1, 1, 1, 1),
    ):  # fmt: skip
        torch.manual_seed(0)
        init_batch_norm(norm, kind)
        gamma = norm.weight.detach()
        assert low <= gamma.min() <= gamma.max() <= high and gamma.mean().item() == pytest.approx(mean, abs=0.02)
        assert norm.bias.eq(beta).all()


def test_share_of_small_scales() -> None:
    assert share_below([torch.tensor([0.001, -0.005]), torch.tensor([0.5, -0.01])], 0.01) == 0.5


def test_random_entries_are_two_in_every_channel() -> None:
    torch.manual_seed(0)
    mask = random_entries(torch.zeros(6, 4, 3, 3), 2)
    assert mask.shape == (6, 4, 3, 3) and mask.flatten(1).sum(1).tolist() == [2] * 6
    assert not torch.equal(mask[0], mask[1])
    assert random_entries(torch.zeros(3, 1, 1, 1), 2).sum() == 3


def moved(run: Any, start: dict[str, Tensor]) -> set[str]:
    return {n for n, p in run.model.named_parameters() if not torch.equal(p.detach(), start[n])}


@pytest.mark.parametrize("head", [False, True])
def test_only_scales_and_shifts_move(head: bool, tmp_path: Path) -> None:
    setting = BenchRun("bn_only", [*RESNET, f"method.bn_only.head={str(head).lower()}"], tmp_path)
    fresh = setting.fresh()
    start = {n: p.detach().clone() for n, p in fresh.model.named_parameters()}
    norms: list[Any] = batch_norms(fresh.model)
    assert all(0 < n.weight.min() and n.weight.max() < 1 and n.bias.eq(0).all() for n in norms)
    run = setting.trained()
    names = {n for n in start if ".bn" in n or n.startswith("bn1") or (head and n.startswith("linear"))}
    assert moved(run, start) == names
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == names
    moving = {n for n, b in run.model.named_buffers() if not torch.equal(b, run.shared["base_buffers"][n])}
    assert all(any(n.endswith(key) for n in moving) for key in ("running_mean", "running_var"))


def test_two_random_weights_per_channel_are_as_many_numbers(tmp_path: Path) -> None:
    setting = BenchRun("bn_only", [*RESNET, "method.bn_only.control=random2"], tmp_path)
    run = setting.trained()
    report = run.methods[0].report(run)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == report["bn_params"]
    start = {n: p.detach().clone() for n, p in setting.fresh().model.named_parameters()}
    run.each_reversed("finish")
    base = dict(setting.base.named_parameters())
    for name, parameter in run.model.named_parameters():
        if "conv" in name:
            assert (parameter != base[name]).flatten(1).sum(1).tolist() == [2] * len(parameter), name
        elif "bn" in name:
            assert torch.equal(parameter, start[name]), name
        else:
            assert torch.equal(parameter, base[name]), name
    assert list(run.model.state_dict()) == list(setting.base.state_dict())


def test_the_other_controls_and_exceptions(tmp_path: Path) -> None:
    for words, wanted in (
        (["control=output"], lambda n: n.startswith("linear")),
        (["control=all"], lambda n: True),
        (["also=[layer2.0.conv1.weight]"], lambda n: "bn" in n or n == "layer2.0.conv1.weight"),
    ):
        run = BenchRun("bn_only", [*RESNET, *(f"method.bn_only.{w}" for w in words)], tmp_path).fresh()
        assert {n for n, p in run.model.named_parameters() if p.requires_grad} == {
            n for n, _ in run.model.named_parameters() if wanted(n)
        }


def test_a_pretrained_base_keeps_its_scales_unless_told_otherwise() -> None:
    model = cifar_resnet(1, depth=8, width=4)
    with torch.no_grad():
        model.bn1.weight.fill_(0.7)
    BNOnly().attach(model)
    assert model.bn1.weight.eq(0.7).all()
    BNOnly().attach(model, scratch=True)
    assert not model.bn1.weight.eq(0.7).any()
    BNOnly(init="ones").attach(model)
    assert model.bn1.weight.eq(1).all()


def test_the_report_switches_small_scales_off_and_on_again(tmp_path: Path) -> None:
    run = BenchRun("bn_only", RESNET, tmp_path).trained()
    bn: Any = run.methods[0]
    with torch.no_grad():
        for gamma in bn.gammas:
            gamma[0] = 0.005
    kept = [g.detach().clone() for g in bn.gammas]
    found = bn.report(run)
    assert all(torch.equal(g, k) for g, k in zip(bn.gammas, kept, strict=True))
    assert found["gamma_below_cut"] == pytest.approx(len(kept) / sum(len(k) for k in kept), abs=0.02)
    with torch.no_grad(), run.evaluating():
        for gamma in bn.gammas:
            gamma.masked_fill_(gamma.abs() < 0.01, 0)
        assert run.task.evaluate(run)["accuracy"] == found["accuracy_without_disabled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": "bnn"}, "method.bn_only.control=bnn is not allowed; .*did you mean 'bn'"),
        ({"init": "zero"}, "method.bn_only.init=zero is not allowed"),
        ({"cut": -1.0}, "method.bn_only.cut=-1.0 is out of range"),
        ({"also": ["layer9.conv"]}, "method.bn_only.also='layer9.conv' matches no tensor"),
        ({"also": ["("]}, "no regular expression"),
        ({"control": "output"}, "control=output needs a model with a classification head"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BNOnly(**options).attach(cifar_resnet(1, depth=8, width=4))


@pytest.mark.parametrize("model", ["vit", "unet"])
def test_models_without_batch_norm_are_refused(model: str, tmp_path: Path) -> None:
    setting = BenchRun("bn_only", [f"model={model}", "model.size=nano"], tmp_path)
    with pytest.raises(UserError, match="method=bn_only trains batch norm, but .* has none"):
        setting.fresh()
    with pytest.raises(UserError, match="has none"):
        BNOnly().attach(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False)))
