"""Image metrics against scikit-image and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from filtrun.errors import UserError
from filtrun.metrics import image as quality


def photo(name: str, side: int = 64) -> Tensor:
    import skimage.data

    pixels = getattr(skimage.data, name)()[100 : 100 + side, 60 : 60 + side]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].double() / 255


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    x = photo("astronaut")
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, (x + 0.06 * noise).clamp(0, 1)


def array(x: Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).numpy()


def test_psnr_closed_form_and_per_image() -> None:
    x = torch.zeros(2, 3, 8, 8)
    y = x.clone()
    y[0] += 0.1
    y[1] += 0.01
    torch.testing.assert_close(quality.psnr(x, y), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=0, atol=1e-5)
    assert quality.psnr(x, x).tolist() == [100.0, 100.0]
    assert quality.psnr(2 * x, 2 * y, peak=2.0)[0].item() == pytest.approx(20.0, abs=1e-5)
    assert quality.mae(x, y).tolist() == pytest.approx([0.1, 0.01])
    with pytest.raises(ValueError, match="cannot be compared"):
        quality.psnr(x, y[..., :4])


def test_psnr_is_that_of_skimage(pair: tuple[Tensor, Tensor]) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    x, y = pair
    assert quality.psnr(x, y).item() == pytest.approx(peak_signal_noise_ratio(array(x), array(y), data_range=1))


def test_ssim_is_that_of_skimage_with_gaussian_weights(pair: tuple[Tensor, Tensor]) -> None:
    from skimage.metrics import structural_similarity

    x, y = pair
    expected = structural_similarity(
        array(x), array(y), data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert quality.ssim(x, y).item() == pytest.approx(expected, abs=1e-9)
    assert quality.ssim(x, x).item() == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(UserError, match="at least 11 pixels a side; this one has 8x64"):
        quality.ssim(x[..., :8, :], y[..., :8, :])


def test_ms_ssim_from_its_definition() -> None:
    x = torch.rand(1, 1, 176, 180, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (x + 0.1 * torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    a, b, parts = x, y, []
    for scale in range(5):
        whole, structure = quality.ssim_maps(a, b)
        parts.append((whole if scale == 4 else structure).mean().item())
        a, b = (t.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) for t in (a, b))
    expected = math.prod(p**w for p, w in zip(parts, (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), strict=True))
    assert quality.ms_ssim(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert quality.ms_ssim(x, x).item() == pytest.approx(1.0)
    with pytest.raises(UserError, match="at least 161 pixels"):
        quality.ms_ssim(x[..., :160], y[..., :160])


def test_luma_is_studio_range() -> None:
    from skimage.color import rgb2ycbcr

    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).view(5, 3, 1, 1)
    found = quality.luma(colours).flatten() * 255
    torch.testing.assert_close(found, torch.tensor([235.0, 16.0, 81.481, 144.553, 40.966]), rtol=0, atol=1e-3)
    assert quality.luma(torch.ones(1, 1, 2, 2)).unique().item() * 255 == pytest.approx(235.0, abs=1e-4)
    x = photo("astronaut", 16)
    expected = torch.from_numpy(rgb2ycbcr(array(x)).transpose(2, 0, 1))[None] / 255
    torch.testing.assert_close(quality.ycbcr(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(quality.luma(x), expected[:, :1], rtol=0, atol=1e-9)
    torch.testing.assert_close(quality.from_ycbcr(quality.ycbcr(x)), x)


def test_full_range_luma_would_cost_1_32_db(pair: tuple[Tensor, Tensor]) -> None:
    grey, other = (t.mean(1, keepdim=True) for t in pair)
    gap = quality.psnr(quality.luma(grey), quality.luma(other)) - quality.psnr(grey, other)
    assert gap.item() == pytest.approx(20 * math.log10(255 / 219), abs=1e-9)


def test_colour_differences_are_those_of_skimage() -> None:
    from skimage.color import deltaE_cie76, deltaE_ciede2000, rgb2lab

    generator = torch.Generator().manual_seed(2)
    x, y = (torch.rand(1, 3, 40, 40, dtype=torch.float64, generator=generator) for _ in range(2))
    x[..., :5, :] = x[:, :1, :5]  # grey, where the hue has no meaning
    y[..., 2:6, :] = 0
    a, b = rgb2lab(array(x)), rgb2lab(array(y))
    torch.testing.assert_close(quality.lab(x)[0].permute(1, 2, 0), torch.from_numpy(a), rtol=0, atol=1e-4)
    assert quality.delta_e76(x, y).item() == pytest.approx(deltaE_cie76(a, b).mean(), abs=1e-4)
    assert quality.delta_e2000(x, y).item() == pytest.approx(deltaE_ciede2000(a, b).mean(), abs=1e-4)
    assert quality.delta_e2000(x, x).item() == 0 and quality.delta_e76(y, y).item() == 0


def test_rounding_and_borders() -> None:
    x = torch.tensor([-0.2, 0.5 / 255 + 1e-6, 0.49 / 255, 1.3]).view(1, 1, 2, 2)
    assert (quality.round8(x) * 255).flatten().tolist() == [0.0, 1.0, 0.0, 255.0]
    y = torch.arange(49.0).view(1, 1, 7, 7)
    assert torch.equal(quality.crop_border(y, 3), y[..., 3:4, 3:4])
    assert quality.crop_border(y, 0) is y
    with pytest.raises(UserError, match="a border of 4 pixels leaves nothing of an image of 7x7"):
        quality.crop_border(y, 4)


def test_lpips_is_none_without_weights(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    quality.lpips_metric.cache_clear()
    assert quality.lpips_metric("cpu") is None
    quality.lpips_metric.cache_clear()
