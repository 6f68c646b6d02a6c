"""Finding layers under other methods' wrappers, and parts behind and inside layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from filtrun.bench_run import BenchRun, probe
from filtrun.cost import optimizer_bytes, saved_for_backward
from filtrun.errors import UserError
from filtrun.surgery import (
    base_tensor,
    behaves,
    check_targets,
    layers_of,
    pick,
    plain_type,
    put_behind,
    put_into,
    take_off,
    take_out,
    weight_names,
    write,
)  # fmt: skip

KINDS = {"linear": (nn.Linear, nn.MultiheadAttention), "norm": (nn.LayerNorm,)}
VIT = ["model=vit", "model.size=nano", "model.depth=1"]


class Times(nn.Module):
    """Multiplies by a number: a part for tests."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def behind(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.factor

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * self.factor


class Plus(Times):
    def behind(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + self.factor


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))


def test_layers_are_found_by_the_tensor_they_hold() -> None:
    model = make()
    weights = dict(model.named_parameters())
    model[0] = nn.Sequential(model[0], nn.Linear(4, 4))  # an adapter renames the layer and brings a layer of its own
    assert list(layers_of(model, KINDS, weights)) == ["0", "1", "2"]
    assert list(layers_of(model, KINDS)) == ["0.0", "0.1", "1", "2"]
    model[2].weight = nn.Parameter(torch.zeros(2, 4))
    assert list(layers_of(model, KINDS, weights)) == ["0", "1"]


def test_tied_weights_are_left_alone_but_a_layer_used_twice_is_not() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert layers_of(tied, KINDS) == {}
    layer = nn.Linear(3, 3)
    assert list(layers_of(nn.Sequential(layer, layer), KINDS)) == ["0"]


def test_weights_of_an_attention_module() -> None:
    joint, separate = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6)
    assert weight_names(joint) == ["in_proj_weight", "out_proj.weight"]
    assert weight_names(separate) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert list(layers_of(nn.ModuleDict({"a": joint, "b": separate}), KINDS)) == ["a", "b"]


def test_pick_by_group_name_end_and_pattern() -> None:
    model = nn.ModuleDict({"a": make(), "b": make()})
    layers = layers_of(model, KINDS)
    assert set(pick(model, layers, "norm", KINDS, "x")) == {"a.1", "b.1"}
    assert set(pick(model, layers, ["a.0", "2"], KINDS, "x")) == {"a.0", "a.2", "b.2"}
    assert set(pick(model, layers, r"b\..*", KINDS, "x")) == {"b.0", "b.1", "b.2"}
    with pytest.raises(UserError, match="x='nrom' matches no layer of ModuleDict; did you mean 'norm'"):
        pick(model, layers, "nrom", KINDS, "x")
    with pytest.raises(UserError, match=r"x='\(' is no regular expression"):
        pick(model, layers, "(", KINDS, "x")
    with pytest.raises(UserError, match="x=3 must be a name, a group"):
        check_targets(3, KINDS, "x")


def test_a_later_part_acts_first_and_a_copy_has_its_own_parts() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    plain = layer(x)
    first, second = Times(2.0), Plus(1.0)
    hooks = put_behind(layer, "times", first), put_behind(layer, "plus", second)
    assert torch.allclose(layer(x), (plain + 1) * 2)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        first.factor.fill_(5.0)
    assert torch.allclose(twin(x), (plain + 1) * 2) and torch.allclose(layer(x), (plain + 1) * 5)
    with pytest.raises(UserError, match="a part called 'plus' already"):
        put_behind(layer, "plus", Plus(1.0))
    take_off(layer, "plus", hooks[1])
    take_off(layer, "times", hooks[0])
    assert torch.equal(layer(x), plain) and not layer._modules


def test_parts_inside_come_out_in_any_order_and_leave_the_same_parameter() -> None:
    layer = nn.Linear(3, 3)
    weight, order = layer.weight, list(layer._parameters)
    one, two = Times(2.0), Times(3.0)
    orders = put_into(layer, "weight", one), put_into(layer, "weight", two)
    assert behaves(layer, (nn.Linear,)) and plain_type(layer) is nn.Linear and type(layer) is not nn.Linear
    assert base_tensor(layer, "weight") is weight and torch.allclose(layer.weight, 6 * weight)
    assert take_out(layer, "weight", one, orders[0]) is weight
    assert torch.allclose(layer.weight, 3 * weight)
    assert take_out(layer, "weight", two, orders[0]) is weight
    assert layer.weight is weight and list(layer._parameters) == order and type(layer) is nn.Linear
    assert take_out(layer, "weight", two, orders[0]) is None


def test_a_part_that_another_method_has_written_in_is_gone() -> None:
    layer, part = nn.Linear(3, 3), Times(2.0)
    order = put_into(layer, "weight", part)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert take_out(layer, "weight", part, order) is None


def test_write_rounds_once_and_keeps_the_object() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    write(parameter, parameter.double() + 1e-9)
    assert parameter.dtype == torch.float32 and parameter.item() == 1.0


def test_saved_bytes_of_a_linear_layer_and_of_its_frozen_twin() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(7, 5, requires_grad=True)
    assert saved_for_backward(lambda: layer(x), layer) == 7 * 5 * 4  # the input, for the weight's gradient
    assert saved_for_backward(lambda: layer(x).relu(), layer) == 7 * 5 * 4 + 7 * 3 * 4
    layer.requires_grad_(False)
    assert saved_for_backward(lambda: layer(x), layer) == 0


def test_optimizer_bytes_are_two_moments_for_each_trained_number() -> None:
    layer = nn.Linear(5, 3)
    adam = torch.optim.AdamW(layer.parameters(), fused=True)
    assert optimizer_bytes(adam) == 0
    layer(torch.ones(1, 5)).sum().backward()
    adam.step()
    assert optimizer_bytes(adam) == 2 * 4 * (15 + 3) + 2 * 4  # and a step count for each tensor


@pytest.mark.parametrize("names", ["[ssf,lora]", "[lora,ssf]", "[snell,ssf]", "[ssf,svfit]", "[lora,snell]"])
def test_methods_that_merge_compose_exactly_in_either_order(names: str, tmp_path: Path) -> None:
    setting = BenchRun(names, VIT, tmp_path)
    run = setting.trained()
    before = probe(run)
    run.each_reversed("finish")
    assert (probe(run) - before).abs().max() < 1e-5
    assert list(run.model.state_dict()) == list(setting.base.state_dict())
    assert [type(m) for m in run.model.modules()] == [type(m) for m in setting.base.modules()]


@pytest.mark.parametrize("names", ["[ssf,sara]", "[sara,svfit]", "[snell,sara]", "[ssf,bitfit]"])
def test_methods_that_change_the_same_tensor_are_refused(names: str, tmp_path: Path) -> None:
    setting = BenchRun(names, VIT, tmp_path)
    with pytest.raises(UserError, match="both claim the tensor|do not go together: use one of them"):
        setting.fresh()


def test_masks_and_merging_go_together_but_not_two_masks(tmp_path: Path) -> None:
    run = BenchRun("[ssf,lora]", VIT, tmp_path).fresh(edit=False)
    one, two = run.methods
    weight = [run.model.get_parameter("head.weight")]
    run.claim(one, weight, "merge")
    run.claim(two, weight, "mask")
    with pytest.raises(UserError, match="method=ssf and method=lora both claim"):
        run.claim(one, weight, "mask")
    with pytest.raises(UserError, match="both claim"):
        run.claim(one, weight)
