"""SSF: the affine map by hand, folding into every kind of layer, counts of the paper, and what trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filtrun.bench_run import BenchRun, probe
from filtrun.errors import UserError
from filtrun.methods.peft.ssf import SSF, channels_of, scale_shift, scaled_weight
from filtrun.models.vit import ViT


def test_scale_shift_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert scale_shift(x, torch.tensor([2.0, 3.0]), torch.tensor([0.5, -1.0])).tolist() == [[2.5, 5], [6.5, 11]]
    square = torch.ones(1, 2, 2, 2)  # as many columns as channels: channels are meant where the layer says so
    assert scale_shift(square, torch.tensor([2.0, 3.0]), torch.zeros(2), 1)[0, :, 0, 0].tolist() == [2, 3]


def test_half_precision_features_keep_their_type() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert scale_shift(x, torch.ones(3), torch.zeros(3)).dtype == torch.bfloat16


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 10), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 7, 7)),
    "reflected conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "depthwise conv": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (1, 2, 4, 4, 4)),
    "conv of one image": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 4, 6)),
    "layer norm of maps": (lambda: nn.LayerNorm((4, 6)), (3, 4, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (3, 6, 4, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 4, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), (3, 6, 4, 4)),
}


def disturbed(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_folding_is_exact_for_every_layer(kind: str, training: bool) -> None:
    make, shape = LAYERS[kind]
    model = nn.Sequential(disturbed(make())).double().train(training)
    layer, objects, names = model[0], dict(model.named_parameters()), list(model.state_dict())
    x = torch.randn(shape, dtype=torch.double)
    with torch.no_grad():
        plain = copy.deepcopy(layer)(x)
        ssf = SSF(init_std=0.5).attach(model)
        place = ssf.places[0]
        found = channels_of(layer)
        assert found is not None and place.hook is not None
        by_hand = scale_shift(plain, place.part.scale, place.part.shift, found[1])
        assert torch.allclose(model(x), by_hand, atol=1e-12)
        assert len(ssf.parameters()[0]) == plain.shape[found[1]]
        tuned = model(x)
        ssf.merge()
        assert (model(x) - tuned).abs().max() < 1e-10
    assert model[0] is layer and all(model.get_parameter(n) is p for n, p in objects.items())
    assert set(model.state_dict()) - set(names) == ({"0.bias"} if "without bias" in kind else set())


class Weighted(nn.Conv2d):
    """A convolution that treats its weight before use, and an activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x) * 2)


def test_layers_with_a_forward_of_their_own_are_scaled_before_it() -> None:
    layer, x = Weighted(3, 4, 3, bias=False), torch.randn(2, 3, 5, 5)
    model, weight = nn.Sequential(layer), layer.weight
    plain = nn.functional.conv2d(x, weight)
    with torch.no_grad():
        ssf = SSF(init_std=0.5).attach(model)
        part = ssf.places[0].part
        want = (2 * scale_shift(plain, part.scale, part.shift, 1)).relu()
        assert ssf.places[0].hook is None and torch.allclose(model(x), want, atol=1e-5)
        ssf.merge()
        assert torch.allclose(model(x), want, atol=1e-5)
    assert layer.weight is weight and type(layer) is Weighted and list(layer._parameters) == ["weight", "bias"]


def test_attention_of_torch_is_scaled_inside() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    x = torch.randn(2, 5, 8)

    def run() -> Tensor:
        return model["attention"](x, x, x, need_weights=False)[0]

    with torch.no_grad():
        plain = run()
        ssf = SSF(init="identity").attach(model)
        assert torch.allclose(run(), plain, atol=1e-6)
        assert sorted(len(p.part.scale) for p in ssf.places) == [8, 24]
        for parameter in ssf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        tuned = run()
        assert (tuned - plain).abs().max() > 0.01
        ssf.merge()
        assert torch.allclose(run(), tuned, atol=1e-5)


def test_a_layer_used_twice_is_scaled_twice() -> None:
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.GELU(), layer), torch.randn(3, 4)
    with torch.no_grad():
        ssf = SSF(init_std=0.3).attach(model)
        tuned = model(x)
        assert len(ssf.places) == 1
        ssf.merge()
        assert torch.allclose(model(x), tuned, atol=1e-6)


def test_grouped_transposed_weight_by_hand() -> None:
    weight = torch.arange(8.0).view(4, 2, 1)  # two groups of two inputs and two outputs
    scaled = scaled_weight(weight, torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    assert (scaled / weight.clamp(min=1)).flatten().tolist() == [0, 2, 1, 2, 3, 4, 3, 4]


def test_counts_of_the_paper() -> None:
    """2 (11 C per block and C for patches and the last norm): 205,824 for ViT-B/16 without its head."""
    for width, depth in ((64, 2), (128, 1)):
        model = ViT(3, 10, 32, size="nano", width=width, depth=depth)
        ssf = SSF().attach(model, skip=list(model.head.parameters()))
        assert sum(p.numel() for p in ssf.parameters()) == depth * 22 * width + 4 * width
    assert 12 * 22 * 768 + 4 * 768 == 205_824


def test_the_start_is_random_around_the_identity_or_the_identity() -> None:
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(3, 20_000))
    scale, shift = SSF().attach(big).parameters()
    assert scale.mean().item() == pytest.approx(1, abs=1e-3) and scale.std().item() == pytest.approx(0.02, rel=0.05)
    assert shift.mean().item() == pytest.approx(0, abs=1e-3) and shift.std().item() == pytest.approx(0.02, rel=0.05)
    model, x = ViT(1, 4, 8, size="nano", depth=1).eval(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        plain = model(x)
        SSF(init="identity").attach(model)
        assert torch.equal(model(x), plain)


def test_only_scales_shifts_and_the_head_train_and_do_not_decay(tmp_path: Path) -> None:
    setting = BenchRun("ssf", ["model=vit", "model.size=nano", "model.depth=1"], tmp_path)
    run, base = setting.trained(), dict(setting.base.named_parameters())
    changed = {n for n, p in run.weights.items() if not torch.equal(p, base[n])}
    assert changed == {"head.weight", "head.bias"}
    assert run.methods[0].report(run) == {"adapted_layers": 10, "adapter_params": 26 * 64}
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in run.methods[0].param_groups(run)}
    assert groups == {0.0: {id(p) for p in run.methods[0].parameters()}}  # type: ignore[attr-defined]
    run.each_reversed("finish")
    now = {n for n, p in run.model.named_parameters() if not torch.equal(p, base[n])}
    assert now == set(base) - {"token", "positions"}


def test_the_denoiser_and_targets(tmp_path: Path) -> None:
    run = BenchRun("ssf", ["model=unet", "model.size=nano", "method.ssf.targets=[norm,attention]"], tmp_path).trained()
    ssf: Any = run.methods[0]
    kinds = {type(place.owner) for place in ssf.places}
    assert kinds == {nn.GroupNorm, nn.Linear}
    before = probe(run)
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "norms"}, "method.ssf.targets='norms' matches no layer of Sequential; did you mean 'norm'"),
        ({"init": "zeros"}, "method.ssf.init=zeros is not allowed; choose from normal, identity"),
        ({"init_std": -1.0}, "method.ssf.init_std=-1.0 is out of range"),
        ({"targets": {}}, "must be a name, a group"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SSF(**options).attach(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_nothing_left_beside_the_head_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="leaves no layer to adapt beside the trained head"):
        SSF().attach(model, skip=list(model.parameters()))
