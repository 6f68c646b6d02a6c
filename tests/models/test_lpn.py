"""Learned proximal networks: convexity, symmetry, monotonicity, published counts, the prior by its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.methods.restoration.proximal_matching import gamma_schedule, matching_loss
from filtrun.models.lpn import LPN, ScalarLPN
from filtrun.models.lpn_prior import conjugate_gradients, invert, pnp_admm, prior_value


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def lively(model: LPN | ScalarLPN, mean: float = -2.5) -> LPN | ScalarLPN:
    """A network in double precision whose non-negative weights are large enough to curve the potential."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.convex_weights():
            weight.copy_(torch.randn_like(weight).sub(-mean).mul(0.5).exp() / weight[0].numel())
    return model.double()


def test_published_parameter_counts() -> None:
    assert count(LPN(1, 28)) == 317_056
    assert count(LPN(3, 128, "large", potential_bias=True)) == 7_235_713
    assert count(LPN(3, 128, "large")) == 7_235_712


@pytest.mark.parametrize(("size", "side", "channels"), [("small", 8, 1), ("small", 9, 3), ("large", 16, 2)])
def test_the_output_is_the_gradient_of_a_convex_function(size: str, side: int, channels: int) -> None:
    model = lively(LPN(channels, side, size, hidden=5))
    x = torch.rand(1, channels, side, side, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(model.prox, x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(jacobian, jacobian.T, atol=1e-9, rtol=1e-6)
    lowest = torch.linalg.eigvalsh(jacobian).min().item()
    assert lowest >= 2 * model.alpha - 1e-9
    a, b = torch.randn(2, 6, channels, side, side, dtype=torch.float64)
    t = torch.rand(6, 1, 1, 1, dtype=torch.float64)
    between = model.potential(t * a + (1 - t) * b)
    assert (between <= t.flatten() * model.potential(a) + (1 - t.flatten()) * model.potential(b) + 1e-9).all()
    assert (((model.prox(a) - model.prox(b)) * (a - b)).flatten(1).sum(1) > 0).all()
    step = 1e-5 * torch.randn_like(x)
    difference = model.potential(x + step) - model.potential(x - step)
    torch.testing.assert_close(difference, 2 * (model.prox(x) * step).sum().reshape(1), atol=1e-12, rtol=1e-4)


def test_a_negative_weight_breaks_convexity_and_project_mends_it() -> None:
    model = lively(ScalarLPN(1, hidden=8, layers=1, beta=5.0))
    with torch.no_grad():
        model.lin[-1].weight.neg_()
    line = torch.linspace(-3, 3, 200, dtype=torch.float64)[:, None]
    assert (model(line).diff(dim=0) < 0).any()
    model.project()
    assert min(w.min() for w in model.convex_weights()) >= 0
    assert (model(line).diff(dim=0) >= 0).all()


def test_alpha_adds_twice_its_share_of_the_input() -> None:
    plain, strong = (LPN(1, 8, hidden=4, alpha=a) for a in (0.0, 0.3))
    strong.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(strong(x) - plain(x), 0.6 * x, atol=1e-6, rtol=1e-5)


def slow_potential(model: LPN, x: Tensor) -> Tensor:
    """The small network's potential, written layer by layer."""
    act = lambda t: torch.log1p(torch.exp(model.beta * t)) / model.beta  # noqa: E731
    half, quarter = ((s, s) for s in (-(-model.image_size // 2), -(-model.image_size // 4)))
    z = act(F.conv2d(x, model.lin[0].weight, padding=1))
    z = act(F.conv2d(z, model.lin[1].weight, stride=2, padding=1) + model.res[0](x))
    small = F.interpolate(x, half, mode="bilinear", align_corners=False)
    z = act(F.conv2d(z, model.lin[2].weight, padding=1) + model.res[1](small))
    z = act(F.conv2d(z, model.lin[3].weight, stride=2, padding=1) + model.res[2](small))
    least = F.interpolate(x, quarter, mode="bilinear", align_corners=False)
    z = act(z.reshape(len(x), -1) @ model.lin[4].weight.T + model.res[3](least.reshape(len(x), -1)))
    return (z @ model.lin[5].weight.T)[:, 0] + model.alpha * (x**2).sum((1, 2, 3))


def test_potential_equals_the_layers_one_by_one() -> None:
    model = lively(LPN(2, 10, hidden=3))
    x = torch.rand(3, 2, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(model.potential(x), slow_potential(model, x), atol=1e-10, rtol=1e-10)


def test_gradients_reach_every_parameter_and_the_input_stays_as_it_is() -> None:
    model = LPN(1, 8, hidden=4)
    model.reset(-3.0, 0.1)
    x = torch.rand(2, 1, 8, 8)
    loss = (model(x) - torch.rand(2, 1, 8, 8)).square().mean()
    loss.backward()
    assert not x.requires_grad
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad():
        quiet = model(x)
    with torch.inference_mode():
        quieter = model(x)
    assert not quiet.requires_grad and torch.equal(quiet, model(x).detach()) and torch.equal(quiet, quieter)


def test_larger_images_are_averaged_patches_and_smaller_ones_are_filled_up() -> None:
    model = LPN(1, 8, hidden=3)
    model.reset(-2.0, 0.1)
    x = torch.rand(2, 1, 8, 13)
    out = model(x, patches=3)
    starts, total, hits = [0, 4, 5], torch.zeros_like(x), torch.zeros(13)
    for s in starts:
        total[..., s : s + 8] += model.prox(x[..., s : s + 8]).detach()
        hits[s : s + 8] += 1
    torch.testing.assert_close(out.detach(), total / hits)
    assert model(torch.rand(1, 1, 3, 20)).shape == (1, 1, 3, 20)
    assert model(torch.rand(1, 1, 5, 5)).shape == (1, 1, 5, 5)


def test_the_prior_is_the_one_the_network_is_the_proximal_operator_of() -> None:
    model = lively(LPN(1, 6, hidden=3, alpha=0.2))
    z, w = torch.randn(2, 4, 1, 6, 6, dtype=torch.float64)
    x, u = model.prox(z).detach(), model.prox(w).detach()
    torch.testing.assert_close(invert(model, x, steps=300), z, atol=1e-4, rtol=1e-4)
    at_x, at_u = prior_value(model, x, z), prior_value(model, u, w)
    torch.testing.assert_close(prior_value(model, x, steps=300), at_x, atol=1e-6, rtol=1e-6)
    for i in range(4):  # x minimises R(v) + |v - z|^2 / 2 over all v in the range
        best = at_x[i] + 0.5 * (x[i] - z[i]).square().sum()
        assert (best <= at_u + 0.5 * (u - z[i]).square().flatten(1).sum(1) + 1e-9).all()


def test_conjugate_gradients_and_admm_reach_the_closed_form() -> None:
    """With R(u) = c |u|^2 / 2 the proximal operator is v / (1 + c); for rho = 1 ADMM then solves a linear system."""
    torch.manual_seed(3)
    a = torch.randn(9, 12, dtype=torch.float64)
    u = torch.randn(2, 12, dtype=torch.float64)
    y, c = u @ a.T, 0.5
    b = torch.randn(2, 12, dtype=torch.float64)
    solved = conjugate_gradients(lambda v: v @ (a.T @ a) + v, b, torch.zeros_like(b), 50, 1e-12)
    torch.testing.assert_close(solved, torch.linalg.solve(a.T @ a + torch.eye(12, dtype=torch.float64), b.T).T)
    found = pnp_admm(
        lambda v: v / (1 + c), lambda v: v @ a.T, lambda v: v @ a, y, rho=1.0, scale=2.0, steps=200, tolerance=1e-12
    )
    exact = torch.linalg.solve(4 * a.T @ a + c * torch.eye(12, dtype=torch.float64), 4 * (y @ a).T).T
    torch.testing.assert_close(found.image, exact, atol=1e-6, rtol=1e-6)
    assert found.residuals[-1] < 1e-6 < found.residuals[0]


def test_matching_asks_for_the_mode_and_the_square_for_the_mean_of_the_posterior() -> None:
    """Laplacian prior, unit noise: the mode is the observation shrunk by 1 (paper, Fig. 2), the mean is smoother."""
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    guesses = torch.linspace(-1, 4, 501, dtype=torch.float64)
    for y, shrunk in ((0.3, 0.0), (1.6, 0.6), (2.0, 1.0)):
        density = torch.exp(-grid.abs() - 0.5 * (y - grid) ** 2)
        steps = (density.cumsum(0) / density.sum()).contiguous()
        levels = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        x = grid[torch.searchsorted(steps, levels)][:, None]  # equally likely values of the clean signal
        losses = torch.stack([matching_loss(f.expand(4000, 1), x, 0.05) for f in guesses])
        squares = torch.stack([F.mse_loss(f.expand(4000, 1), x) for f in guesses])
        assert abs(guesses[losses.argmin()].item() - shrunk) < 0.06
        assert abs(guesses[squares.argmin()].item() - x.mean().item()) < 0.01 and abs(x.mean().item() - shrunk) > 0.1
    assert matching_loss(torch.zeros(2, 3), torch.ones(2, 3), 1.5).item() == pytest.approx(1 - math.exp(-3 / 2.25))
    assert gamma_schedule(0.5, 4) == [4.0, 2.0, 1.0, 0.5]


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="did you mean 'small'"):
        LPN(size="smal")
    with pytest.raises(UserError, match=r"model.image_size=6 is out of range; allowed is \[8, inf\]"):
        LPN(1, 6, "large")
    with pytest.raises(UserError, match="beta=0"):
        LPN(beta=0)
