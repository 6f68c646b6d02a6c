"""SPT: sensitivity and allocation against slow references, sparse gradients, merging, and what a reload restores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.bench_run import BenchRun, probe
from filtrun.errors import UserError
from filtrun.methods.peft.spt import SPT, sensitivity
from filtrun.methods.peft.spt_allocation import (
    Allocation,
    Slot,
    adapter_size,
    allocate,
    choose_tau,
    kind_of,
    lora_size,
    rank_entries,
    tau_grid,
)
from filtrun.methods.peft.spt_layers import Structured, crossings, sparse_linear, sparse_product
from filtrun.methods.peft.spt_slots import find_tensors
from filtrun.models.resnet import CifarResNet
from filtrun.models.timm_models import timm_classifier
from filtrun.models.unet import UNet
from filtrun.models.vit import ViT


def test_sensitivity_of_a_linear_layer_by_hand() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    batches = [(torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(3)]
    parameters = dict(layer.named_parameters())
    found = sensitivity((F.mse_loss(layer(x), y) for x, y in batches), parameters)
    weight, bias = torch.zeros(2, 3).double(), torch.zeros(2).double()
    for x, y in batches:  # the gradient of the mean over 5 x 2 squared errors
        error = x @ layer.weight.T + layer.bias - y
        weight += (2 * error.T @ x / 10) ** 2
        bias += (2 * error.sum(0) / 10) ** 2
    assert torch.allclose(found["weight"], weight) and torch.allclose(found["bias"], bias)
    unused = sensitivity([layer.weight.sum()], {**parameters, "other": nn.Parameter(torch.ones(2))})
    assert unused["other"].tolist() == [0, 0] and unused["weight"].unique().tolist() == [1]


SLOTS = [
    Slot("a", "a", 0, 6, module_size=20),
    Slot("b", "b", 0, 8, vector=True),
    Slot("c", "c", 0, 5),
    Slot("d", "d", 0, 4, vector=True),
]
SHAPES = [(6, 7), (8,), (5, 5), (4,)]


def scores(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, shape, generator=generator).float() for shape in SHAPES]  # with ties


def slow(values: list[Tensor], tau: int, alpha: float, beta: float) -> Allocation:
    """The rules entry by entry."""
    entries = [(-v.item(), i, j) for i, s in enumerate(values) for j, v in enumerate(s.flatten())]
    marked: dict[int, list[int]] = {i: [] for i in range(len(values))}
    for _, i, j in sorted(entries)[:tau]:
        marked[i].append(j)
    made = Allocation(tau, 0)
    for i, slot in enumerate(SLOTS):
        n = len(marked[i])
        if slot.vector and n >= values[i].numel() / beta:
            made.vectors.append(slot.name)
            made.total += values[i].numel()
        elif slot.module_size and n >= slot.module_size / alpha:
            made.structured.append(slot.name)
            made.total += slot.module_size
        elif n:
            made.entries[slot.name] = torch.tensor(sorted(marked[i]))
            made.total += n
    return made


@pytest.mark.parametrize("seed", range(4))
def test_allocation_against_the_rules_entry_by_entry(seed: int) -> None:
    values = scores(seed)
    places = rank_entries(values)
    totals = {}
    for tau in range(1, 70):
        found, want = allocate(SLOTS, places, tau, 2.0, 5.0), slow(values, tau, 2.0, 5.0)
        assert found.same(want) and found.total == want.total
        totals[tau] = found.total
    for budget in (3, 11, 24, 60):
        best = min(abs(total + 2 - budget) for total in totals.values())
        last = max(tau for tau, total in totals.items() if abs(total + 2 - budget) == best)
        assert choose_tau(SLOTS, places, budget, range(1, 70), 2.0, 5.0, extra=2) == last


def test_thresholds_and_sizes() -> None:
    matrix, vector = Slot("m", "m", 0, 9, module_size=30), Slot("v", "v", 0, 10, vector=True)
    assert [kind_of(matrix, 99, n, 10, 5) for n in (2, 3)] == ["entries", "structured"]
    assert [kind_of(vector, 10, n, 10, 5) for n in (1, 2)] == ["entries", "vector"]
    assert lora_size(768, 3072, 8) == 30720 and lora_size(16, 32, 4, 9) == 4 * (144 + 32)
    assert adapter_size(768, 768, 8) == 2 * 768 * 8 + 8 + 768
    grid = tau_grid(400_000, None, 10**8)
    assert grid[0] == 20_000 and grid[-1] == 1_580_000 and len(grid) == 79
    assert tau_grid(50, 7, 20) == [7, 14, 20]


def test_entries_are_as_many_as_asked_for_and_meet_the_budget() -> None:
    values = scores(9)
    places = rank_entries(values)
    plain = [Slot(s.name, s.tensor, s.start, s.stop) for s in SLOTS]  # no modules, no whole vectors
    for tau in (1, 7, 30):
        assert allocate(plain, places, tau, 10, 5).total == tau
        assert sum(len(at) for at in allocate(plain, places, tau, 10, 5).entries.values()) == tau
    taus = range(5, 70, 5)
    assert all(abs(choose_tau(plain, places, b, taus, 10, 5) - b) <= 2.5 for b in range(5, 60))


def test_sparse_gradient_is_the_masked_dense_one() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 9).double(), torch.randn(7).double()
    mask = torch.rand(7, 9) < 0.2
    index, rows = mask.flatten().nonzero().flatten(), torch.tensor([1, 4])
    x = torch.randn(2, 5, 9).double().requires_grad_()
    delta = torch.randn(len(index)).double().requires_grad_()
    add = torch.randn(2).double().requires_grad_()
    y = sparse_linear(x, weight, bias, delta, index, add, rows)
    dense = weight.flatten().index_add(0, index, delta.detach()).view(7, 9).requires_grad_()
    other = bias.index_add(0, rows, add.detach()).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    want = F.linear(x2, dense, other)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    assert (y - want).abs().max() < 1e-12
    assert delta.grad is not None and dense.grad is not None and add.grad is not None and other.grad is not None
    assert (delta.grad - dense.grad.flatten()[index]).abs().max() < 1e-10
    assert (add.grad - other.grad[rows]).abs().max() < 1e-10 and torch.allclose(x.grad, x2.grad)  # type: ignore[arg-type]


def test_backward_keeps_the_needed_features_only() -> None:
    kept: list[Tensor] = []
    index = torch.tensor([3, 13, 17])  # rows 0, 1, 1 and columns 3, 3, 7 of a matrix with ten columns
    rows, cols, place = crossings(index, 10)
    assert rows.tolist() == [0, 1] and cols.tolist() == [3, 7] and place.tolist() == [0, 2, 3]
    delta = torch.ones(3, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sparse_product(torch.randn(50, 10), delta, rows, cols, place)
    assert max(t.numel() for t in kept) == 50 * 2


def test_modules_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9), torch.randn(2, 4, 6)
    out = layer(x)
    lora = Structured(layer, "lora", 2, 3, 9, 0.0, 0.0).eval()
    behind = Structured(layer, "adapter", 2, 3, 9, 0.0, 0.0).eval()
    beside = Structured(layer, "adapter", 2, 0, 9, 0.0, 0.0, parallel=True).eval()
    for part, size in ((lora, 2 * (6 + 6)), (behind, 2 * (6 + 6) + 2 + 6), (beside, 2 * (6 + 9) + 2 + 9)):
        assert sum(p.numel() for p in part.parameters()) == size
        assert torch.equal(part.behind(layer, (x,), out), out)
        nn.init.normal_(part.up.weight)  # type: ignore[arg-type]
    got = lora.behind(layer, (x,), out)
    assert torch.equal(got[..., :3], out[..., :3])
    assert torch.allclose(got[..., 3:], out[..., 3:] + (x.double() @ lora.delta().T).float(), atol=1e-5)
    h = out[..., 3:]
    assert torch.allclose(behind.behind(layer, (x,), out)[..., 3:], h + behind.up(F.gelu(behind.down(h))), atol=1e-6)
    assert torch.allclose(beside.behind(layer, (x,), out), out + beside.up(F.gelu(beside.down(x))), atol=1e-6)


def test_a_low_rank_convolution_is_a_convolution_with_its_product() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), torch.randn(2, 4, 7, 7)
    part = Structured(conv, "lora", 2, 0, 6, 0.0, 0.0).eval()
    nn.init.normal_(part.up.weight)  # type: ignore[arg-type]
    want = conv._conv_forward(x, conv.weight + part.delta().float().view_as(conv.weight), conv.bias)
    assert torch.allclose(part.behind(conv, (x,), conv(x)), want, atol=1e-5)


def test_what_competes() -> None:
    vit = ViT(1, 10, 8, size="nano", depth=1)
    found = find_tensors(vit, list(vit.head.parameters()), "lora", 4)
    names = {n for n, _ in vit.named_parameters()}
    assert names - found.parameters.keys() == {
        "token", "positions", "patch.weight", "patch.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert found.projections == {"blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"}
    sizes = {s.name: s.module_size for s in found.slots}
    assert sizes["blocks.0.attn.q.weight"] == 4 * 128 and sizes["blocks.0.mlp.fc1.weight"] == 4 * (64 + 256)
    net = CifarResNet(1, 10, 8, width=8)
    tensors = find_tensors(net, list(net.linear.parameters()), "lora", 2)
    assert "conv1.weight" not in tensors.parameters and "layer1.0.bn1.weight" in tensors.parameters
    assert {s.name: s.module_size for s in tensors.slots}["layer2.0.conv1.weight"] == 2 * (8 * 9 + 16)
    unet = find_tensors(UNet(size="nano"), [], "none", 2)
    assert "classes.weight" not in unet.parameters and all(s.module_size is None for s in unet.slots)
    assert {"middle.attn.qkv.weight:q", "middle.attn.qkv.bias:v"} <= {s.name for s in unet.slots}


def some_batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(6, 1, 8, 8), torch.randint(0, 10, (6,))) for _ in range(count)]


def models(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        return ViT(1, 10, 8, size="nano", depth=2).eval()
    if kind == "resnet":
        return CifarResNet(1, 10, 8).eval()
    options: dict[str, Any] = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.1}
    return timm_classifier("vit_tiny_patch16_224", in_channels=1, image_size=8, **options).eval()


@pytest.mark.parametrize("structured", ["lora", "adapter", "none"])
@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_it_starts_at_the_base_trains_what_it_says_and_merges(kind: str, structured: str) -> None:
    model = models(kind)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    x, objects = torch.randn(2, 1, 8, 8), dict(model.named_parameters())
    want = model(x).detach()
    spt = SPT(budget=0.08, structured=structured, rank=2, alpha=10).attach(model, some_batches(), F.cross_entropy)
    chosen = spt.chosen
    assert chosen is not None and torch.allclose(model(x), want, atol=1e-6)
    assert all(torch.equal(b, base[n]) for n, b in model.named_buffers() if n in base)  # statistics, and not training
    assert not model.training and (structured == "none") == (not chosen.structured)
    assert chosen.total + sum(p.numel() for p in spt._tokens) == sum(p.numel() for p in spt.parameters())
    with torch.no_grad():
        for parameter in spt.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        tuned = model(x)
        assert (tuned - want).abs().max() > 1e-3
        spt.merge()
        assert (model(x) - tuned).abs().max() < 1e-5 * tuned.abs().max().clamp(min=1)
    if structured != "adapter":
        assert list(model.state_dict()) == list(base) and all(p is objects[n] for n, p in model.named_parameters())
    slots = {s.name: s for s in spt._tensors.slots}  # type: ignore[union-attr]
    free = {n: torch.ones_like(p, dtype=torch.bool) for n, p in objects.items()}
    for name in (*chosen.structured, *chosen.vectors):
        free[slots[name].tensor][slots[name].start : slots[name].stop] = False
    for name, at in chosen.entries.items():
        part = free[slots[name].tensor][slots[name].start : slots[name].stop]
        part.view(-1)[at] = False
    for name, mask in free.items():
        if not any(objects[name] is t for t in spt._tokens):
            assert torch.equal(objects[name][mask], base[name][mask]), name


def test_criteria_choose_different_entries_and_the_same_number() -> None:
    made = {}
    for criterion in ("sensitivity", "random", "lowest"):
        spt = SPT(budget=500, structured="none", beta=1.0, criterion=criterion, class_token=False)
        made[criterion] = spt.attach(models("vit"), some_batches(), F.cross_entropy).chosen
    totals = {c.total for c in made.values() if c is not None}
    assert totals == {500}
    again = SPT(budget=500, structured="none", beta=1.0, class_token=False)
    top = again.attach(models("vit"), some_batches(), F.cross_entropy).chosen
    assert top is not None and made["sensitivity"] is not None and top.same(made["sensitivity"])
    assert not top.same(made["lowest"]) and not top.same(made["random"])  # type: ignore[arg-type]


def test_norms_stay_frozen_on_request() -> None:
    counts = []
    for skip in (False, True):
        spt = SPT(budget=3000, structured="none", beta=1.0, official_skip_norms=skip, class_token=False)
        spt.attach(models("vit"), some_batches(), F.cross_entropy)
        assert spt.chosen is not None
        norms = sum(len(at) for name, at in spt.chosen.entries.items() if "norm" in name)
        counts.append((spt.chosen.total, sum(p.numel() for p in spt.parameters()), norms))
    assert counts[0] == (3000, 3000, counts[1][2]) and counts[1][1] == 3000 - counts[1][2] < 3000


def test_at_most_so_many_batches_are_read() -> None:
    read = []

    def batches() -> Any:
        for pair in some_batches(5):
            read.append(1)
            yield pair

    SPT(sensitivity_batches=2).attach(models("resnet"), batches(), F.cross_entropy)
    assert len(read) == 2


def test_a_budget_without_room_is_told() -> None:
    with pytest.raises(UserError, match=r"method\.spt\.budget=10 is 10 parameters, of which the class token takes 64"):
        SPT(budget=10).attach(models("vit"), some_batches(), F.cross_entropy)
    with pytest.raises(UserError, match="structured=conv is not allowed"):
        SPT(structured="conv")


WORDS = ["model=vit", "model.size=nano", "model.depth=1", "method.spt.budget=0.1", "method.spt.rank=2"]


def test_a_stored_choice_wins_over_the_one_made_here(tmp_path: Path) -> None:
    setting = BenchRun("spt", WORDS, tmp_path)
    run = setting.trained()
    before, saved = probe(run), run.methods[0].state_dict()
    tensors = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    other = BenchRun("spt", [*WORDS, "method.spt.criterion=random"], tmp_path).fresh()
    spt: Any = other.methods[0]
    assert not spt.chosen.same(run.methods[0].chosen)  # type: ignore[attr-defined]
    spt.load_state_dict(saved)
    with torch.no_grad():
        own = dict(other.model.named_parameters())
        assert own.keys() == tensors.keys()
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    assert torch.equal(probe(other), before)
    trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert {n for n, p in other.model.named_parameters() if p.requires_grad} == trainable
    later = BenchRun("spt", [*WORDS, "method.spt.criterion=random"], tmp_path).trained()
    with pytest.raises(UserError, match="chose other parameters than this machine does"):
        later.methods[0].load_state_dict(saved)


def test_preparing_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    setting = BenchRun("spt", ["model=unet", "model.size=nano"], tmp_path)
    run = setting.fresh(edit=False)
    run.weights, keys, net = dict(run.model.named_parameters()), set(run.shared), run.net
    run.methods[0].prepare(run)
    assert set(run.shared) == keys and run.net is net
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), setting.base.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in run.model.parameters())


def test_it_composes_with_adapters_and_not_with_what_changes_the_same_tensors(tmp_path: Path) -> None:
    words = [*WORDS, "method.adapter.dim=2"]
    for order in ("spt,adapter", "adapter,spt"):
        run = BenchRun(f"[{order}]", words, tmp_path).trained()
        before = probe(run)
        run.each_reversed("finish")
        assert (probe(run) - before).abs().max() < 1e-5
    with pytest.raises(UserError, match="both claim the tensor"):
        BenchRun("[spt,sara]", [*WORDS, "method.sara.fraction=0.1"], tmp_path).fresh()
