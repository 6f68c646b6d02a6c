"""Batched colour jitter against torchvision's functions image by image, and its distribution against ColorJitter."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import ks_2samp

from filtrun.compat import torchvision
from filtrun.data.augment import Augment
from filtrun.data.colour import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, jitter
from filtrun.errors import UserError

torchvision()
from torchvision.transforms.v2 import ColorJitter  # noqa: E402
from torchvision.transforms.v2 import functional as per_image  # noqa: E402


@pytest.fixture
def images():
    torch.manual_seed(0)
    x = torch.rand(60, 3, 7, 5)
    x[0], x[1], x[2, 1:] = 0.5, x[1, :1], 0.0  # no colour, grey with structure, pure red
    x[3:6] = (x[3:6] * 4).round() / 4  # ties between channels
    return x


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, per_image.adjust_brightness, 0.0, 2.0),
        (adjust_contrast, per_image.adjust_contrast, 0.0, 2.0),
        (adjust_saturation, per_image.adjust_saturation, 0.0, 2.0),
        (adjust_hue, per_image.adjust_hue, -0.5, 0.5),
    ],
)
def test_each_image_gets_what_torchvision_makes_of_it(images, ours, theirs, low, high):
    before = images.clone()
    factors = torch.linspace(low, high, len(images))[torch.randperm(len(images))]
    slow = torch.stack([theirs(image, factor.item()) for image, factor in zip(images, factors, strict=True)])
    assert torch.allclose(ours(images, factors), slow, atol=2e-6)
    assert torch.equal(images, before)


def test_grey_images_change_in_brightness_and_contrast():
    x = torch.rand(9, 1, 4, 4)
    factors = torch.linspace(0.2, 1.8, 9)
    slow = torch.stack([per_image.adjust_contrast(image, f.item()) for image, f in zip(x, factors, strict=True)])
    assert torch.allclose(adjust_contrast(x, factors), slow, atol=1e-6)
    assert jitter(x, 0.4, 0.4, 0, 0).shape == x.shape
    with pytest.raises(UserError, match=r"augment.hue=0.1 needs RGB images; these have 1 channel"):
        jitter(x, 0.4, 0, 0, 0.1)


def statistics(x):
    """What colours are made of, per image: mean, spread, spread between channels, and mean of red minus blue."""
    channels = x.mean((2, 3))
    return {
        "mean": x.mean((1, 2, 3)),
        "spread": x.std((1, 2, 3)),
        "saturation": channels.std(1),
        "red - blue": channels[:, 0] - channels[:, 2],
    }


OPTIONS = [(0.4, 0.4, 0.4, 0.1), (1.5, 0, 0, 0), (0, 0.8, 0, 0), (0, 0, 0.9, 0), (0, 0, 0, 0.5)]


@pytest.mark.parametrize("options", OPTIONS)
def test_colours_are_distributed_as_torchvision_s(options):
    torch.manual_seed(1)
    base = torch.rand(3, 1, 1) * 0.5 + 0.25 + 0.2 * torch.rand(3, 4, 4)
    count = 3000
    theirs = ColorJitter(*(v or None for v in options))
    slow = torch.stack([theirs(base) for _ in range(count)])
    # the order of the four is a batch's, so many batches
    fast = torch.cat([jitter(base.expand(20, 3, 4, 4), *options) for _ in range(count // 20)])
    for name, values in statistics(fast).items():
        p = ks_2samp(values.numpy(), statistics(slow)[name].numpy()).pvalue
        assert p > 1e-3, (name, p)


def test_draws_repeat_with_the_generator_and_differ_between_images():
    x = torch.rand(1, 3, 6, 6).expand(200, 3, 6, 6)
    augment = Augment(brightness=0.4, hue=0.1)
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(augment(x))
    assert torch.equal(*made)
    assert len(torch.unique(made[0].flatten(1), dim=0)) == 200  # blocks of the work do not share draws either
    assert made[0].min() >= 0 and made[0].max() <= 1
