"""MISF: per-pixel filters against a loop, published counts, official quirks, any image size, gradients everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.models.misf import MISF
from filtrun.models.misf_parts import PatchDiscriminator, composite, expand_kernels, pixelwise_filter


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def holes(n: int, h: int, w: int) -> Tensor:
    return (torch.rand(n, 1, h, w) < 0.3).float()


def test_published_parameter_counts() -> None:
    assert count(MISF(unused_layer=True)) == 23_059_493
    assert count(MISF()) == 23_059_493 - 327
    assert count(PatchDiscriminator()) == 2_763_776
    assert count(MISF(width=16)) == 1_447_886


@pytest.mark.parametrize("size", [1, 3, 5])
def test_filtering_equals_the_sum_over_taps_pixel_by_pixel(size: int) -> None:
    torch.manual_seed(0)
    x, kernels = torch.randn(2, 3, 5, 4), torch.randn(2, 3 * size**2, 5, 4)
    slow = torch.zeros_like(x)
    reach = size // 2
    for c in range(3):
        for i in range(5):
            for j in range(4):
                for tap in range(size**2):
                    a, b = i + tap // size - reach, j + tap % size - reach
                    if 0 <= a < 5 and 0 <= b < 4:
                        slow[:, c, i, j] += kernels[:, c * size**2 + tap, i, j] * x[:, c, a, b]
    torch.testing.assert_close(pixelwise_filter(x, kernels, size), slow, atol=1e-5, rtol=1e-5)


def test_delta_kernels_leave_the_image_or_shift_it() -> None:
    x = torch.rand(1, 2, 4, 5)

    def delta(tap: int) -> Tensor:
        kernels = torch.zeros(1, 2, 9, 4, 5)
        kernels[:, :, tap] = 1
        return kernels.flatten(1, 2)

    assert torch.equal(pixelwise_filter(x, delta(4)), x)
    left = pixelwise_filter(x, delta(5))
    assert torch.equal(left[..., :-1], x[..., 1:]) and not left[..., -1].any()


def test_expanded_kernels() -> None:
    torch.manual_seed(1)
    kernels = torch.randn(2, 6 * 9, 3, 3)
    official, grouped = (expand_kernels(kernels, 6, 4, how) for how in ("official", "grouped"))
    assert official.shape == grouped.shape == (2, 24 * 9, 3, 3)
    for j in range(24 * 9):
        assert torch.equal(official[:, j], kernels[:, j // 4])
        channel, tap = divmod(j, 9)
        assert torch.equal(grouped[:, j], kernels[:, (channel // 4) * 9 + tap])
    distinct = {len(set(official[0, 9 * c : 9 * c + 9, 0, 0].tolist())) for c in range(24)}
    assert distinct == {3}
    assert len(set(grouped[0, :9, 0, 0].tolist())) == 9


@pytest.mark.parametrize("expand", ["official", "grouped"])
def test_semantic_filters_act_on_the_deep_features_and_image_filters_on_the_output(expand: str) -> None:
    """The whole network, put together from its parts by hand."""
    torch.manual_seed(2)
    model = MISF(width=4, blocks=1, expand=expand)
    x, mask = torch.rand(2, 3, 16, 20), holes(2, 16, 20)
    z = torch.cat([x * (1 - mask), mask], 1)
    half = model.encoder1(model.encoder0(z))
    assert model.kpn_model is not None
    semantic, image = model.kpn_model(z, half)
    assert semantic.shape == (2, 4 * 9, 4, 5) and image.shape == (2, 27, 16, 20)
    deep = pixelwise_filter(model.encoder2(half), expand_kernels(semantic, 4, 4, expand))
    expected = (torch.tanh(pixelwise_filter(model.decoder(model.middle(deep)), image)) + 1) / 2
    torch.testing.assert_close(model(x, mask), expected)


def test_what_is_under_the_mask_does_not_matter_and_the_output_is_an_image() -> None:
    torch.manual_seed(3)
    model = MISF(width=4, blocks=2).eval()
    x, mask = torch.rand(2, 3, 17, 30), holes(2, 17, 30)
    out = model(x, mask)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert torch.equal(model(torch.where(mask.bool(), torch.rand_like(x), x), mask), out)
    mixed = composite(out, x, mask)
    outside = mask.expand_as(x) == 0
    assert torch.equal(mixed[outside], x[outside]) and torch.equal(mixed[~outside], out[~outside])


@pytest.mark.parametrize("side", [(1, 1), (5, 7), (12, 12), (13, 33)])
def test_any_image_size(side: tuple[int, int]) -> None:
    model = MISF(in_channels=1, width=2, blocks=1)
    assert model(torch.rand(1, 1, *side), holes(1, *side)).shape == (1, 1, *side)


def test_padding_does_not_touch_images_that_fit() -> None:
    model = MISF(width=2, blocks=1)
    x, mask = torch.rand(1, 3, 16, 12), holes(1, 16, 12)
    assert torch.equal(model(x, mask), model.fill(torch.cat([x * (1 - mask), mask], 1)))


def test_official_sides_change_only_images_that_are_not_square() -> None:
    torch.manual_seed(4)
    plain, official = MISF(width=4, blocks=1), MISF(width=4, blocks=1, official_sides=True)
    official.load_state_dict(plain.state_dict())
    for shape, same in (((16, 16), True), ((16, 24), False)):
        x, mask = torch.rand(1, 3, *shape), holes(1, *shape)
        assert torch.allclose(plain(x, mask), official(x, mask), atol=1e-6) == same


@pytest.mark.parametrize("filtering", ["both", "semantic", "image", "none"])
def test_gradients_reach_every_parameter(filtering: str) -> None:
    torch.manual_seed(5)
    model = MISF(width=8, blocks=1, filtering=filtering)
    x, mask = torch.rand(2, 3, 16, 16), holes(2, 16, 16)
    (model(x, mask) - x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_ablation_keeps_only_the_layers_it_needs() -> None:
    sizes = {kind: count(MISF(width=8, filtering=kind)) for kind in ("both", "semantic", "image", "none")}
    assert sizes["none"] < sizes["semantic"] < sizes["image"] < sizes["both"]


@pytest.mark.parametrize(("side", "grid"), [((24, 24), (1, 1)), ((64, 64), (6, 6)), ((256, 256), (30, 30))])
def test_the_discriminator_judges_patches_of_70_pixels(side: tuple[int, int], grid: tuple[int, int]) -> None:
    model = PatchDiscriminator(width=2).eval()
    x = torch.rand(1, 3, *side, requires_grad=True)
    out = model(x)
    assert out.shape == (1, 1, *grid)
    if side == (256, 256):
        out[0, 0, 15, 15].backward()
        assert x.grad is not None
        seen = x.grad.abs().sum((0, 1)).nonzero()
        assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_spectral_norm_of_every_layer_is_one() -> None:
    torch.manual_seed(6)
    model = PatchDiscriminator(width=4)
    for _ in range(60):  # one power iteration in each forward
        model(torch.rand(1, 3, 32, 32))
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        assert conv.bias is None
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="did you mean 'semantic'"):
        MISF(filtering="semantics")
    with pytest.raises(UserError, match="unknown model.expand 'group'"):
        MISF(expand="group")
    with pytest.raises(UserError, match="model.kernel_size=2 must be odd"):
        MISF(kernel_size=2)
    with pytest.raises(UserError, match=r"model.width=0 is out of range"):
        MISF(width=0)
