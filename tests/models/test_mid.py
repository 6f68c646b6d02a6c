"""The masked U-Net: count, sizes, what it may see, gradients."""

from __future__ import annotations

import pytest
import torch

from filtrun.errors import UserError
from filtrun.models.mid import MaskedUNet


def test_parameters() -> None:
    assert sum(p.numel() for p in MaskedUNet().parameters()) == 436_931
    without = sum(p.numel() for p in MaskedUNet(mask_channel=False).parameters())
    assert 436_931 - without == 9 * 32


@pytest.mark.parametrize("side", [(1, 1), (5, 9), (16, 16)])
@pytest.mark.parametrize("levels", [1, 3])
def test_any_image_size(side: tuple[int, int], levels: int) -> None:
    assert MaskedUNet(1, width=2, levels=levels)(torch.rand(2, 1, *side)).shape == (2, 1, *side)


@pytest.mark.parametrize("shown", [True, False])
def test_what_is_masked_does_not_matter(shown: bool) -> None:
    torch.manual_seed(0)
    model = MaskedUNet(3, width=4, levels=2, mask_channel=shown)
    x, mask = torch.rand(2, 3, 9, 9), (torch.rand(2, 1, 9, 9) < 0.4).float()
    out = model(x, mask)
    assert torch.equal(model(torch.where(mask.bool(), torch.rand_like(x), x), mask), out)
    assert torch.equal(model(x * (1 - mask)), out) != shown  # unseen masks are just black pixels
    assert torch.equal(model(x, torch.zeros(1, 1, 9, 9)), model(x))
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="model.levels=0 is out of range"):
        MaskedUNet(levels=0)
