"""SNELL: kernel and competition against slow references, the recomputed backward, memory, exact merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.bench_run import BenchRun, probe
from filtrun.cost import saved_for_backward
from filtrun.errors import UserError
from filtrun.methods.peft.kernel_update import (
    KernelUpdate,
    compete,
    distance_kernel,
    linear_kernel,
    magnitude_quantile,
    recomputed,
)  # fmt: skip
from filtrun.methods.peft.lora import LoRA
from filtrun.methods.peft.snell import SNELL
from filtrun.models.vit import ViT

QUIET: dict[str, Any] = {"dropout": 0.0, "drop_path": 0.0}


def test_distance_kernel_by_its_definition() -> None:
    torch.manual_seed(0)
    q_in, q_out = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    slow = torch.zeros(5, 4)
    for i in range(5):
        for j in range(4):
            first, second = ((q_in[h, i] - q_out[h, j]).square().sum().sqrt() for h in range(2))
            slow[i, j] = 0.1 * (first - second)
    assert torch.allclose(distance_kernel(q_in, q_out), slow, atol=1e-6)
    slow = 0.5 * (q_in[0] @ q_out[0].T - q_in[1] @ q_out[1].T)
    assert torch.allclose(linear_kernel(q_in, q_out, 0.5), slow, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.77, 0.9, 0.995, 1.0])
def test_the_quantile_is_that_of_torch_to_the_bit(share: float) -> None:
    torch.manual_seed(0)
    for size in (1, 2, 7, 100, 9_999, 60_000):
        values = torch.randn(size).abs()
        assert torch.equal(magnitude_quantile(values, share), torch.quantile(values, share))


def test_competition_by_hand() -> None:
    kernel = torch.tensor([[1.0, -2.0], [3.0, -4.0]])  # the median magnitude is 2.5
    assert compete(kernel, 0.5, "code").tolist() == [[0, 0], [9, -16]]
    assert compete(kernel, 0.5, "soft").tolist() == [[0, 0], [0.5, -1.5]]
    assert compete(kernel, 0.5, "hard").tolist() == [[0, 0], [3, -4]]
    assert compete(kernel, 0.0, "code") is kernel
    assert compete(kernel, 0.5, "hard", torch.tensor(3.5)).tolist() == [[0, 0], [0, -4]]


@pytest.mark.parametrize(("rule", "slopes"), [("code", [0, 0, 3, 4]), ("soft", [0, 0, 1, 1]), ("hard", [0, 0, 1, 1])])
def test_magnitude_and_threshold_are_constants_for_the_gradient(rule: str, slopes: list[float]) -> None:
    kernel = torch.tensor([[1.0, -2.0], [3.0, -4.0]], requires_grad=True)
    compete(kernel, 0.5, rule).sum().backward()
    assert kernel.grad is not None and kernel.grad.flatten().tolist() == slopes


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.9, 0.995])
def test_the_stated_share_is_exactly_zero_and_the_rank_is_high(sparsity: float) -> None:
    torch.manual_seed(0)
    update = KernelUpdate(96, 80, 8, sparsity, "code", "distance", 0.1, torch.zeros(1))()
    zeros = int((update == 0).sum())
    assert zeros == int(sparsity * (update.numel() - 1)) + 1
    if sparsity < 0.99:
        assert torch.linalg.matrix_rank(update.double()) > 60 > 8


def test_the_linear_kernel_has_the_rank_of_its_factors() -> None:
    torch.manual_seed(0)
    dense = [KernelUpdate(96, 80, 8, 0.0, "code", k, 0.1, torch.zeros(1))().double() for k in ("distance", "linear")]
    assert [int(torch.linalg.matrix_rank(d, rtol=1e-5)) for d in dense][1] == 8
    assert torch.linalg.matrix_rank(dense[0]) > 70


def test_updates_are_tiny_at_the_start() -> None:
    """Measured with the official layer at 768 x 768, r = 8: magnitudes up to 5.4e-3, up to 3.0e-5 after competition."""
    torch.manual_seed(0)
    part = KernelUpdate(768, 768, 8, 0.9, "code", "distance", 0.1, torch.zeros(1))
    assert distance_kernel(part.q_in, part.q_out).abs().max().item() == pytest.approx(5.4e-3, rel=0.2)
    assert part().abs().max().item() == pytest.approx(3.0e-5, rel=0.4)


def test_coincident_rows_give_a_finite_gradient() -> None:
    for size in (3, 40):
        q = torch.randn(2, size, 4).requires_grad_()
        distance_kernel(q, q.detach()).sum().backward()
        assert q.grad is not None and q.grad.isfinite().all()


# -- the backward pass that keeps nothing ------------------------------------------------------------------------------
def test_recomputed_gives_the_same_gradients_and_keeps_its_inputs_alone() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    keep = torch.rand(6, 5) > 0.5

    def function(a: Tensor, b: Tensor, keep: Tensor) -> Tensor:
        return ((a * keep) @ b).exp().tanh()

    wanted = torch.autograd.grad(function(a, b, keep).square().sum(), (a, b))
    found = torch.autograd.grad(recomputed(function, a, b, keep).square().sum(), (a, b))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    nothing = nn.Module()
    inputs = sum(t.untyped_storage().nbytes() for t in (a, b, keep))
    assert saved_for_backward(lambda: recomputed(function, a, b, keep), nothing) == inputs
    assert saved_for_backward(lambda: function(a, b, keep), nothing) > inputs


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), (3, 4, 6)),
    "joint qkv": (lambda: nn.Linear(6, 18, bias=False), (3, 4, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "grouped conv": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9)),
    "reflected conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_adds_the_update_and_merges_exactly(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    name = "qkv" if kind == "joint qkv" else "layer"
    model, x = nn.ModuleDict({name: make()}), torch.randn(shape, requires_grad=True)
    layer: Any = model[name]
    weight, objects = layer.weight.detach().clone(), dict(model.named_parameters())
    snell = SNELL(rank=4, sparsity=0.6, scale=5.0, targets="all", **QUIET).attach(model)
    part = snell.places[0].part
    assert len(part.parts) == (3 if kind == "joint qkv" else 1)
    tuned = layer(x)
    first = torch.autograd.grad(tuned.square().sum(), [x, *snell.parameters()])
    part.recompute = False
    again = torch.autograd.grad(layer(x).square().sum(), [x, *snell.parameters()])
    assert all(torch.equal(f, g) for f, g in zip(first, again, strict=True))
    delta = part.delta().detach()
    assert delta.abs().max() > 0.01
    snell.merge()
    assert torch.allclose(layer.weight, weight + delta, atol=1e-6)
    assert torch.allclose(layer(x), tuned, atol=1e-5)
    assert all(model.get_parameter(n) is p for n, p in objects.items()) and not layer._modules


def test_the_branch_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    model = nn.Sequential(layer)
    snell = SNELL(rank=2, sparsity=0.5, scale=2.0, **QUIET).attach(model)
    part: Any = snell.places[0].part.parts[0]
    kernel = distance_kernel(part.q_in, part.q_out, 2.0)
    limit = kernel.abs().flatten().sort().values[14:16].mean()  # of 30 entries, the middle
    update = kernel * kernel.abs() * (kernel.abs() > limit)
    assert torch.allclose(model(x), F.linear(x, layer.weight, layer.bias) + x @ update, atol=1e-6)


def test_counts_of_the_paper() -> None:
    """(in + out) r for each of q, k, v, proj, fc1, fc2: 165,888 r for ViT-B."""
    model = ViT(3, 10, 32, size="nano", width=32, depth=2, heads=2)
    snell = SNELL(rank=4).attach(model, skip=list(model.head.parameters()))
    assert sum(p.numel() for p in snell.parameters()) == 2 * 18 * 32 * 4
    assert 12 * 18 * 768 == 165_888
    assert len(snell.places) == 12


def test_dropout_and_stochastic_depth_keep_the_mean_and_rest_in_evaluation() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    SNELL(rank=2, sparsity=0.5, scale=3.0, dropout=0.3, drop_path=0.3).attach(model)
    with torch.no_grad():
        want = model.eval()(x)
        assert torch.equal(model(x), want)
        model.train()
        draws = torch.stack([model(x) for _ in range(800)])
    error = (draws.mean(0) - want).abs()
    assert draws.std(0).max() > 0.05 and (error <= 5 * draws.std(0) / 800**0.5 + 1e-5).all()


def training_bytes(model: nn.Module, x: Tensor) -> int:
    """What training keeps: activations for the backward pass, gradients and two moments of what trains."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return saved_for_backward(lambda: model(x), model) + 3 * 4 * trained


