"""Batched augmentation against a loop over images, and its statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from filtrun.data.augment import Augment, alternating, crop_and_flip, cut_out
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


@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_crops_and_flips_are_distributed_as_torchvision_s(padding):
    """Every (row offset, column offset, mirrored) as often as with per-sample transforms: a chi-square test."""
    from scipy.stats import chi2_contingency

    from filtrun.compat import torchvision

    torchvision()
    from torchvision.transforms import v2

    torch.manual_seed(0)
    image = torch.arange(64.0).view(1, 8, 8) + 1  # every view of it is another picture
    theirs = v2.Compose([
        v2.RandomCrop(8, 2, padding_mode="reflect" if padding == "reflect" else "constant"), v2.RandomHorizontalFlip()
    ])  # fmt: skip
    count = 6000
    slow = torch.stack([theirs(image) for _ in range(count)])
    fast = Augment(crop_pad=2, flip=True, padding=padding)(image.expand(count, 1, 8, 8))
    kinds, which = torch.cat([slow, fast]).flatten(1).unique(dim=0, return_inverse=True)
    assert len(kinds) == 5 * 5 * 2
    counts = torch.stack([part.bincount(minlength=len(kinds)) for part in which.split(count)])
    assert counts.min() > 60
    assert chi2_contingency(counts.numpy()).pvalue > 1e-3


def test_alternating_flips_show_both_sides_in_every_two_epochs():
    index = torch.randperm(5000)
    first = alternating(index, 0, seed=3)
    assert abs(first.float().mean().item() - 0.5) < 0.02
    assert torch.equal(alternating(index, 1, seed=3), ~first) and torch.equal(alternating(index, 2, seed=3), first)
    assert 0.45 < (alternating(index, 0, seed=4) == first).float().mean() < 0.55  # another seed, another half
    order = index.argsort()
    runs = first[order].int().diff().abs().float().mean()  # neighbours agree as often as not
    assert 0.47 < runs < 0.53
    some = torch.randperm(5000)[:100]
    assert torch.equal(alternating(index[some], 0, seed=3), first[some])  # whatever batch an image is in


def splitmix64(index, seed):
    """The hash with Python's integers."""
    mask = (1 << 64) - 1
    z = (index + 0x9E3779B97F4A7C15 * (seed + 1)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z >> 31 & 1


def test_the_hash_is_splitmix64():
    index = torch.cat([torch.arange(200), torch.tensor([2**31, 2**40 + 7])])
    for seed in (0, 1, 12345, 2**62):
        expected = [bool(splitmix64(i, seed)) for i in index.tolist()]
        assert alternating(index, 0, seed).tolist() == expected


def test_alternating_augmentation_mirrors_by_index_and_draws_nothing():
    x, index = torch.rand(50, 3, 4, 4), torch.randperm(50)
    augment = Augment(flip=True, alternate=True)
    state = torch.get_rng_state()
    for epoch in (0, 1):
        mirrored = alternating(index, epoch, 9).tolist()
        expected = torch.stack([image.flip(-1) if m else image for image, m in zip(x, mirrored, strict=True)])
        assert torch.equal(augment(x, index, epoch, 9), expected)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="index"):
        augment(x)


def test_options_that_came_later_are_told_only_where_they_are_set():
    """Keys of cached bases are made of it."""
    told = "Augment(crop_pad=4, flip=True, cutout=0, padding='reflect', cutout_fill=0.5"
    assert repr(Augment(crop_pad=4, flip=True)) == told + ")"
    assert repr(Augment(crop_pad=4, flip=True, alternate=True, hue=0.1)) == told + ", alternate=True, hue=0.1)"


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
