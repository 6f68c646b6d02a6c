"""Muon and AuON against their definitions, torch's Muon and the SVD; several rules as one optimizer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filtrun import runner
from filtrun.bench_run import BenchRun, losses_of
from filtrun.cells import cell_digest
from filtrun.checkpoint import load_checkpoint, save_checkpoint
from filtrun.errors import UserError
from filtrun.optimizers import AuON, Muon, newton_schulz
from filtrun.trainer import Trainer, make_optimizer

RESNET = ["model=resnet20", "model.width=4"]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """U diag(values) V^T with random singular vectors, float64; and U, V^T."""
    u = torch.linalg.qr(matrix(rows, len(values), seed=1).double())[0]
    v = torch.linalg.qr(matrix(columns, len(values), seed=2).double())[0]
    return u @ torch.diag(values) @ v.T, u, v.T


@pytest.mark.parametrize(("rows", "columns"), [(12, 30), (30, 12), (16, 16)])
def test_newton_schulz_pushes_singular_values_into_the_band_and_keeps_the_vectors(rows: int, columns: int) -> None:
    values = torch.logspace(0, -2.2, 12, dtype=torch.float64)
    made, u, vt = with_spectrum(values, rows, columns)
    found = newton_schulz(made.float()).double()
    inner = u.T @ found @ vt.T  # diagonal: the singular vectors are those of the input
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-4)
    assert inner.diagonal().min() > 0.68 and inner.diagonal().max() < 1.21
    # the slow reference: the quintic on each singular value
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    assert torch.allclose(inner.diagonal(), x, atol=1e-4)
    # so it is near the polar factor U V^T, the nearest semi-orthogonal matrix
    assert torch.linalg.matrix_norm(found - u @ vt, 2) < 0.33


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
@pytest.mark.parametrize(("scale", "torchs"), [("adamw", "match_rms_adamw"), ("paper", "original")])
def test_muon_is_torchs_on_a_matrix(shape: tuple[int, int], scale: str, torchs: str) -> None:
    ours, theirs = (nn.Parameter(matrix(*shape)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    pair = [Muon([ours], scale=scale, **options), torch.optim.Muon([theirs], adjust_lr_fn=torchs, **options)]
    for step in range(4):
        before = ours.detach().clone()
        ours.grad, theirs.grad = matrix(*shape, seed=step + 1), matrix(*shape, seed=step + 1)
        for optimizer in pair:
            optimizer.step()
        moved = (ours.detach() - before).norm()
        assert (ours - theirs).norm() < 0.02 * moved  # torch iterates in bfloat16
        with torch.no_grad():
            theirs.copy_(ours)


def test_a_kernel_is_the_matrix_of_its_rows() -> None:
    kernel = nn.Parameter(matrix(6, 4, 3, 3).to(memory_format=torch.channels_last))
    flat = nn.Parameter(kernel.detach().reshape(6, 36).clone())
    kernel.grad = matrix(6, 4, 3, 3, seed=1).to(memory_format=torch.channels_last)
    flat.grad = kernel.grad.reshape(6, 36).clone()
    for parameter in (kernel, flat):
        Muon([parameter], lr=0.1).step()
    assert torch.allclose(kernel.detach().reshape(6, 36), flat, atol=1e-6)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_the_step_of_the_scale_adamw_has_a_root_mean_square_of_a_fifth_of_lr() -> None:
    for rule, low, high in ((Muon, 0.16, 0.24), (AuON, 0.199, 0.2001)):
        weight = nn.Parameter(torch.zeros(40, 30))
        weight.grad = matrix(40, 30)
        rule([weight], lr=1.0).step()
        assert low < weight.detach().square().mean().sqrt() < high


def test_rescale_brings_a_matrix_to_the_norm_of_an_orthogonal_one() -> None:
    weight = nn.Parameter(7 * matrix(9, 5))
    weight.grad = torch.zeros(9, 5)  # no direction
    Muon([weight], lr=0.3, rescale=True).step()
    assert weight.norm().item() == pytest.approx(3.0, rel=1e-5)


def auon_by_the_paper(weights: Tensor, gradients: list[Tensor], lr: float, decay: float, steps: int) -> Tensor:
    """arXiv:2509.24320v1, sections 3.1 and 3.2, with the Nesterov average and the scale of its released code."""
    w, m = weights.double(), torch.zeros_like(weights).double()
    for gradient in gradients:
        g = gradient.double()
        m = 0.95 * m + 0.05 * g
        x = 0.05 * g + 0.95 * m
        x = x / (x.norm() + 1e-7)
        if steps:  # Hybrid-AuON: one Newton-Schulz step
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        rms = math.sqrt(((x.exp() + (-x).exp()) / 2).square().sum().item() / x.numel())
        u = x / (rms + 1e-8)
        w = w * (1 - lr * decay) - lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * u
    return w


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("steps", [0, 1])
def test_auon_is_the_papers(shape: tuple[int, int], steps: int) -> None:
    weight = nn.Parameter(matrix(*shape))
    gradients = [matrix(*shape, seed=i + 1) * 10.0**i for i in range(3)]
    expected = auon_by_the_paper(weight.detach(), gradients, 0.055, 0.1, steps)
    optimizer = AuON([weight], lr=0.055, weight_decay=0.1, scale="paper", steps=steps)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    assert torch.allclose(weight.detach().double(), expected, atol=1e-6)


def test_an_update_of_auon_is_bounded_and_scale_invariant() -> None:
    rule, spiky = AuON([nn.Parameter(torch.zeros(2, 2))], lr=1.0), torch.zeros(16, 16)
    spiky[0, 0] = 1.0
    even = torch.ones(16, 16)
    norms = [torch.linalg.matrix_norm(rule.direction(m, 0), 2).item() for m in (spiky, even, matrix(16, 16))]
    assert all(norm < 1 for norm in norms)
    # cosh(1)^2 in one of 256 places, cosh(0) in the others; cosh(1/16) everywhere
    assert norms[0] == pytest.approx(1 / math.sqrt((math.cosh(1) ** 2 + 255) / 256), rel=1e-6)
    assert norms[1] == pytest.approx(1 / math.cosh(1 / 16), rel=1e-6)
    one, thousand = (rule.direction(matrix(16, 16) * size, 0) for size in (1.0, 1000.0))
    assert torch.allclose(one, thousand, atol=1e-6)


# -- chosen by config


def as_stored(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups with lists for tuples, which JSON does not know."""
    return [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in groups]


