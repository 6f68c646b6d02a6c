"""Batched augmentation against a loop over images, and its statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from filtrun.data.augment import Augment, crop_and_flip, cut_out
from filtrun.errors import UserError


def slow_crop_and_flip(x, pad, flip, padding):
    """The same draws, one image at a time: pad, crop, mirror."""
    n, _, h, w = x.shape
    if pad:
        down = torch.randint(-pad, pad + 1, (n, 1)).flatten().tolist()
        right = torch.randint(-pad, pad + 1, (n, 1)).flatten().tolist()
    mirrored = (torch.rand(n, 1) < 0.5).flatten().tolist() if flip else [False] * n
    out = []
    for i in range(n):
        image = x[i : i + 1]
        if pad:
            image = F.pad(image, (pad,) * 4, mode="reflect" if padding == "reflect" else "constant")
            image = image[..., pad + down[i] : pad + down[i] + h, pad + right[i] : pad + right[i] + w]
        out.append(image.flip(-1) if mirrored[i] else image)
    return torch.cat(out)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize(("pad", "flip"), [(0, True), (3, False), (3, True), (5, True)])
def test_crop_and_flip_equals_the_slow_loop(pad, flip, padding):
    x = torch.rand(64, 3, 6, 9)
    before = x.clone()
    torch.manual_seed(0)
    fast = crop_and_flip(x, pad, flip, padding)
    torch.manual_seed(0)
    assert torch.equal(fast, slow_crop_and_flip(x, pad, flip, padding))
    assert torch.equal(x, before)


def test_cutout_equals_the_slow_loop():
    x = torch.rand(64, 2, 7, 5)
    for side in (1, 3, 4, 9):
        torch.manual_seed(side)
        fast = cut_out(x, side, 0.5)
        torch.manual_seed(side)
        rows, cols = torch.randint(0, 7, (64, 1)), torch.randint(0, 5, (64, 1))
        slow = x.clone()
        for i in range(64):
            top, left = int(rows[i]) - side // 2, int(cols[i]) - side // 2
            slow[i, :, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0.5
        assert torch.equal(fast, slow)


def test_half_are_mirrored_and_offsets_are_uniform():
    torch.manual_seed(0)
    ramp = torch.arange(9.0).view(1, 1, 1, 9).expand(20000, 1, 9, 9).clone()
    out = Augment(flip=True)(ramp)
    assert abs((out[:, 0, 0, 0] == 8).float().mean().item() - 0.5) < 0.015
    # with a pad of 2 the pixel in the middle shows columns 2..6, each with probability 1/5
    middle = Augment(crop_pad=2)(ramp)[:, 0, 4, 4].long().bincount(minlength=9) / 20000
    assert middle[:2].sum() == middle[7:].sum() == 0
    assert torch.allclose(middle[2:7], torch.full((5,), 0.2), atol=0.015)


def test_images_of_a_batch_get_their_own_draws():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16).expand(32, 3, 16, 16)
    assert len(torch.unique(Augment(crop_pad=4, flip=True, cutout=4)(x).flatten(1), dim=0)) > 28


def test_off_is_the_identity_and_draws_nothing():
    x = torch.rand(2, 3, 4, 4)
    state = torch.get_rng_state()
    assert Augment()(x) is x and not Augment()
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_options():
    with pytest.raises(UserError, match="crop_pad=4 needs images larger than 4 pixels; these have 4x4"):
        Augment(crop_pad=4)(torch.rand(1, 1, 4, 4))
    with pytest.raises(UserError, match="augment.padding=wrap is not allowed"):
        Augment(padding="wrap")
    with pytest.raises(UserError, match="augment.cutout=-1"):
        Augment(cutout=-1)
