"""LoRA: values against B A by hand, every kind of layer, exact merging, and what the options and errors say."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.bench_run import BenchRun, probe
from filtrun.errors import UserError
from filtrun.methods.peft.lora import LoRA, adaptable, choose, covered_by_peft, low_rank_delta


def randomise(model: nn.Module) -> None:
    """Give every trainable tensor values that are not its start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))


LAYERS: dict[str, tuple[Any, Any, bool]] = {
    "linear": (lambda: nn.Linear(6, 10), torch.randn(3, 6), True),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), torch.randn(3, 6), True),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9), True),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 7, 7), True),
    "conv 1x1": (lambda: nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5), True),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), torch.randn(1, 2, 4, 4, 4), True),
    "embedding": (lambda: nn.Embedding(7, 5), torch.tensor([0, 3, 6]), True),
    "grouped conv": (lambda: nn.Conv2d(4, 8, 3, groups=2), torch.randn(2, 4, 5, 5), False),
    "depthwise conv": (lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5), torch.randn(2, 5, 5, 5), False),
    "dilated conv": (lambda: nn.Conv2d(4, 6, 3, dilation=2), torch.randn(2, 4, 7, 7), False),
    "reflected conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 5, 5), False),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), torch.randn(2, 4, 5, 5), False),
}


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_starts_at_the_base_and_merges_exactly(kind: str) -> None:
    make, x, by_peft = LAYERS[kind]
    torch.manual_seed(0)
    model = Holder(make())
    plain, names, objects = model.layer, list(model.state_dict()), dict(model.named_parameters())
    start = {n: p.detach().clone() for n, p in objects.items()}
    with torch.no_grad():
        want = model(x)
        lora = LoRA(rank=2, alpha=3.0).attach(model)
        assert covered_by_peft(plain) is by_peft and bool(lora.wrapped) is by_peft
        assert torch.equal(model(x), want)
        randomise(model)
        tuned = model(x)
        assert (tuned - want).abs().max() > 0.01
        ((_, delta),) = lora.deltas()
        assert torch.linalg.matrix_rank(delta.flatten(1)) == 2
        lora.merge()
        assert (model(x) - tuned).abs().max() < 1e-5
    assert model.layer is plain and type(plain) is type(make())
    assert list(model.state_dict()) == names
    assert all(p is objects[n] for n, p in model.named_parameters())
    assert torch.allclose(model.layer.weight, start["layer.weight"] + delta, atol=1e-6)  # type: ignore[arg-type]
    if "layer.bias" in start:
        assert torch.equal(model.layer.bias, start["layer.bias"])  # type: ignore[arg-type]


def test_linear_delta_is_b_a_times_alpha_over_rank() -> None:
    torch.manual_seed(0)
    model, x = Holder(nn.Linear(6, 10)), torch.randn(3, 6)
    weight, bias = (p.detach().clone() for p in model.layer.parameters())
    lora = LoRA(rank=4, alpha=10.0).attach(model)
    randomise(model)
    layer: Any = model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 6) and b.shape == (10, 4)
    by_hand = x @ weight.T + bias + 2.5 * (x @ a.T) @ b.T
    assert torch.allclose(model(x), by_hand, atol=1e-5)
    lora.merge()
    assert torch.allclose(model.layer.weight, weight + 2.5 * b @ a, atol=1e-6)  # type: ignore[arg-type]


def test_conv_delta_is_a_convolution_to_r_channels_and_one_back() -> None:
    torch.manual_seed(0)
    model, x = Holder(nn.Conv2d(3, 5, 3, padding=1)), torch.randn(2, 3, 6, 6)
    base = model.layer
    lora = LoRA(rank=2, alpha=1.0).attach(model)
    randomise(model)
    layer: Any = model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = base(x) + 0.5 * F.conv2d(F.conv2d(x, a, padding=1), b)
    assert torch.allclose(model(x), by_hand, atol=1e-5)
    ((_, delta),) = lora.deltas()
    assert torch.allclose(delta.flatten(1), 0.5 * b.flatten(1) @ a.flatten(1), atol=1e-6)


