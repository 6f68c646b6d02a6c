"""FTWT: targets against slow references, the gate, its loss and its two ways to count, and whole runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filtrun import runner
from filtrun.bench_run import BenchRun
from filtrun.cost import layer_macs
from filtrun.errors import Unfit, UserError
from filtrun.methods.pruning import gates
from filtrun.methods.pruning.ftwt import CHILD, FTWT
from filtrun.models.mobilenet import MobileNetV2
from filtrun.models.resnet import CifarResNet
from filtrun.models.vgg import VGG16

SMALL = ["model=resnet20", "model.depth=8", "model.width=4", "method.ftwt.estimate_batches=1"]


def maps(n: int = 6, c: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(n, c, 4, 4, generator=generator).relu() * torch.rand(n, c, 1, 1, generator=generator)
    out[0, 3] = 0
    return out


def images(n: int = 4, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def resnet(depth: int = 8) -> CifarResNet:
    torch.manual_seed(2)
    return CifarResNet(3, 10, depth, 4).eval()


# -- targets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("r", [0.3, 0.6, 0.9])
def test_mass_target_equals_a_slow_reference(r: float) -> None:
    out = maps()
    for sample, mask in zip(out, gates.mass_target(out, r), strict=True):
        strength = [channel.abs().max().item() for channel in sample]
        running, keep = 0.0, [0.0] * len(strength)
        for j in sorted(range(len(strength)), key=lambda j: -strength[j]):
            running += strength[j] / sum(strength)
            keep[j] = float(running <= r + 1e-5)
        assert mask.flatten().tolist() == keep


def test_mass_target_at_its_ends() -> None:
    out = maps()
    dead = out.abs().amax((2, 3)) == 0
    assert torch.equal(gates.mass_target(out, 1.0).flatten(1), (~dead).float()) and dead.sum() == 1
    assert gates.mass_target(out, -1).all() and gates.uniform_target(out, -1).all()
    lone = torch.zeros(1, 4, 2, 2)
    lone[0, 1], lone[0, 2] = 9.0, 1.0
    assert gates.mass_target(lone, 0.8).sum() == 0  # one filter holds more than r: all go
    assert gates.mass_target(lone, 0.9).flatten().tolist() == [0, 1, 0, 0]
    assert gates.mass_target(torch.zeros(1, 4, 2, 2), 0.5).all()


def test_kept_filters_grow_with_r() -> None:
    out = maps(32, 16)
    counts = torch.stack([gates.mass_target(out, r).sum((1, 2, 3)) for r in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0)])
    assert (counts.diff(dim=0) >= 0).all() and (counts[-1] > counts[0]).all()


def test_uniform_target_drops_the_weakest_and_the_dead() -> None:
    out = torch.tensor([[3.0, 0.0, 2.0, 1.0, 5.0], [0.0, 0.0, 0.0, 1.0, -5.0]])[:, :, None, None].expand(2, 5, 2, 2)
    assert gates.uniform_target(out, 0.5).flatten(1).tolist() == [[1, 0, 1, 0, 1], [0, 0, 0, 1, 1]]
    assert gates.uniform_target(out, 0.0).flatten(1).tolist() == [[1, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


# -- predictor and loss ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_predictor_is_its_formula(pool: str) -> None:
    predictor, x = gates.MaskPredictor(3, 5, pool), images()
    pooled = x.mean((2, 3)) if pool == "avg" else x.amax((2, 3))
    expected = torch.softmax(pooled, 1) @ predictor.head.weight.flatten(1).T + predictor.head.bias
    torch.testing.assert_close(predictor(x).flatten(1), expected)
    plain = gates.MaskPredictor(3, 5, pool, softmax=False)
    expected = pooled @ plain.head.weight.flatten(1).T + plain.head.bias
    torch.testing.assert_close(plain(x).flatten(1), expected)


def test_embedding_sets_the_pooled_side() -> None:
    predictor = gates.MaskPredictor(3, 5, embedding=48)
    assert predictor.side == 4 and predictor.macs == 48 * 5 and predictor(images()).shape == (4, 5, 1, 1)
    assert gates.MaskPredictor(64, 5, embedding=8).side == 1


def test_gate_is_strict_and_has_no_gradient() -> None:
    logits = torch.tensor([-1.0, 0.0, 1e-9, 0.1], requires_grad=True)
    assert gates.binary_gate(logits).tolist() == [0, 0, 0, 1]  # sigmoid(1e-9) is 0.5 in float32
    assert not gates.binary_gate(logits).requires_grad


def test_mask_loss_is_its_formula() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(5, c, 1, 1) for c in (3, 7)]
    targets = [torch.rand(5, c, 1, 1).round() for c in (3, 7)]
    expected = 0.0
    for z, t in zip(logits, targets, strict=True):
        for zi, ti in zip(z.flatten().tolist(), t.flatten().tolist(), strict=True):
            p = 1 / (1 + math.exp(-zi))
            expected -= (math.log(p) if ti else math.log(1 - p)) / 5 / 2
    assert gates.mask_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_mask_weight_ends_with_the_cooldown() -> None:
    for epochs, cooldown in [(10, 0.5), (7, 0.5), (9, 0.3), (4, 1.0), (4, 0.0)]:
        first = math.ceil(cooldown * epochs)
        weights = [gates.mask_weight(e, epochs, cooldown) for e in range(epochs)]
        assert weights == [1.0] * first + [0.0] * (epochs - first)


# -- on models -------------------------------------------------------------------------------------------------------
MODELS = [
    (lambda: resnet(20), 19, 8),
    (lambda: VGG16(3, 10, 32, 0.05).eval(), 13, 32),
    (lambda: MobileNetV2(3, 10, 32, 0.1).eval(), 52, 32),
]


@pytest.mark.parametrize(("make", "count", "side"), MODELS)
def test_open_gates_change_nothing_and_cost_the_dense_network(make, count: int, side: int) -> None:
    torch.manual_seed(0)
    model, x = make(), images(2, side)
    names, dense = [n for n, _ in model.named_parameters()], model(x)
    macs = sum(v for name, v in layer_macs(model, lambda: model(x)).items() if name not in ("linear", "classifier"))
    method = FTWT(r=-1).attach(model, x[:1])
    assert len(method.gates) == count and [n for n, _ in model.named_parameters() if CHILD not in n] == names
    with method.counting() as counter:
        assert torch.equal(model(x), dense)
    assert counter.dense == macs and counter.official.tolist() == counter.executable.tolist() == [macs] * 2
    for gate in method.gates:  # the same by certain predictors
        gate.state = "gate"
        gate.predictor.head.bias.data.fill_(math.inf)
    assert torch.equal(model(x), dense)
    for gate in method.gates:
        gate.predictor.head.bias.data.fill_(-math.inf)
    with method.counting() as counter:
        closed = model(x)
    assert torch.equal(closed[0], closed[1]) and not counter.official.any() and not counter.executable.any()


@pytest.mark.parametrize("after", [False, True])
def test_gated_resnet_equals_a_slow_reference(after: bool) -> None:
    model, x = resnet(), images()
    plain = copy.deepcopy(model)
    method = FTWT(r=0.9, gt_after_block=after).attach(model, x[:1])
    with method.counting() as counter:
        out = model(x)
    queue, flops = list(method.gates), {"official": torch.zeros(4), "executable": torch.zeros(4)}
    known = {"previous": torch.full((4,), 3.0)}

    def gated(conv, h, alive, activation):
        gate, o = queue.pop(0), activation(h)
        torch.testing.assert_close(gate.target, gates.mass_target(o, 0.9))
        keep = gate.keep
        size = o.shape[2] * o.shape[3] * 9
        flops["official"] += keep.sum((1, 2, 3)) * known["previous"] * size
        flops["executable"] += keep.sum((1, 2, 3)) * alive.sum((1, 2, 3)) * size
        known["previous"] = keep.sum((1, 2, 3))
        return o * keep, keep

    h, alive = gated(plain.conv1, plain.bn1(plain.conv1(x)), torch.ones(4, 3, 1, 1), F.relu)
    for block in (*plain.layer1, *plain.layer2, *plain.layer3):
        skip, skip_alive = block.shortcut(h), alive
        if skip.shape[1] != h.shape[1]:
            skip_alive = F.pad(alive, (0, 0, 0, 0, block.shortcut.before, block.shortcut.after))
        inner, inner_alive = gated(block.conv1, block.bn1(block.conv1(h)), alive, F.relu)
        last = block.bn2(block.conv2(inner))
        if after:
            h, alive = gated(block.conv2, last + skip, inner_alive, F.relu)
        else:
            last, alive = gated(block.conv2, last, inner_alive, lambda o: o)
            h, alive = F.relu(last + skip), ((alive + skip_alive) > 0).float()
    torch.testing.assert_close(out, plain.linear(h.mean((2, 3))))
    assert counter.official.tolist() == flops["official"].tolist()
    assert counter.executable.tolist() == flops["executable"].tolist()
    result = counter.result()
    assert result["flops_official"] == flops["official"].mean().item() and result["counted_images"] == 4
    assert result["flops_executable"] == result["flops_official"] if after else result["flops_executable"] >= (
        result["flops_official"]
    )  # fmt: skip


def test_grouped_layers_are_counted_by_group() -> None:
    keep, inputs = torch.tensor([[1, 0, 1, 1]]).bool(), torch.tensor([[1, 1, 0, 1]]).bool()
    assert gates.executable_macs(keep, inputs, 10, 4, 9).item() == 2 * 90  # depthwise: open on both sides
    assert gates.executable_macs(keep, inputs, 10, 2, 9).item() == (1 * 2 + 2 * 1) * 90
    assert gates.official_macs(torch.tensor([3]), torch.tensor([3]), 10, 4, 9).item() == 0  # 3 // 4
    assert gates.official_macs(torch.tensor([3]), torch.tensor([4]), 10, 4, 9).item() == 3 * 90


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_only_joint_mode_reaches_the_backbone(mode: str) -> None:
    model, x = resnet().train(), images()
    backbone = list(model.parameters())
    method = FTWT(mode=mode).attach(model, x[:1])
    model(x)
    method.mask_loss().backward()
    reached = [p for p in backbone if p.grad is not None and p.grad.any()]
    assert bool(reached) == (mode == "joint")
    assert all(p.grad is not None for p in method.predictors())
    model.zero_grad()
    model(x).sum().backward()  # the task's loss never trains a predictor
    assert all(p.grad is None for p in method.predictors())


def test_a_projection_shortcut_and_ignored_layers_stay_dense() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.down, self.bn3, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x):
            h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            h += self.bn3(self.down(x))
            return self.relu(h)

    model, x = Block().eval(), images()
    method = FTWT().attach(model, x[:1])
    assert len(method.gates) == 2 and CHILD not in model.down._modules
    assert [gate.activation for gate in method.gates] == ["relu", "identity"]
    model = Block().eval()
    method = FTWT(ignore=["conv1"]).attach(model, x[:1])
    with method.counting() as counter:
        model(x)
    assert len(method.gates) == 1 and counter.dense == 4 * 64 * 4 * 9
    assert (counter.executable == method.gates[0].keep.sum((1, 2, 3)) * 64 * 4 * 9).all()


# -- in a run --------------------------------------------------------------------------------------------------------
def test_a_run_trains_predictors_by_their_own_sgd(tmp_path) -> None:
    bench = BenchRun("ftwt", [*SMALL, "method.ftwt.r=0.8"], tmp_path)
    run = bench.fresh(steps=4, lr=0.0, weight_decay=0.5)  # neither reaches the predictors
    method = run.methods[0]
    assert set(method.predicted) >= {"flops_official", "reduction_official", "flops_executable"}
    runner.setup(run)
    own = {id(p) for p in method.predictors()}
    group = next(g for g in run.optimizer.param_groups if id(g["params"][0]) in own)
    assert group["weight_decay"] == 0.0 and group["lr"] == 0.1 and {id(p) for p in group["params"]} == own
    start = [p.detach().clone() for p in method.predictors()]
    buffers = [torch.zeros_like(p) for p in start]
    plain = method.after_backward

    def after_backward(run):
        if run.step >= 2:  # after the cooldown
            assert all(not p.grad.any() for p in method.predictors())
        for p, value, buffer in zip(method.predictors(), start, buffers, strict=True):
            buffer.mul_(0.9).add_(p.grad)
            value.sub_(buffer, alpha=0.1)
        plain(run)
        assert all(p.grad is None for p in method.predictors())

    method.after_backward = after_backward
    runner.fit(run)
    for p, value in zip(method.predictors(), start, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-6)
    with run.evaluating():
        run.task.evaluate(run)
    report = method.report(run)
    assert report["counted_images"] == len(run.data.split("test", "all"))
    assert 0 < report["flops_official"] <= report["flops_executable"] <= method.counter.dense
    assert report["prediction_error"] == report["reduction_official"] - report["predicted_reduction_official"]
    open_cost = 10 * 16 + sum(gate.predictor.macs for gate in method.gates)  # classifier and predictors
    assert report["macs"] == report["flops_executable"] + open_cost


def test_the_prediction_is_the_cost_of_the_targets(tmp_path) -> None:
    run = BenchRun("ftwt", [*SMALL, "method.ftwt.head_init=ones"], tmp_path).fresh()
    method = run.methods[0]
    with run.plainly(), method.counting() as counter:
        run.task.probe(run)
    assert counter.result()["reduction_official"] == 0  # all open at the start
    batch = next(iter(run.batches(1_000_000, skip=0)))
    with run.evaluating():
        run.task.loss(run, batch)
        official, executable = method.counter.macs(
            [g.target.flatten(1) > 0 for g in method.gates], [g.positions for g in method.gates]
        )
    assert method.predicted["flops_official"] == official.double().mean().item()
    assert method.predicted["flops_executable"] == executable.double().mean().item()


@pytest.mark.parametrize("r", [0.7, 0.9])
def test_the_reduction_is_known_before_training(r: float) -> None:
    """Within 2 % of what the gates leave once predictors, fine enough to tell images apart, have learnt."""
    torch.manual_seed(0)
    model, x = CifarResNet(3, 10, 8, 8).eval(), images(16)
    method = FTWT(r=r, softmax=False, embedding=256).attach(model, x[:1])
    with torch.no_grad(), method.observing(), method.counting() as counter:
        model(x)
    before = counter.result()
    teacher = torch.optim.Adam(method.predictors(), lr=0.02)
    for _ in range(120):
        teacher.zero_grad()
        model(x)
        method.mask_loss().backward()
        teacher.step()
    with torch.no_grad(), method.counting() as counter:
        model(x)
    after = counter.result()
    assert after["mask_accuracy"] > 0.99 and 0.3 < before["reduction_official"] < 0.9
    for rule in ("reduction_official", "reduction_executable"):
        assert abs(after[rule] - before[rule]) < 0.02


def test_bad_options() -> None:
    with pytest.raises(UserError, match="method.ftwt.r=1.5"):
        FTWT(r=1.5)
    with pytest.raises(UserError, match="embedding=0"):
        FTWT(embedding=0)
    with pytest.raises(UserError, match="choose from mass, uniform"):
        FTWT(gt_type="static")
    with pytest.raises(UserError, match="names no gated layer; did you mean 'conv1'"):
        FTWT(ignore=["convv1"]).attach(resnet(), images(1))
    with pytest.raises(Unfit, match="no convolution with a batch norm"):
        FTWT().attach(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), images(1))
    model = resnet()
    method = FTWT().attach(model, images(1))
    with pytest.raises(UserError, match="gates already"):
        FTWT().attach(model, images(1))
    with pytest.raises(UserError, match="needs a forward pass"):
        method.mask_loss()