def test_training_keeps_less_than_lora_and_full_fine_tuning() -> None:
    x, kept = torch.randn(16, 1, 8, 8), {}
    for name in ("full", "lora", "snell", "snell, updates kept"):
        torch.manual_seed(0)
        model = ViT(1, 10, 8, size="nano", depth=2)
        head = list(model.head.parameters())
        if name == "lora":
            LoRA(rank=8, targets="linear").attach(model, skip=head)
        elif name != "full":
            SNELL(rank=8, recompute=name == "snell", **QUIET).attach(model, skip=head)
        if name != "full":
            for parameter in head:
                parameter.requires_grad_(True)
        kept[name] = saved_for_backward(lambda m=model: m(x), model), training_bytes(model, x)  # type: ignore[misc]
    for part in (0, 1):
        assert kept["snell"][part] < min(kept["lora"][part], kept["full"][part])
    # kept updates: two distances and the kernel behind them, at least 3 in x out numbers for each of 12 layers
    sizes = 2 * 12 * 64 * 64
    assert kept["snell, updates kept"][0] - kept["snell"][0] > 3 * 4 * sizes


# -- in a run ----------------------------------------------------------------------------------------------------------
def test_auto_takes_linear_layers_or_convolutions(tmp_path: Path) -> None:
    for model, kinds in ((["model=vit", "model.size=nano", "model.depth=1"], {nn.Linear}),
                         (["model=resnet20", "model.width=4"], {nn.Conv2d})):  # fmt: skip
        run = BenchRun("snell", model, tmp_path).fresh()
        snell: Any = run.methods[0]
        assert {type(p.layer) for p in snell.places} == kinds
        assert run.weights[[n for n in run.weights if n.endswith(("head.weight", "linear.weight"))][0]].requires_grad


