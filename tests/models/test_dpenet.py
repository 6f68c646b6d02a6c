"""DPENet: blocks against their formulas, published counts, the official ReLU, and its loss against other libraries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.models.dpenet import DDRB, ERPAB, DPENet, dpenet_loss, edge_loss, laplacian, ssim_zero_padded
from filtrun.tasks.pair import pair


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_published_parameter_counts() -> None:
    assert count(DPENet()) == count(DPENet(out_act="relu")) == 647_328
    assert count(DPENet()) - count(DPENet(light=True)) == 5 * count(DDRB(32)) == 5 * 6 * 32 * 32 * 9


def slow_conv(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """A bias-free 3x3 convolution as a sum of shifted images."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (dilation,) * 4)
    out = torch.zeros(len(x), len(weight), h, w)
    for i in range(3):
        for j in range(3):
            part = padded[..., i * dilation : i * dilation + h, j * dilation : j * dilation + w]
            out += torch.einsum("oc,nchw->nohw", weight[:, :, i, j], part)
    return out


def test_blocks_equal_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 4, 9, 8)
    block = DDRB(4)
    w = [p.detach() for p in block.parameters()]
    p1 = slow_conv(slow_conv(x, w[0], 1).relu(), w[1], 1)
    p2 = slow_conv(slow_conv((x + p1).relu(), w[2], 2).relu(), w[3], 2)
    p3 = slow_conv(slow_conv((x + p1 + p2).relu(), w[4], 5).relu(), w[5], 5)
    torch.testing.assert_close(block(x), (x + p1 + p2 + p3).relu(), atol=1e-5, rtol=1e-5)

    attention = ERPAB(4, reduction=2)
    a, b, c = (slow_conv(x, m.weight, d) for m, d in zip(
        (attention.inconv1, attention.inconv2, attention.inconv3), (1, 2, 5), strict=True))  # fmt: skip
    mixed = torch.cat([a, b, c], 1)
    point = attention.outconv[0]
    u = (torch.einsum("oc,nchw->nohw", point.weight[:, :, 0, 0], mixed) + point.bias[:, None, None]).relu()
    gate = torch.sigmoid(slow_conv(slow_conv(u, attention.pa[0].weight, 1).relu(), attention.pa[2].weight, 1))
    assert attention.pa[0].weight.shape[0] == 2
    torch.testing.assert_close(attention(x), (x + u * gate).relu(), atol=1e-5, rtol=1e-5)


