"""Photographs through models without a run: what channels, sizes and memory they get."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from filtrun.degrade.bicubic import imresize
from filtrun.errors import UserError
from filtrun.photo import restore
from filtrun.photo.read import Photo
from filtrun.photo.restore import as_input, as_output, restored
from filtrun.tasks.denoise import Denoise
from filtrun.tasks.inpaint import Inpaint
from filtrun.tasks.superres import SuperRes


class Recording(nn.Module):
    """Calls a function of the image (and the mask) and keeps the shapes it saw."""

    def __init__(self, function):
        super().__init__()
        self.function, self.shapes = function, []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.function(x)


def run_of(task, function, channels=3):
    model = function if isinstance(function, nn.Module) else Recording(function)
    return SimpleNamespace(
        task=task, data=SimpleNamespace(channels=channels), model=model, net=model, device=torch.device("cpu")
    )


def test_channels():
    grey, colour = torch.rand(2, 1, 5, 7), torch.rand(2, 3, 5, 7)
    run = run_of(Denoise(), lambda x: x / 2, channels=3)
    assert torch.allclose(restored(run, grey), grey / 2) and run.model.shapes == [(2, 3, 5, 7)]
    run = run_of(Denoise(), lambda x: x / 2, channels=1)
    assert torch.equal(restored(run, colour), colour / 2) and run.model.shapes == [(6, 1, 5, 7)]
    tint = run_of(Denoise(), lambda x: x * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1))
    assert torch.allclose(restored(tint, grey), grey * (0.299 + 0.587 / 2))  # BT.601
    luma = run_of(SuperRes(scale=2, luma=True), lambda x: imresize(x, 2, 1))
    assert restored(luma, grey).shape == (2, 1, 10, 14) and luma.model.shapes == [(2, 1, 5, 7)]
    assert torch.allclose(restored(luma, colour), imresize(colour, 2, 1).clamp(0, 1), atol=1e-5)


def test_holes_only_change_where_the_mask_is():
    class Fill(nn.Module):
        def forward(self, x, mask):
            return torch.full_like(x, 0.25)

    x, mask = torch.rand(1, 3, 6, 8), torch.zeros(1, 1, 6, 8)
    mask[..., 2:4, 3:5] = 1
    for channels in (3, 1):
        out = restored(run_of(Inpaint(), Fill(), channels), x, mask)
        assert torch.equal(out, torch.where(mask.bool(), torch.tensor(0.25), x))


def test_one_pixel_goes_through_a_network_that_mirrors():
    net = nn.Conv2d(3, 3, 9, padding=4, padding_mode="reflect")
    x = torch.rand(1, 3, 1, 1)
    out = restored(run_of(Denoise(), net), x)
    expected = net(x.expand(-1, -1, 64, 64))[..., :1, :1].clamp(0, 1)
    assert out.shape == (1, 3, 1, 1) and torch.allclose(out, expected, atol=1e-6)


def test_large_images_are_the_same_in_tiles_and_whole():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).requires_grad_(False)
    x = torch.rand(1, 3, 150, 1200)
    whole, cut = Denoise(), Denoise(tile_above=1000, tile=128, overlap=32)
    seen = Recording(net)
    assert torch.allclose(restored(run_of(whole, net), x), restored(run_of(cut, seen), x), atol=1e-6)
    assert len(seen.shapes) > 10 and max(shape[3] for shape in seen.shapes) == 128
    grow = Recording(lambda x: imresize(net(x), 2, 1))
    task = SuperRes(scale=2, tile=256)
    expected = imresize(net(x), 2, 1).clamp(0, 1)
    assert torch.allclose(restored(run_of(task, grow), x), expected, atol=1e-6)
    assert max(shape[3] for shape in grow.shapes) == 256  # a side above 1024


def test_a_strip_of_20000_by_50():
    x = torch.rand(1, 3, 50, 20000)
    assert torch.equal(restored(run_of(Denoise(), lambda x: x), x), x)
    out = restored(run_of(SuperRes(scale=2), lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)), x)
    assert torch.allclose(out, x.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-6)


def test_little_memory_means_tiles():
    def hungry(x):
        if x.shape[-1] > 600:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return x

    task, x = Denoise(), torch.rand(1, 3, 60, 900)
    assert torch.allclose(restored(run_of(task, hungry), x), x, atol=1e-6) and task.tile_above == 4_000_000
    whole = run_of(task, hungry)
    whole.model.tileable = False
    with pytest.raises(UserError, match="not enough memory"):
        restored(whole, x)

    def never(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(UserError, match="not even in tiles"):
        restored(run_of(task, never), x)


def test_what_is_not_finite_and_other_failures():
    with pytest.raises(UserError, match="not finite"):
        restored(run_of(Denoise(), lambda x: x / 0 * 0), torch.rand(1, 3, 4, 4))
    with pytest.raises(RuntimeError):
        restored(run_of(Denoise(), nn.Conv2d(5, 3, 1)), torch.rand(1, 3, 99, 99))


def test_whole_numbers_become_shares_of_white(cat):
    for pixels, peak in ((cat, 255), (cat.astype(np.uint16) * 257 + 5, 65535)):
        x, scale = as_input(Photo(Path("a"), pixels), display=False)
        expected = torch.from_numpy(pixels.astype(np.float32) / np.float32(peak)).permute(2, 0, 1)[None]
        assert scale == 1 and x.is_contiguous() and torch.equal(x, expected)


def test_linear_light_is_scaled_by_its_peak():
    photo = Photo(Path("a.exr"), np.array([[[8.0], [-1.0], [0.5]]], np.float32))
    x, scale = as_input(photo, display=False)
    assert scale == 8 and x.flatten().tolist() == [1, 0, 0.0625]
    pixels, _ = as_output(photo, x[0], scale, np.dtype(np.float32), display=False)
    assert pixels.flatten().tolist() == [8, 0, 0.5]
    coded, _ = as_output(photo, x[0], scale, np.dtype(np.uint8), display=False)
    assert coded.flatten().tolist() == [255, 0, 188]  # sRGB of 1/2
    x, scale = as_input(photo, display=True)
    assert scale == 1 and x.flatten().tolist() == [8, -1, 0.5]
    shown, _ = as_output(photo, torch.tensor([[[1.0, 0.0, 0.5]]]), 1.0, np.dtype(np.uint16), display=True)
    assert shown.flatten().tolist() == [65535, 0, 32768]


def test_alpha_stays_or_grows_with_the_image(cat):
    photo = Photo(Path("a"), cat, cat[..., 1:2])
    same, alpha = as_output(photo, as_input(photo, display=False)[0][0], 1.0, np.dtype(np.uint8), display=False)
    assert np.array_equal(same, cat) and alpha is photo.alpha
    _, deep = as_output(photo, torch.rand(3, 60, 80), 1.0, np.dtype(np.uint16), display=False)
    assert np.array_equal(deep, photo.alpha.astype(np.uint16) * 257)
    _, grown = as_output(photo, torch.rand(3, 120, 160), 1.0, np.dtype(np.uint8), display=False)
    expected = imresize(torch.from_numpy(photo.alpha[..., 0] / 255), 2, 1).clamp(0, 1) * 255
    assert np.abs(grown[..., 0] - expected.numpy()).max() <= 0.51
    long = torch.rand(1, 1, 20, 1500)
    assert torch.allclose(restore._enlarged(lambda p: imresize(p, 3, 1), long, 3), imresize(long, 3, 1), atol=1e-5)
