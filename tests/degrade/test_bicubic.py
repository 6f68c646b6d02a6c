"""imresize against a slow float64 loop written from the definition, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from filtrun.degrade import bicubic
from filtrun.degrade.bicubic import cubic, imresize, modcrop, resize_matrix, resize_taps
from filtrun.errors import UserError


def kernel(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def slow(signal: list[float], up: int, down: int) -> list[float]:
    """One row, pixel by pixel: every input pixel within the kernel's reach, the border mirrored."""
    n, scale = len(signal), up / down
    shrink = min(scale, 1.0)
    out = []
    for k in range(math.ceil(n * up / down)):
        centre = (k + 0.5) / scale - 0.5  # in zero-based input pixels
        total = weight = 0.0
        for i in range(math.floor(centre - 2 / shrink) - 1, math.ceil(centre + 2 / shrink) + 2):
            w = kernel(shrink * (i - centre))
            j = i % (2 * n)
            total += w * signal[j if j < n else 2 * n - 1 - j]
            weight += w
        out.append(total / weight)
    return out


@pytest.mark.parametrize(("up", "down"), [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("length", [5, 12, 17])
def test_is_the_slow_reference(up: int, down: int, length: int) -> None:
    x = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    expected = torch.tensor(slow(x.tolist(), up, down), dtype=torch.float64)
    torch.testing.assert_close(resize_matrix(length, up, down) @ x, expected, rtol=0, atol=1e-13)


def test_images_are_resized_in_both_directions() -> None:
    x = torch.rand(2, 3, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[slow(c, 1, 3) for c in plane.T.tolist()] for plane in x.flatten(0, 1)]).mT
    both = torch.tensor([[slow(r, 1, 3) for r in plane.tolist()] for plane in rows]).view(2, 3, 3, 4)
    torch.testing.assert_close(imresize(x, 1, 3), both.double(), rtol=0, atol=1e-6)
    assert imresize(x, 2, 1).shape == (2, 3, 18, 24)
    assert imresize(x, 1, 1) is x


@pytest.mark.parametrize(("up", "down"), [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 3)])
def test_long_sides_are_summed_over_taps(up: int, down: int) -> None:
    """What is computed piece by piece, and with gradients in one go, is the product with the dense matrix."""
    x = torch.rand(2, 1, bicubic.SHORT + 75, bicubic.SHORT + 1, dtype=torch.float64)
    rows, columns = (resize_matrix(n, up, down) for n in x.shape[-2:])
    expected = rows @ x @ columns.mT
    torch.testing.assert_close(imresize(x, up, down), expected, rtol=0, atol=1e-14)
    weight = torch.rand_like(expected)
    x.requires_grad_(True)
    found = imresize(x, up, down)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-14)
    found.backward(weight)
    torch.testing.assert_close(x.grad, rows.mT @ weight @ columns, rtol=0, atol=1e-14)
    torch.testing.assert_close(imresize(x.detach().float(), up, down).double(), expected, rtol=0, atol=1e-6)


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 300, 270, dtype=torch.float64)
    for up, down in ((1, 3), (2, 1)):
        whole = imresize(x, up, down)
        for piece in (1, 1000, 1 << 30):
            monkeypatch.setattr(bicubic, "PIECE", piece)
            assert torch.equal(imresize(x, up, down), whole)


@pytest.mark.parametrize(("up", "down", "taps"), [(1, 2, 8), (1, 3, 14), (1, 4, 18), (2, 1, 4), (3, 1, 4), (4, 1, 4)])
def test_few_taps_for_long_sides(up: int, down: int, taps: int) -> None:
    place, weight = resize_taps(20000, up, down)
    assert place.shape == weight.shape and len(place) <= taps and place.shape[1] == -(-20000 * up // down)
    torch.testing.assert_close(weight.sum(0), torch.ones(place.shape[1], dtype=torch.float64))


def test_a_long_strip_needs_little_memory() -> None:
    """A dense matrix for one direction alone would be 60000 x 20000 x 8 bytes, 9.6 GB."""
    from filtrun.cost import peak_memory

    x = torch.rand(1, 1, 20000, 50)
    before = peak_memory(x.device)
    assert imresize(x, 3, 1).shape == (1, 1, 60000, 150)
    assert before is None or peak_memory(x.device) - before < 300e6


def test_autocast_does_not_touch_it() -> None:
    x = torch.rand(1, 3, 60, 300)
    exact = imresize(x, 1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = imresize(x, 1, 3)
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_kernel_values() -> None:
    found = cubic(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64))
    assert found.tolist() == [1.0, 0.5625, 0.0, -0.0625, 0.0, 0.0]


def test_known_weights_of_doubling() -> None:
    # a = -0.5 at distances 1.75, 0.75, 0.25, 1.25; with torch's -0.75 the first would be -0.03516
    matrix = resize_matrix(10, 2, 1)
    expected = torch.tensor([-0.0234375, 0.2265625, 0.8671875, -0.0703125], dtype=torch.float64)
    torch.testing.assert_close(matrix[10][3:7], expected)
    assert matrix[10].count_nonzero() == 4


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_constant_stays_and_a_ramp_stays_inside(scale: int) -> None:
    flat = torch.full((1, 1, 24, 24), 0.3, dtype=torch.float64)
    torch.testing.assert_close(imresize(flat, 1, scale), flat[..., : 24 // scale, : 24 // scale])
    ramp = torch.arange(96, dtype=torch.float64)
    small = resize_matrix(96, 1, scale) @ ramp
    centres = (torch.arange(96 // scale, dtype=torch.float64) + 0.5) * scale - 0.5
    torch.testing.assert_close(small[3:-3], centres[3:-3])  # linear signals are kept away from the border


def test_shrinking_without_antialiasing_is_another_problem() -> None:
    comb = torch.tensor([0.0, 0.0, 1.0] * 8, dtype=torch.float64).repeat(3, 1)
    smooth, sharp = imresize(comb, 1, 3)[0, 2:-2], imresize(comb, 1, 3, antialias=False)[0, 2:-2]
    assert (smooth - 1 / 3).abs().max() < 0.05 and sharp.abs().max() < 1e-12


@pytest.mark.parametrize("length", [510, 511, 512, 321])
def test_size_is_exact(length: int) -> None:
    assert resize_matrix(length, 1, 3).shape == (-(-length // 3), length)


def test_modcrop() -> None:
    x = torch.arange(35.0).view(1, 1, 5, 7)
    assert torch.equal(modcrop(x, 3), x[..., :3, :6])
    with pytest.raises(UserError, match="5x7 pixels is smaller than scale=6"):
        modcrop(x, 6)
    with pytest.raises(UserError, match="imresize by 0/2"):
        imresize(x, 0, 2)