def test_a_run_ends_in_a_plain_model_and_reports_its_memory(tmp_path: Path) -> None:
    setting = BenchRun("snell", ["model=vit", "model.size=nano", "model.depth=1", "method.snell.rank=4"], tmp_path)
    run = setting.trained()
    snell: Any = run.methods[0]
    base = dict(setting.base.named_parameters())
    changed = {n for n, p in run.weights.items() if not torch.equal(p, base[n])}
    assert changed == {"head.weight", "head.bias"}
    report = snell.report(run)
    assert report["factor_rank"] == 4 < report["update_rank"]
    assert report["update_sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert report["adapter_params"] == 18 * 64 * 4
    with run.evaluating(), torch.enable_grad():
        saved = saved_for_backward(lambda: run.task.probe(run), run.model)
    assert saved < report["saved_bytes_kept_updates"]
    snell.verify(run)
    before = probe(run)
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
    assert list(run.model.state_dict()) == list(setting.base.state_dict())


def test_verify_notices_an_update_that_is_too_dense(tmp_path: Path) -> None:
    run = BenchRun("snell", ["model=vit", "model.size=nano", "model.depth=1"], tmp_path).fresh()
    snell: Any = run.methods[0]
    for place in snell.places:
        for part in place.part.parts:
            part.sparsity = 0.5
    with pytest.raises(ValueError, match="entries of the update of blocks.0.attn.q.weight are zero"):
        snell.verify(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "method.snell.rank=3 must be even"),
        ({"rank": 0}, "method.snell.rank=0 is out of range"),
        ({"sparsity": 1.0}, "method.snell.sparsity=1.0 is out of range"),
        ({"sparsify": "sofd"}, "method.snell.sparsify=sofd is not allowed; .*; did you mean 'soft'"),
        ({"kernel": "rbf"}, "choose from distance, linear"),
        ({"targets": "conv"}, "method.snell.targets='conv' matches no layer"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SNELL(**options).attach(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("rule", ["code", "soft"])
def test_a_large_update_in_blocks_is_the_whole_one(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    torch.manual_seed(0)
    update = KernelUpdate(40, 37, 4, 0.8, rule, "distance", 0.1, torch.zeros(1))
    whole = update.build(update.q_in, update.q_out, []).T
    by_q = torch.autograd.grad((whole * torch.arange(37.0)[:, None]).square().sum(), update.parameters())
    monkeypatch.setattr("filtrun.methods.peft.kernel_update.BLOCK", 40 * 5)
    known: list[Tensor] = []
    blocks = update.rows(update.q_in, update.q_out, known)
    assert [len(block) for block in blocks] == [5] * 7 + [2]
    rows = torch.cat(blocks)
    torch.testing.assert_close(rows, whole)
    again = torch.cat(update.rows(update.q_in, update.q_out, known))
    assert torch.equal(again, rows) and len(known) == 1  # the backward pass makes the same update
    found = torch.autograd.grad((rows * torch.arange(37.0)[:, None]).square().sum(), update.parameters())
    for one, two in zip(found, by_q, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_layers_with_large_updates_compute_what_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 16, 12))
    SNELL(rank=4, sparsity=0.5, targets="all", head=False, **QUIET).attach(net)
    x = torch.randn(2, 3, 4, 4)
    expected = net(x)
    wanted = torch.autograd.grad(expected.square().sum(), [p for p in net.parameters() if p.requires_grad])
    for module in ("kernel_update", "snell"):
        monkeypatch.setattr(f"filtrun.methods.peft.{module}.BLOCK", 100)
    found = net(x)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.square().sum(), [p for p in net.parameters() if p.requires_grad])
    for one, two in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
