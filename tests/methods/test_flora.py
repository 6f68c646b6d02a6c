"""FLoRA: the Tucker product against einsum, every kind of layer, exact merging, and the structure it can express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.bench_run import BenchRun, probe
from filtrun.errors import UserError
from filtrun.methods.peft.flora import FLoRA, TuckerUpdate, ranks_for, tucker_delta


def randomise(model: nn.Module) -> None:
    """Give every trainable tensor values that are not its start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def drawn(dims: list[int], ranks: list[int]) -> tuple[Tensor, list[Tensor]]:
    """A random core and factors in double precision."""
    generator = torch.Generator().manual_seed(3)
    core = torch.randn(ranks, generator=generator, dtype=torch.float64)
    pairs = zip(dims, ranks, strict=True)
    return core, [torch.randn(d, r, generator=generator, dtype=torch.float64) for d, r in pairs]


@pytest.mark.parametrize(
    ("dims", "ranks", "equation"),
    [
        ([5, 7], [2, 3], "ab,ia,ob->oi"),
        ([5, 7, 3], [2, 3, 2], "abc,ia,ob,kc->oik"),
        ([5, 7, 3, 3], [2, 3, 2, 2], "abcd,ia,ob,kc,ld->oikl"),
        ([4, 3, 3, 2, 3], [2, 3, 2, 1, 3], "abcde,ia,ob,kc,ld,me->oiklm"),
    ],
)
def test_the_product_is_the_sum_over_the_core(dims: list[int], ranks: list[int], equation: str) -> None:
    core, factors = drawn(dims, ranks)
    delta = tucker_delta(core, factors, 4.0)
    assert delta.shape == (dims[1], dims[0], *dims[2:])
    assert (delta - 4 * torch.einsum(equation, core, *factors)).abs().max() < 1e-12
    order = (1, 0, *range(2, len(dims)))
    for axis, rank in zip(order, ranks, strict=True):
        others = torch.Size(ranks).numel() // rank
        assert torch.linalg.matrix_rank(delta.movedim(axis, 0).flatten(1)) == min(rank, others)


def test_for_a_matrix_it_is_lora_with_a_core() -> None:
    core, (a_in, a_out) = drawn([6, 9], [2, 2])
    assert torch.allclose(tucker_delta(core, [a_in, a_out], 0.5), 0.5 * a_out @ core.T @ a_in.T)


def test_ranks_are_cut_to_the_axes() -> None:
    assert ranks_for((64, 32, 3, 3), 16, None, 2) == [16, 16, 2, 2]
    assert ranks_for((8, 4, 1, 3), 16, 6, 2) == [4, 6, 1, 2]
    assert ranks_for((8, 4), 3, None, 2) == [3, 3]


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), (3, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 10, bias=False), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "conv 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (1, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "depth-wise": (lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 5, 5, 5)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 7, 7)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_starts_at_the_base_and_merges_exactly(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    x, layer, objects = torch.randn(shape), model[0], dict(model.named_parameters())
    start: Tensor = layer.weight.detach().clone()  # type: ignore[union-attr, operator, assignment]
    with torch.no_grad():
        want = model(x)
        flora = FLoRA(rank=2, rank_out=3, scale=1.5, dropout=0.0).attach(model)
        assert torch.equal(model(x), want)
        trained = flora.parameters()
        ranks = ranks_for(start.shape, 2, 3, 2)
        dims = [start.shape[1], start.shape[0], *start.shape[2:]]
        size = torch.Size(ranks).numel() + sum(d * r for d, r in zip(dims, ranks, strict=True))
        assert sum(p.numel() for p in trained) == size
        randomise(model)
        tuned = model(x)
        assert (tuned - want).abs().max() > 0.01
        ((_, delta),) = flora.deltas()
        flora.merge()
        assert (model(x) - tuned).abs().max() < 1e-5
        assert torch.allclose(model[0].weight, start + delta, atol=1e-6)  # type: ignore[arg-type]
    assert model[0] is layer and dict(model.named_parameters()).keys() == objects.keys()
    assert all(p is objects[n] for n, p in model.named_parameters())