def test_grouped_conv_uses_its_weight_as_a_matrix() -> None:
    torch.manual_seed(0)
    model, x = Holder(nn.Conv2d(4, 8, 3, groups=2)), torch.randn(2, 4, 6, 6)
    weight, bias = (p.detach().clone() for p in model.layer.parameters())
    LoRA(rank=3).attach(model)
    randomise(model)
    made: Any = model.layer.parametrizations["weight"][0]  # type: ignore[index, union-attr]
    assert made.lora_A.shape == (3, 18) and made.lora_B.shape == (8, 3)
    by_hand = F.conv2d(x, weight + (made.lora_B @ made.lora_A).view(8, 2, 3, 3), bias, groups=2)
    assert torch.allclose(model(x), by_hand, atol=1e-6)


def test_low_rank_delta_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0], [-1.0]])
    assert low_rank_delta(a, b, 2.0, (2, 2, 2)).tolist() == [[[2, 4], [6, 8]], [[-2, -4], [-6, -8]]]


class Mixed(nn.Module):
    """A convolution, an attention module of torch and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).flatten(2).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.again(F.gelu(self.twice(h))).mean(1))


@pytest.fixture
def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def test_attention_of_torch_and_a_layer_used_twice(mixed: Mixed) -> None:
    x = torch.randn(2, 1, 5, 5)
    with torch.no_grad():
        want = mixed(x)
        lora = LoRA(rank=2).attach(mixed)
        assert {name for name, _ in lora.deltas()} == {
            "stem.weight", "twice.weight", "head.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        }  # fmt: skip
        assert torch.allclose(mixed(x), want, atol=1e-6)
        randomise(mixed)
        tuned = mixed(x)
        lora.merge()
        assert (mixed(x) - tuned).abs().max() < 1e-5 < (tuned - want).abs().max()
    assert mixed.twice is mixed.again and type(mixed.attention) is nn.MultiheadAttention
    assert list(mixed.state_dict()) == list(Mixed().state_dict())


def test_gradients_reach_every_adapter_and_nothing_else(mixed: Mixed) -> None:
    LoRA(rank=2).attach(mixed)
    randomise(mixed)
    mixed(torch.randn(2, 1, 5, 5)).square().sum().backward()
    for name, parameter in mixed.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) is ("lora_" in name), name


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all", {"stem", "attention", "twice", "head"}),
        ("linear", {"attention", "twice", "head"}),
        ("conv", {"stem"}),
        ("attention", {"attention"}),
        ("head", {"head"}),
        (["stem", "twi.*"], {"stem", "twice"}),
        (["conv", "head"], {"stem", "head"}),
    ],
)
def test_targets(mixed: Mixed, targets: Any, names: set[str]) -> None:
    assert set(choose(mixed, targets)) == names


def test_attention_of_the_own_models_is_found_by_its_class() -> None:
    from filtrun.models.unet import UNet
    from filtrun.models.vit import ViT

    assert set(choose(UNet(size="nano"), "attention")) >= {"middle.attn.qkv", "middle.attn.proj"}
    found = choose(ViT(1, 10, 8, size="nano", depth=2), "attention")
    assert set(found) == {f"blocks.{i}.attn.{n}" for i in range(2) for n in ("q", "k", "v", "proj")}
    assert set(choose(ViT(1, 10, 8, size="nano", depth=2), "attn.q")) == {"blocks.0.attn.q", "blocks.1.attn.q"}


def test_no_match_names_what_there_is(mixed: Mixed) -> None:
    with pytest.raises(UserError) as caught:
        LoRA(targets="haed").attach(mixed)
    message = str(caught.value)
    assert "targets='haed' matches no layer of Mixed; did you mean 'head'?" in message
    assert "stem, attention, twice, head" in message and len(message.splitlines()) <= 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 3}, "targets=3 must be a name"),
        ({"targets": []}, "must be a name"),
        ({"targets": "(("}, "no regular expression"),
        ({"rank": 0}, r"rank=0 is out of range; allowed is \[1, inf\]"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range"),
    ],
)
def test_mistakes_are_named(mixed: Mixed, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(**options).attach(mixed)


def test_tied_weights_are_left_out_of_groups_and_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert set(LoRA().layers(model)) == {"2"}
    with pytest.raises(UserError, match="0 shares its weight"):
        LoRA(targets=["0"]).layers(model)


def test_embeddings_that_rewrite_themselves_are_not_adaptable() -> None:
    assert set(adaptable(nn.Sequential(nn.Embedding(3, 4, max_norm=1.0), nn.Linear(4, 2)))) == {"1"}


@pytest.mark.parametrize("kind", ["linear", "grouped conv"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(kind: str) -> None:
    make, x, _ = LAYERS[kind]
    torch.manual_seed(0)
    model = Holder(make())
    LoRA(rank=2, dropout=0.5).attach(model)
    randomise(model)
    with torch.no_grad():
        model.eval()
        want = model(x)
        assert torch.equal(model(x), want)
        model.train()
        draws = torch.stack([model(x) for _ in range(3000)])
    assert draws.std(0).max() > 0.1
    error = (draws.mean(0) - want).abs()
    assert (error <= 5 * draws.std(0) / 3000**0.5 + 1e-5).all()


def test_missing_peft_is_one_line_with_the_cure(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^method=lora needs the peft library: pip install 'filtrun\[peft\]'$"):
        LoRA().attach(mixed)


# -- in a run ----------------------------------------------------------------------------------------------------------
VIT = ["model=vit", "model.size=nano", "model.depth=1"]


def test_the_head_is_trained_itself_or_adapted_like_the_others(tmp_path: Path) -> None:
    for head in (True, False):
        setting = BenchRun("lora", [*VIT, f"method.lora.head={str(head).lower()}"], tmp_path)
        run = setting.fresh()
        lora: Any = run.methods[0]
        assert run.weights["head.weight"].requires_grad is head and ("head" not in lora.wrapped) is head
        expected = {"q", "k", "v", "proj"}
        assert {f"blocks.0.attn.{n}" for n in expected} | {"patch", "blocks.0.mlp.fc1"} <= set(lora.wrapped)
        trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        own = 64 * 10 + 10 if head else 0
        assert trainable == lora.adapter_params() + own


def test_adapter_params_by_hand_and_the_report(tmp_path: Path) -> None:
    setting = BenchRun("lora", [*VIT, "method.lora.rank=3", "method.lora.targets=attention"], tmp_path)
    fresh = setting.fresh()
    report = fresh.methods[0].report(fresh)
    assert report == {"rank": 3, "alpha": 3.0, "adapted_weights": 4, "adapter_params": 4 * 3 * (64 + 64)}


def test_a_run_ends_in_a_plain_model_with_the_same_output(tmp_path: Path) -> None:
    setting = BenchRun("lora", ["model=unet", "model.size=nano", "method.lora.rank=2"], tmp_path)
    run = setting.trained(steps=3)
    run.methods[0].verify(run)  # type: ignore[attr-defined]
    before = probe(run)
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
    assert [type(m) for m in run.model.modules()] == [type(m) for m in setting.base.modules()]
    assert list(run.model.state_dict()) == list(setting.base.state_dict())
    base = dict(setting.base.named_parameters())
    for name, parameter in run.model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(parameter, base[name]), name


def test_verify_notices_a_rank_that_is_too_high(tmp_path: Path) -> None:
    run = BenchRun("lora", [*VIT, "method.lora.rank=4"], tmp_path).trained()
    lora: Any = run.methods[0]
    lora.rank = 1
    with pytest.raises(ValueError, match="not 1"):
        lora.verify(run)


def test_the_start_does_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    setting = BenchRun("lora", VIT, tmp_path)
    first = setting.fresh()
    torch.rand(13)
    second = setting.fresh()
    pairs = zip(first.model.named_parameters(), second.model.named_parameters(), strict=True)
    assert all(torch.equal(p, q) for (_, p), (_, q) in pairs)


def test_lora_and_bitfit_compose(tmp_path: Path) -> None:
    for order in ("lora,bitfit", "bitfit,lora"):
        setting = BenchRun(f"[{order}]", VIT, tmp_path)
        run, base = setting.trained(), dict(setting.base.named_parameters())
        changed = {n for n, p in run.weights.items() if not torch.equal(p, base[n])}
        assert changed == {n for n in run.weights if n.endswith("bias") or n.startswith("head.")}
        lora = next(m for m in run.methods if isinstance(m, LoRA))
        assert all(delta.any() for _, delta in lora.deltas())


def test_layers_of_other_methods_are_not_adapted(tmp_path: Path) -> None:
    setting = BenchRun("[binary_adapter,lora]", VIT, tmp_path)
    lora: Any = setting.fresh().methods[1]
    base = {name.rpartition(".")[0] for name, _ in setting.base.named_parameters()}
    assert {name.removesuffix(".weight") for name, _ in lora.deltas()} <= base
