"""SVFit: rank by energy, the update and its gradient in closed form, every kind of layer, exact merging, the basis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filtrun.bench_run import BenchRun, probe
from filtrun.cost import saved_for_backward
from filtrun.errors import UserError
from filtrun.methods.peft.svfit import SingularValues, SVFit, energy_rank, svd_split


def weight_of(singular: list[float], rows: int = 6, columns: int = 5) -> Tensor:
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, len(singular), dtype=torch.double))[0]
    v = torch.linalg.qr(torch.randn(columns, len(singular), dtype=torch.double))[0]
    return u @ torch.diag(torch.tensor(singular, dtype=torch.double)) @ v.T


def test_rank_by_energy_by_hand() -> None:
    singular = torch.tensor([4.0, 3.0, 2.0, 1.0])  # squares 16, 25, 29, 30; sums 4, 7, 9, 10
    assert [energy_rank(singular, e) for e in (0.5, 0.53, 0.54, 25 / 30, 0.84, 0.99, 1.0)] == [1, 1, 2, 2, 3, 4, 4]
    assert [energy_rank(singular, e, "sum") for e in (0.4, 0.41, 0.7, 0.91)] == [1, 2, 2, 4]
    assert energy_rank(torch.zeros(3), 0.99) == 0


@pytest.mark.parametrize("kind", ["squared", "sum"])
def test_one_value_less_would_hold_too_little(kind: str) -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(torch.randn(30, 40, dtype=torch.double))
    parts = singular.square() if kind == "squared" else singular
    for energy in (0.3, 0.9, 0.99):
        r = energy_rank(singular, energy, kind)
        assert parts[:r].sum() / parts.sum() >= energy > parts[: r - 1].sum() / parts.sum()


def test_what_is_left_has_the_next_singular_value_as_its_norm() -> None:
    weight = weight_of([5.0, 3.0, 2.0, 0.5])
    u, singular, vh = svd_split(weight, 2)
    assert torch.allclose(singular, torch.tensor([5.0, 3.0], dtype=torch.double))
    rest = weight - u @ torch.diag(singular) @ vh
    assert torch.linalg.matrix_norm(rest, 2).item() == pytest.approx(2.0)
    u, singular, vh = svd_split(weight, 99)
    assert len(singular) == 5 and torch.allclose(u @ torch.diag(singular) @ vh, weight)
    assert svd_split(weight, 2, "bottom")[1].tolist() == pytest.approx([0.5, 0.0], abs=1e-12)
    assert len(svd_split(weight, None)[1]) == 3  # 38 of 38.25 is 99.3 %


def test_random_directions_are_orthonormal_and_hold_what_the_weight_does_along_them() -> None:
    weight = weight_of([5.0, 3.0, 2.0, 0.5])
    u, singular, vh = svd_split(weight, 3, "random")
    eye = torch.eye(3, dtype=torch.double)
    assert torch.allclose(u.T @ u, eye, atol=1e-12) and torch.allclose(vh @ vh.T, eye, atol=1e-12)
    assert torch.allclose(singular, torch.diagonal(u.T @ weight @ vh.T))


def test_the_gradient_of_a_singular_value_is_u_gradient_v() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 6).double(), torch.randn(7, 5, dtype=torch.double)
    model, free = nn.Sequential(layer), layer.weight.detach().clone().requires_grad_()
    (dense,) = torch.autograd.grad((x @ free.T + layer.bias).sin().sum(), free)
    svfit = SVFit(rank=3).attach(model)
    part = svfit.places[0].part
    (found,) = torch.autograd.grad(model(x).sin().sum(), part.sigma)
    assert torch.allclose(found, torch.stack([part.u[:, k] @ dense @ part.vh[k] for k in range(3)]))


LAYERS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "linear": (lambda: nn.Linear(6, 10), (3, 4, 6), True),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9), True),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7), True),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding="same"), (1, 2, 4, 4, 4), True),
    "grouped conv": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5), False),
    "reflected conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5), False),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), False),
}


@pytest.mark.parametrize("compute", ["factored", "merged"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_starts_at_the_base_and_merges_exactly(kind: str, compute: str) -> None:
    make, shape, thin = LAYERS[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(shape)
    layer: Any = model[0]
    weight, objects = layer.weight.detach().clone(), dict(model.named_parameters())
    with torch.no_grad():
        plain = model(x)
        svfit = SVFit(rank=3, compute=compute).attach(model)
        part = svfit.places[0].part
        assert (svfit.places[0].hook is not None) is (thin and compute == "factored")
        assert torch.equal(model(x), plain)
        part.sigma.mul_(torch.tensor([1.5, -0.5, 0.0]))
        change = (part.u * (part.sigma - part.start)) @ part.vh
        tuned = model(x)
        assert (tuned - plain).abs().max() > 0.01
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) == 3
        svfit.merge()
        assert (model(x) - tuned).abs().max() < 1e-5
        assert torch.allclose(layer.weight, weight + change.view(weight.shape), atol=1e-6)
    assert all(model.get_parameter(n) is p for n, p in objects.items()) and type(layer) is type(make())


def test_attention_of_torch_is_adapted_inside() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True)}).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model["a"](x, x, x)[0]
        svfit = SVFit(rank=2).attach(model)
        assert [p.name for p in svfit.places] == ["a.in_proj_weight", "a.out_proj.weight"]
        assert torch.allclose(model["a"](x, x, x)[0], plain, atol=1e-6)
        for sigma in svfit.parameters():
            sigma.add_(1.0)
        tuned = model["a"](x, x, x)[0]
        svfit.merge()
        assert torch.allclose(model["a"](x, x, x)[0], tuned, atol=1e-5)


def test_only_one_number_per_direction_is_kept_for_the_backward_pass() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64)
    SVFit(rank=5).attach(model)
    found = saved_for_backward(lambda: model(x), model)
    assert found == 4 * 32 * 5  # V^T x: neither x nor what U makes of it


def test_a_weight_of_zeros_is_left_alone() -> None:
    zero = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), zero)
    nn.init.zeros_(zero.weight)
    assert [p.name for p in SVFit().attach(model).places] == ["0.weight"]
    with pytest.raises(UserError, match="all of these weights are zero"):
        SVFit(targets="1").attach(nn.Sequential(nn.Identity(), zero))


def test_the_fingerprint_knows_the_directions_but_not_their_sign() -> None:
    torch.manual_seed(0)
    u, singular, vh = svd_split(torch.randn(6, 5), 4)
    layer, shape = nn.Linear(5, 6), torch.Size((6, 5))
    own = SingularValues(u, singular, vh, layer, shape).fingerprint()
    turned = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert torch.allclose(SingularValues(u * turned, singular, turned[:, None] * vh, layer, shape).fingerprint(), own)
    swapped = [1, 0, 2, 3]
    other = SingularValues(u[:, swapped], singular, vh[swapped], layer, shape).fingerprint()
    assert (other - own).norm() > 0.01 * own.norm()


# -- in a run ----------------------------------------------------------------------------------------------------------
VIT = ["model=vit", "model.size=nano", "model.depth=1"]


def test_only_singular_values_and_the_head_train_and_do_not_decay(tmp_path: Path) -> None:
    setting = BenchRun("svfit", [*VIT, "method.svfit.rank=7"], tmp_path)
    run, base = setting.trained(), dict(setting.base.named_parameters())
    svfit: Any = run.methods[0]
    trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if not n.endswith("svfit.sigma")} == {"head.weight", "head.bias"}
    assert {n for n, p in run.weights.items() if not torch.equal(p, base[n])} == {"head.weight", "head.bias"}
    assert [g["weight_decay"] for g in svfit.param_groups(run)] == [0.0]
    report = svfit.report(run)
    assert report["adapted_weights"] == 7 and report["adapter_params"] == 6 * 7 + 4  # the patch layer has 4 columns
    assert 0 < report["spectrum_change"] < 1
    svfit.verify(run)
    before = probe(run)
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
    assert list(run.model.state_dict()) == list(setting.base.state_dict())


def test_values_of_another_base_are_refused(tmp_path: Path) -> None:
    setting = BenchRun("svfit", VIT, tmp_path)
    first = setting.fresh().methods[0]
    state = first.state_dict()
    first.load_state_dict(state)
    with torch.no_grad():
        setting.base.get_parameter("blocks.0.attn.v.weight").add_(0.1 * torch.randn(64, 64))
    with pytest.raises(UserError, match="the singular vectors of blocks.0.attn.v.weight are not those"):
        setting.fresh().methods[0].load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.svfit.rank=0 is out of range"),
        ({"energy": 1.5}, "method.svfit.energy=1.5 is out of range"),
        ({"directions": "topp"}, "method.svfit.directions=topp is not allowed; .*did you mean 'top'"),
        ({"compute": "lazy"}, "choose from factored, merged"),
        ({"targets": "norm"}, "method.svfit.targets='norm' matches no layer"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SVFit(**options).attach(nn.Sequential(nn.Linear(2, 2)))