def test_zero_weights_give_the_input_back() -> None:
    model = DPENet(width=4, streak_blocks=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    x = torch.rand(1, 3, 7, 6)
    mid, out = model(x)
    assert torch.equal(mid, x) and torch.equal(out, x)
    assert torch.equal(model.eval()(x), x)


def test_the_official_relu_can_only_brighten() -> None:
    torch.manual_seed(1)
    x = torch.rand(2, 3, 12, 12)
    free, official = DPENet(width=8, streak_blocks=2), DPENet(width=8, streak_blocks=2, out_act="relu")
    with torch.no_grad():
        free.outconv2[0].weight.abs_().neg_()
    official.load_state_dict(free.state_dict())
    mid, out = official.stages(x)
    assert (mid >= x).all() and (out >= mid).all()
    mid, out = free.stages(x)
    assert (mid < x).any() and (out < mid).any()


def test_training_gives_both_stages_and_evaluation_the_last() -> None:
    model = DPENet(width=4, streak_blocks=1, detail_blocks=1)
    x = torch.rand(1, 3, 5, 9)
    mid, out = model(x)
    assert mid.shape == out.shape == x.shape
    assert torch.equal(model.eval()(x), out)


def test_receptive_field_ends_at_the_sum_of_dilations() -> None:
    """One block of each kind: 2 (1 + 2 + 5) pixels in the first, 5 + 1 + 1 in the second."""
    torch.manual_seed(2)
    model = DPENet(width=4, streak_blocks=1, detail_blocks=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().mul_(0.1)  # nothing cancels, no ReLU closes, no sigmoid saturates
    x = torch.rand(1, 3, 61, 61, dtype=torch.float64, requires_grad=True)
    model.stages(x)[1][0, :, 30, 30].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert seen.min(0).values.tolist() == [30 - 23] * 2 and seen.max(0).values.tolist() == [30 + 23] * 2


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(3)
    model = DPENet(width=8, streak_blocks=2)
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    dpenet_loss(*model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_ssim_with_zeros_outside_is_skimage_s_inside() -> None:
    """Away from the border the map is the usual one: means over images that are zero near the border agree."""
    from skimage.metrics import structural_similarity

    torch.manual_seed(4)
    a = F.pad(torch.rand(1, 1, 24, 24), (12,) * 4)
    b = (a + 0.1 * F.pad(torch.randn(1, 1, 24, 24), (12,) * 4)).clamp(0, 1)
    theirs = structural_similarity(
        a[0, 0].numpy(), b[0, 0].numpy(), data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        full=True,
    )[1].mean()  # fmt: skip
    assert ssim_zero_padded(a, b).item() == pytest.approx(theirs, abs=1e-5)
    assert ssim_zero_padded(a, a).item() == pytest.approx(1)


def test_the_laplacian_is_the_pyramid_s_finest_level() -> None:
    torch.manual_seed(5)
    x = torch.rand(1, 2, 7, 8)
    taps = torch.tensor([0.05, 0.25, 0.4, 0.25, 0.05])

    def blur(image: Tensor) -> Tensor:
        padded, out = F.pad(image, (2,) * 4, mode="replicate"), torch.zeros_like(image)
        for i in range(5):
            for j in range(5):
                out += taps[i] * taps[j] * padded[..., i : i + image.shape[2], j : j + image.shape[3]]
        return out

    kept = torch.zeros_like(x)
    kept[..., ::2, ::2] = 4 * blur(x)[..., ::2, ::2]
    torch.testing.assert_close(laplacian(x), x - blur(kept), atol=1e-6, rtol=1e-5)
    assert edge_loss(x, x).item() == pytest.approx(1e-3)
    far = (laplacian(x) - laplacian(1 - x)).square()
    assert edge_loss(x, 1 - x).item() == pytest.approx((far + 1e-6).sqrt().mean().item(), rel=1e-5)


def test_the_loss_of_perfect_outputs_is_minus_one_and_its_terms_add_up() -> None:
    torch.manual_seed(6)
    y, mid, out = torch.rand(3, 2, 3, 20, 20)
    assert dpenet_loss(y, y, y).item() == pytest.approx(-1 + 0.05 * 2e-3)
    terms = DPENet(width=2, streak_blocks=1).extra_losses((mid, out), y, None)
    total = terms["ssim_mid"] + terms["ssim_out"] - 1 + 0.05 * terms["edge"]
    torch.testing.assert_close(total, dpenet_loss(mid, out, y))


def test_the_configuration_trains_on_the_paper_s_loss() -> None:
    """Up to its constant: 1 - SSIM of each of the two stages instead of 1 minus both."""
    from filtrun.api import compose
    from filtrun.tasks.derain import Derain

    config, _, _ = compose("model=dpenet", "data=photos", "method=full")
    task = Derain(losses=config["task"]["losses"], model_losses=config["task"]["model_losses"])
    torch.manual_seed(7)
    model = DPENet(width=4, streak_blocks=1, detail_blocks=1)
    x, y = torch.rand(2, 2, 3, 20, 20)
    terms = task.loss_terms(SimpleNamespace(model=model), pair(x, y), model(x))
    assert terms.keys() == {"model_ssim_mid", "model_ssim_out", "model_edge"}
    torch.testing.assert_close(sum(terms.values()), dpenet_loss(*model(x), y) + 1)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="unknown model.out_act 'tanh'"):
        DPENet(out_act="tanh")
    with pytest.raises(UserError, match="model.streak_blocks=0 is out of range"):
        DPENet(streak_blocks=0)