def test_matrices_and_the_rest_keep_their_groups_options() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 4), nn.Embedding(5, 6))
    own = [{"params": [*net[0].parameters()], "lr": 0.5}, {"params": [*net[1:].parameters()], "lr_factor": 2.0}]
    optimizer = make_optimizer(Trainer(optimizer="muon", lr=0.1, weight_decay=0.2), own, apart=[net[2].weight])
    made = [(g["rule"], [p.ndim for p in g["params"]], g["base_lr"]) for g in optimizer.param_groups]
    assert made == [("matrix", [4], 0.5), ("others", [1], 0.5), ("matrix", [2], 0.2), ("others", [1, 2], 0.2)]
    assert {type(part) for part in optimizer.parts.values()} == {Muon, torch.optim.AdamW}  # type: ignore[attr-defined]


def test_together_steps_as_the_parts_do_alone() -> None:
    nets = [nn.Linear(6, 5) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    trainer = Trainer(optimizer="auon", lr=0.1, weight_decay=0.1, others="sgd", momentum=0.8)
    together = make_optimizer(trainer, [{"params": [*nets[0].parameters()]}])
    alone = [
        AuON([nets[1].weight], lr=0.1, weight_decay=0.1),
        torch.optim.SGD([nets[1].bias], lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ]
    for step in range(3):
        for net in nets:
            net.zero_grad()
            net(matrix(4, 6, seed=step)).square().sum().backward()
        for optimizer in (together, *alone):
            optimizer.step()
    assert torch.equal(nets[0].weight, nets[1].weight) and torch.equal(nets[0].bias, nets[1].bias)


def test_nothing_but_vectors() -> None:
    with pytest.raises(UserError, match="trainer.optimizer=muon updates matrices, and none trains here; use adamw"):
        make_optimizer(Trainer(optimizer="muon"), [{"params": [nn.Parameter(torch.zeros(3))]}])


def test_the_head_and_embeddings_are_left_to_the_other_rule(tmp_path: Path) -> None:
    run = BenchRun("full", RESNET, tmp_path).fresh(optimizer="muon")
    runner.setup(run)
    rules = {id(p): g["rule"] for g in run.optimizer.param_groups for p in g["params"]}
    expected = {
        name: "matrix" if p.ndim == 4 else "others" for name, p in run.model.named_parameters()
    }  # kernels; not batch norm, nor linear.weight
    assert {name: rules[id(p)] for name, p in run.model.named_parameters()} == expected
    unet = BenchRun("full", ["model=unet", "model.size=nano"], tmp_path).fresh(optimizer="auon")
    runner.setup(unet)
    tables = [m.weight for m in unet.model.modules() if isinstance(m, nn.Embedding)]
    rules = {id(p): g["rule"] for g in unet.optimizer.param_groups for p in g["params"]}
    assert tables and {rules[id(t)] for t in tables} == {"others"}


@pytest.mark.parametrize("options", [{"optimizer": "muon"}, {"optimizer": "auon", "others": "sgd", "matrix_steps": 1}])
def test_training_lowers_the_loss_and_resumes_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    bench = BenchRun("full", RESNET, tmp_path)
    settings = {"steps": 24, "lr": 0.01, "weight_decay": 0.01, "batch_size": 64, **options}
    whole = bench.fresh(**settings)
    runner.setup(whole)
    runner.fit(whole)
    losses = torch.stack(losses_of(whole))
    assert losses[-4:].mean() < 0.6 * losses[:4].mean()

    half = bench.fresh(**settings)
    runner.setup(half)
    half.dir = tmp_path / "run"
    half.phases[0].steps = 10
    runner.fit(half)
    save_checkpoint(half)
    again = bench.fresh(**settings)
    runner.setup(again)
    again.dir = half.dir
    assert load_checkpoint(again) and again.step == 10
    saved, loaded = half.optimizer.state_dict(), again.optimizer.state_dict()
    assert as_stored(saved["param_groups"]) == as_stored(loaded["param_groups"])
    assert saved["state"].keys() == loaded["state"].keys()
    for key, state in saved["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(loaded["state"][key][k])) for k, v in state.items())
    runner.fit(again)
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_copy_has_a_state_of_its_own() -> None:
    net = nn.Linear(4, 3)
    optimizer = make_optimizer(Trainer(optimizer="muon"), [{"params": [*net.parameters()]}])
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    twin_net, twin = copy.deepcopy((net, optimizer))
    before = net.weight.detach().clone()
    twin_net.weight.grad = torch.ones(3, 4)
    twin.step()
    assert torch.equal(net.weight, before) and not torch.equal(twin_net.weight, before)


def test_cells_keep_the_names_they_had_before_these_options() -> None:
    old: dict[str, Any] = {"trainer": {"optimizer": "adamw", "lr": 1e-3}, "pretrain": {"seed": 0}}
    later = {"others": "adamw", "matrix_steps": None, "matrix_rescale": False}
    now = {"trainer": {**old["trainer"], **later}, "pretrain": {**old["pretrain"], "matrix_scale": "adamw"}}
    assert cell_digest(now) == cell_digest(old)
    assert cell_digest({**now, "trainer": {**now["trainer"], "matrix_steps": 3}}) != cell_digest(old)
