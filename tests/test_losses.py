"""Loss terms against closed forms; mistakes in the choice of terms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filtrun import losses
from filtrun.errors import UserError


def test_values_by_hand() -> None:
    x = torch.tensor([[0.0, 0.5], [1.0, 0.25]]).view(1, 1, 2, 2)
    y = torch.tensor([[0.0, 0.0], [0.5, 0.25]]).view(1, 1, 2, 2)
    assert losses.l1(x, y) == 0.25
    assert losses.l2(x, y) == 0.125
    assert losses.charbonnier(x, y).item() == pytest.approx((2 * 1e-3 + 2 * math.sqrt(0.25 + 1e-6)) / 4)
    assert losses.tv(x, y).item() == pytest.approx((1.0 + 0.25) / 2 + (0.5 + 0.75) / 2)
    # d = [[0, .5], [.5, 0]]: both row and column differences are 0.5 everywhere
    assert losses.gradient(x, y).item() == pytest.approx(1.0)


def test_edge_sees_no_constant_or_ramp() -> None:
    y = torch.rand(1, 3, 16, 16)
    ramp = torch.arange(16.0).view(1, 1, 1, 16) / 16
    assert losses.edge(y + 0.1 + ramp, y).item() == pytest.approx(1e-3, abs=1e-4)
    dot = torch.zeros(1, 1, 3, 3)
    dot[..., 1, 1] = 0.5
    assert losses.edge(dot, torch.zeros(1, 1, 3, 3)).item() == pytest.approx(2.0, abs=1e-5)


def test_ssim_loss_is_one_minus_the_metric() -> None:
    from filtrun.metrics.image import ssim

    x, y = torch.rand(2, 3, 20, 20), torch.rand(2, 3, 20, 20)
    assert losses.ssim(x, y).item() == pytest.approx(1 - ssim(x, y).mean().item(), abs=1e-5)
    assert losses.ssim(x, x).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", [n for n in losses.LOSSES if n != "perceptual"])
def test_gradients_are_finite(name: str) -> None:
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    losses.LOSSES[name](x, torch.rand(1, 3, 16, 16)).backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_vgg_features_of_a_given_network() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3))
    net = losses.VggFeatures(layers, (1, 3))
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    shallow, deep = net(x)
    assert shallow.shape == (2, 4, 8, 8) and deep.shape == (2, 2, 2, 2)
    normal = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(shallow, layers[0](normal).relu())
    deep.sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())
    grey = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(net(grey)[1], net(grey.repeat(1, 3, 1, 1))[1])


def test_weights_and_own_terms() -> None:
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2)
    found = losses.weighted({"l1": 2.0, "l2": 4.0, "tv": 0.0}, x, y)
    assert {name: t.item() for name, t in found.items()} == {"l1": 1.0, "l2": 1.0}

    class Model:
        def regularisers(self):
            return {"smooth": torch.tensor(3.0), "mono": torch.tensor(5.0)}

        def extra_losses(self, output, target, batch):
            return {"coarse": (output - target).abs().mean()}

    own = losses.model_terms({"smooth": 0.1, "mono": 0.0}, Model(), x, y, None)
    assert {name: pytest.approx(t.item()) for name, t in own.items()} == {"smooth": 0.3, "coarse": 0.5}
    with pytest.raises(UserError, match="'smoth'; did you mean 'smooth'"):
        losses.model_terms({"smoth": 0.1}, Model(), x, y, None)
    assert losses.model_terms({}, nn.Identity(), x, y, None) == {}


def test_mistakes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'l3'"):
        losses.check_losses({"l3": 1.0})
    with pytest.raises(UserError, match="task.losses.l1=-1.0 must not be negative"):
        losses.check_losses({"l1": -1.0})
    losses.check_losses({"l1": 0.0})  # the model or a method may have terms of its own
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    losses.vgg_features.cache_clear()
    with pytest.raises(UserError, match="task.losses.perceptual needs VGG-16's weights"):
        losses.check_losses({"l1": 1.0, "perceptual": 0.1})
    losses.check_losses({"l1": 1.0, "perceptual": 0.0})
