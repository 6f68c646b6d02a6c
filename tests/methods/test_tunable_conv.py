"""Tunable convolutions: against plain ones with the kernels mixed by hand, at every stride, group and padding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.methods.restoration.tunable_conv import TunableConv, objective, sample_knobs
from filtrun.methods.restoration.tunable_layers import TunableConv2d, bake, knobs_of, make_tunable, set_knobs

CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "dilated, no bias": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
}


def randomise(model: nn.Module) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))


def by_hand(plain: nn.Conv2d, layer: TunableConv2d, x: Tensor, px: Tensor) -> Tensor:
    """A plain convolution for each image, with kernels summed up in a loop."""
    out = []
    for image, row in zip(x, px, strict=True):
        weights = row if layer.mixer is None else layer.mixer.weight @ row + layer.mixer.bias
        conv = copy.deepcopy(plain)
        conv.weight.data = sum(w * k for w, k in zip(weights, layer.weight.data, strict=True))
        if layer.bias is not None:
            conv.bias.data = sum(w * k for w, k in zip(weights, layer.bias.data, strict=True))
        out.append(conv(image[None]))
    return torch.cat(out).detach()


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize(("mode", "expand"), [("linear", 1), ("mlp", 1), ("mlp", 3), ("linear", 2)])
def test_a_batch_equals_one_plain_convolution_per_image(kind: str, mode: str, expand: int) -> None:
    torch.manual_seed(0)
    plain = CONVS[kind]()
    model = nn.Sequential(copy.deepcopy(plain))
    knobs = make_tunable(model, ["a", "b", "c"], mode=mode, expand=expand)
    randomise(model)
    x, px = torch.randn(4, 4, 9, 8), torch.rand(4, 3)
    knobs.drawn = px
    assert isinstance(model[0], TunableConv2d) and model[0].size == 3 * expand
    torch.testing.assert_close(model(x), by_hand(plain, model[0], x, px), atol=1e-5, rtol=1e-5)
    set_knobs(model, {"a": 0.2, "b": 0.5})
    tuned = model(x)
    torch.testing.assert_close(knobs.setting, torch.tensor([0.2, 0.5, 0.3]))
    bake(model)
    assert type(model[0]) is nn.Conv2d and not hasattr(model, "knobs")
    torch.testing.assert_close(model(x), tuned, atol=1e-5, rtol=1e-5)


def test_corners_are_the_kernels_and_linear_mode_is_linear() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    knobs = make_tunable(model, ["a", "b"], mode="linear", simplex=False)
    randomise(model)
    layer, x = model[0], torch.randn(2, 2, 6, 6)
    for i, px in enumerate(torch.eye(2)):
        knobs.drawn = px.expand(2, 2)
        torch.testing.assert_close(model(x), F.conv2d(x, layer.weight[i], layer.bias[i]), atol=1e-6, rtol=1e-6)

    def at(px: Tensor) -> Tensor:
        knobs.drawn = px
        return model(x)

    p, q = torch.rand(2, 2), torch.rand(2, 2)
    torch.testing.assert_close(at(2 * p - 3 * q), 2 * at(p) - 3 * at(q), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "mlp"])
def test_copy_start_is_the_identity_on_the_simplex_and_own_start_has_the_scale_of_a_plain_layer(mode: str) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    x = torch.randn(3, 8, 9, 9)
    plain = model(x)
    copied = copy.deepcopy(model)
    knobs = make_tunable(copied, ["a", "b", "c"], mode=mode, expand=2)
    knobs.drawn = sample_knobs(3, 3, "simplex", 0.3, torch.device("cpu"))
    torch.testing.assert_close(copied(x), plain, atol=1e-6, rtol=1e-5)
    bound = 1 / math.sqrt(8 * 9)
    for start, factor in (("own", 1.0), ("official", 1 / math.sqrt(3 * 16))):
        fresh = copy.deepcopy(model)
        make_tunable(fresh, ["a", "b", "c"], mode="linear", start=start)
        largest = fresh[0].weight.abs().max().item()
        assert 0.98 * bound * factor < largest <= bound * factor
        assert not torch.equal(fresh[0].weight[0], fresh[0].weight[1])


def test_setting_knobs_says_what_is_wrong() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(UserError, match="has no knobs; train it with method=tunable_conv"):
        set_knobs(model, {"denoise": 0.3})
    make_tunable(model, ["denoise", "keep"])
    set_knobs(model, {"denoise": 0.3})
    torch.testing.assert_close(knobs_of(model).setting, torch.tensor([0.3, 0.7]))
    with pytest.raises(UserError, match="did you mean 'denoise'"):
        set_knobs(model, {"denoize": 0.3})
    with pytest.raises(UserError, match=r"knobs.keep=2 must be a number in \[0, 1\]"):
        set_knobs(model, {"keep": 2})
    with pytest.raises(UserError, match="the knobs of this model sum to 1, these to 1.2"):
        set_knobs(model, {"denoise": 0.6, "keep": 0.6})
    with pytest.raises(UserError, match="has knobs already"):
        make_tunable(model, ["a"])
    with pytest.raises(UserError, match="has no plain Conv2d"):
        make_tunable(nn.Sequential(nn.Linear(2, 2)), ["a"])
    cube = nn.Sequential(nn.Conv2d(1, 1, 1))
    make_tunable(cube, ["a", "b"], simplex=False)
    set_knobs(cube, {"a": 1.0})
    torch.testing.assert_close(knobs_of(cube).setting, torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("sampling", ["simplex", "cube"])
def test_knob_samples_have_the_mean_of_their_distribution(sampling: str) -> None:
    torch.manual_seed(3)
    px = sample_knobs(20_000, 3, sampling, 0.25, torch.device("cpu"))
    assert px.shape == (20_000, 3) and px.min() >= 0 and px.max() <= 1
    corner = (px.max(1).values == 1).float().mean().item()
    assert abs(corner - 0.25) < 0.015
    inside = px[px.max(1).values < 1]
    mean, variance = inside.mean(0), inside.var(0)
    if sampling == "simplex":  # Dirichlet(1, 1, 1): mean 1/3, variance (1/3)(2/3)/4
        torch.testing.assert_close(px.sum(1), torch.ones(20_000))
        torch.testing.assert_close(mean, torch.full((3,), 1 / 3), atol=0.01, rtol=0)
        torch.testing.assert_close(variance, torch.full((3,), 1 / 18), atol=0.004, rtol=0)
    else:
        torch.testing.assert_close(mean, torch.full((3,), 0.5), atol=0.01, rtol=0)
        torch.testing.assert_close(variance, torch.full((3,), 1 / 12), atol=0.004, rtol=0)


def test_the_loss_weighs_the_objectives_of_every_image_with_its_knobs() -> None:
    torch.manual_seed(4)
    out, y, x, px = (torch.rand(3, 1, 5, 5) for _ in range(3)), None, None, torch.rand(3, 3)
    out, y, x = out
    method = TunableConv(knobs=["a", "b", "c"], objectives=["l1", "input_l2", "gradient"], scales=[1.0, 2.0, 0.5])
    expected = 0.0
    for b in range(3):
        d = out[b] - y[b]
        smooth = (d[:, 1:] - d[:, :-1]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()
        terms = [d.abs().mean(), 2 * (out[b] - x[b]).square().mean(), 0.5 * smooth]
        expected += sum(p * t for p, t in zip(px[b], terms, strict=True)) / 3
    torch.testing.assert_close(method.mixed_loss(out, y, x, px), expected)
    with pytest.raises(UserError, match="differ in shape"):
        objective("input_l1", out, y, x[..., :2])


def test_the_dial_learns_the_closed_form_between_input_and_target() -> None:
    """With both objectives quadratic the best output is px * target + (1 - px) * input: here x + px * 0.5."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    method = TunableConv(mode="linear").attach(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model.train()
    for _ in range(300):
        x = torch.rand(16, 1, 4, 4)
        loss = method.mixed_loss(model(x), x + 0.5, x, method.board.drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x = torch.rand(2, 1, 4, 4)
    for value in (0.0, 0.3, 1.0):
        set_knobs(model, {"denoise": value})
        torch.testing.assert_close(model(x).detach(), x + 0.5 * value, atol=0.02, rtol=0)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="did you mean 'gradient'"):
        TunableConv(objectives=["l2", "gradients"])
    with pytest.raises(UserError, match="one objective for each of its 2 knobs"):
        TunableConv(objectives=["l2"])
    with pytest.raises(UserError, match="must not be negative"):
        TunableConv(scales=[1.0, -1.0])
    with pytest.raises(UserError, match="unknown knob"):
        TunableConv(fixed={"sharpen": 1.0})