def test_a_convolution_by_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1)).eval(), torch.randn(2, 3, 6, 6)
    FLoRA(rank=2, scale=4.0).attach(model)
    randomise(model)
    layer: Any = model[0]
    part = layer.flora
    delta = 4 * torch.einsum("abcd,ia,ob,kc,ld->oikl", part.core, *part.factors)
    want = F.conv2d(x, layer.weight + delta, layer.bias, stride=2, padding=1)
    assert torch.allclose(model(x), want, atol=1e-5)


def test_the_core_moves_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    flora = FLoRA(rank=2).attach(model)
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    core, *factors = flora.parameters()
    assert core.grad is not None and core.grad.abs().min() > 0
    assert all(f.grad is not None and not f.grad.any() for f in factors)


def test_it_expresses_a_tucker_change_that_a_flattened_product_of_its_size_cannot() -> None:
    # full rank as a flattened (16, 144) matrix of rank 4, Tucker ranks (2, 4, 2, 2)
    core, factors = drawn([16, 16, 3, 3], [2, 4, 2, 2])
    target = tucker_delta(core, factors) / 10
    part = TuckerUpdate(target.clone(), [2, 4, 2, 2], 1.0, 0.0)
    with torch.no_grad():
        part.core.copy_(torch.randn_like(part.core) / 5)
    fit = torch.optim.Adam(part.parameters(), lr=0.05)
    for step in range(250):
        for group in fit.param_groups:
            group["lr"] = 0.05 * (1 - step / 250)
        loss = (part.delta() - target).square().mean() / target.square().mean()
        fit.zero_grad()
        loss.backward()
        fit.step()
    size = sum(p.numel() for p in part.parameters())
    assert size == 2 * 4 * 2 * 2 + 16 * 2 + 16 * 4 + 3 * 2 + 3 * 2 == 140
    rank = 1  # of a (16, 144) product: 160 parameters
    singular = torch.linalg.svdvals(target.flatten(1))
    best = (singular[rank:].square().sum() / singular.square().sum()).item()
    assert loss.item() < 1e-3 < 0.1 < best


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    for make, shape in (LAYERS["linear"], LAYERS["transposed"]):
        torch.manual_seed(0)
        model, x = nn.Sequential(make()), torch.randn(shape)
        FLoRA(rank=2, scale=1.0, dropout=0.5).attach(model)
        randomise(model)
        with torch.no_grad():
            model.eval()
            want = model(x)
            assert torch.equal(model(x), want)
            model.train()
            draws = torch.stack([model(x) for _ in range(1000)])
        error = (draws.mean(0) - want).abs()
        assert draws.std(0).max() > 0.01 and (error <= 5 * draws.std(0) / 1000**0.5 + 1e-5).all()


def test_attention_of_torch_is_left_alone_and_bad_options_are_named() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert set(FLoRA().layers(model)) == {"1"}
    with pytest.raises(
        UserError, match="method.flora.targets='cnov' matches no layer of Sequential; did you mean 'conv'"
    ):
        FLoRA(targets="cnov").attach(model)
    with pytest.raises(UserError, match="kernel_rank=0 is out of range"):
        FLoRA(kernel_rank=0)
    with pytest.raises(UserError, match="beside the trained head"):
        FLoRA(targets="1").attach(model, skip=list(model[1].parameters()))


def test_verify_and_report(tmp_path: Path) -> None:
    words = ["model=resnet20", "model.width=4", "method.flora.rank=3", "method.flora.kernel_rank=1"]
    run = BenchRun("flora", words, tmp_path).trained()
    flora: Any = run.methods[0]
    report = flora.report(run)
    assert report["rank"] == 3 and report["adapted_weights"] == 19
    flora.verify(run)
    flora.places[3].part.core = nn.Parameter(torch.zeros(2, 2, 1, 1))
    with pytest.raises(RuntimeError):
        flora.verify(run)


def test_it_composes_with_lora_and_prompts(tmp_path: Path) -> None:
    words = [
        "model=vit",
        "model.size=nano",
        "model.depth=1",
        "method.lora.targets=attention",
        "method.flora.targets=fc1",
    ]
    run = BenchRun("[flora,lora,vpt]", words, tmp_path).trained()
    before = probe(run)
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
