"""Image quality against a reference, as papers report it: PSNR, SSIM, MS-SSIM, L1, colour difference, LPIPS.

Everything takes images (N, C, H, W) in [0, 1] and gives one float64 value per image (N,): papers average per-image
values, which differs from the value of the pooled error. Computed in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from filtrun.constants import constant
from filtrun.errors import UserError
from filtrun.precision import full_precision

PSNR_LIMIT = 100.0
"""dB given to identical images, whose PSNR is infinite."""

SSIM_WINDOW = 11
"""Side of the window of SSIM in pixels."""
STUDIO = (65.481, 128.553, 24.966)
MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def luma(x: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of RGB (N, 3, H, W) in [0, 1], studio range: black is 16 / 255, white 235 / 255.

    ITU-R BT.601, as MATLAB's ``rgb2ycbcr``; grey images (N, 1, H, W) count as RGB with equal channels. The full-range
    luma of JPEG lowers a PSNR by 20 log10(255 / 219) = 1.32 dB.
    """
    if x.shape[1] == 1:
        return (16 + sum(STUDIO) * x) / 255
    weights = constant(STUDIO, x.dtype, x.device).view(1, 3, 1, 1)
    return (16 + (x * weights).sum(1, keepdim=True)) / 255


def full_range(y: Tensor) -> Tensor:
    """Studio-range luma (see `luma`) stretched: black is 0, white 1."""
    return (255 * y - 16) / sum(STUDIO)


@full_precision
def ycbcr(x: Tensor) -> Tensor:
    """RGB (N, 3, H, W) in [0, 1] -> studio-range YCbCr / 255 (BT.601)."""
    return torch.einsum("dc,nchw->ndhw", _matrix(x), x) + _offset(x)


@full_precision
def from_ycbcr(x: Tensor) -> Tensor:
    """Inverse of `ycbcr`, not clipped."""
    return torch.einsum("dc,nchw->ndhw", torch.linalg.inv(_matrix(x).double()).to(x.dtype), x - _offset(x))


def _matrix(x: Tensor) -> Tensor:
    return constant((STUDIO, (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214)), x.dtype, x.device) / 255


def _offset(x: Tensor) -> Tensor:
    return constant((16.0, 128.0, 128.0), x.dtype, x.device).view(1, 3, 1, 1) / 255


def round8(x: Tensor) -> Tensor:
    """Values clipped to [0, 1] and rounded to 8 bits, as a stored image has them; half goes up, as in MATLAB."""
    return (x.clamp(0, 1) * 255 + 0.5).floor() / 255


def crop_border(x: Tensor, border: int) -> Tensor:
    """(N, C, H, W) without `border` pixels at each side."""
    if not border:
        return x
    if min(x.shape[-2:]) <= 2 * border:
        raise UserError(f"a border of {border} pixels leaves nothing of an image of {x.shape[-2]}x{x.shape[-1]}")
    return x[..., border:-border, border:-border]


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape:
        raise ValueError(f"images of {tuple(x.shape)} and {tuple(y.shape)} cannot be compared")
    return x.double(), y.double()


def mae(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference (N,)."""
    x, y = _pair(x, y)
    return (x - y).abs().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB (N,), at most `PSNR_LIMIT`."""
    x, y = _pair(x, y)
    mse = (x - y).square().flatten(1).mean(1)
    return (10 * torch.log10(peak**2 / mse)).clamp(max=PSNR_LIMIT)


@functools.lru_cache(maxsize=32)
def _window(size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    t = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    g = torch.exp(-t.square() / (2 * sigma**2))
    return (g / g.sum()).to(device, dtype)


@full_precision
def ssim_maps(
    x: Tensor, y: Tensor, peak: float = 1.0, size: int = SSIM_WINDOW, sigma: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Local SSIM, and its contrast-structure part, each (N, C, H - size + 1, W - size + 1); differentiable.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, eq. 13, with its
    Gaussian window and K = (0.01, 0.03), only where the window fits.
    """
    if min(x.shape[-2:]) < size:
        raise UserError(f"SSIM needs images of at least {size} pixels a side; this one has {x.shape[-2]}x{x.shape[-1]}")
    n, c = x.shape[:2]
    stacked = torch.cat([x, y, x * x, y * y, x * y]).reshape(5 * n * c, 1, *x.shape[-2:])
    g = _window(size, sigma, x.dtype, x.device)
    blurred = F.conv2d(F.conv2d(stacked, g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = blurred.view(5, n, c, *blurred.shape[-2:])
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (2 * mx * my + c1) / (mx * mx + my * my + c1) * structure, structure


def ssim(x: Tensor, y: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity (N,), mean over pixels and channels: 11x11 Gaussian window of sigma 1.5."""
    return ssim_maps(*_pair(x, y), peak)[0].flatten(1).mean(1)


def ms_ssim(x: Tensor, y: Tensor, peak: float = 1.0) -> Tensor:
    """Multi-scale SSIM (N,) over five scales, each half the size of the one before.

    Wang, Simoncelli, Bovik, "Multiscale Structural Similarity for Image Quality Assessment", 2003, eq. 7 and section 4.

    Raises:
        UserError: a side below 161 pixels, which the window does not fit at the last scale.
    """
    if min(x.shape[-2:]) < 161:
        raise UserError(f"MS-SSIM needs at least 161 pixels a side; this image has {x.shape[-2]}x{x.shape[-1]}")
    x, y = _pair(x, y)
    parts = []
    for i, weight in enumerate(MS_WEIGHTS):
        whole, structure = ssim_maps(x, y, peak)
        last = i + 1 == len(MS_WEIGHTS)
        parts.append((whole if last else structure).mean((-2, -1)).clamp(min=0) ** weight)
        if not last:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return torch.stack(parts).prod(0).mean(1)


def lab(x: Tensor) -> Tensor:
    """sRGB (N, 3, H, W) in [0, 1] -> CIELAB (N, 3, H, W), white point D65 / 2 degrees."""
    x = x.double().clamp(0, 1)
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    rows = (0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227)
    xyz = torch.einsum("dc,nchw->ndhw", constant(rows, x.dtype, x.device), linear)
    xyz = xyz / constant((0.95047, 1.0, 1.08883), x.dtype, x.device).view(1, 3, 1, 1)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-12) ** (1 / 3), 7.787 * xyz + 16 / 116)
    fx, fy, fz = f.unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], 1)


def delta_e76(x: Tensor, y: Tensor) -> Tensor:
    """Mean CIE 1976 colour difference (N,): Euclidean distance in CIELAB, as the LUT papers report it."""
    return (lab(x) - lab(y)).square().sum(1).sqrt().flatten(1).mean(1)


def delta_e2000(x: Tensor, y: Tensor) -> Tensor:
    """Mean CIEDE2000 colour difference (N,). Sharma, Wu, Dalal, 2005, eq. 2 to 22."""
    (l1, a1, b1), (l2, a2, b2) = lab(x).unbind(1), lab(y).unbind(1)
    c_mean = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    g = 0.5 * (1 - (c_mean**7 / (c_mean**7 + 25.0**7)).sqrt())
    a1, a2 = a1 * (1 + g), a2 * (1 + g)
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    turn = 2 * torch.pi
    h1, h2 = torch.atan2(b1, a1) % turn, torch.atan2(b2, a2) % turn
    grey = c1 * c2 == 0
    dh = h2 - h1
    dh = torch.where(dh > torch.pi, dh - turn, torch.where(dh < -torch.pi, dh + turn, dh))
    dh = torch.where(grey, torch.zeros_like(dh), dh)
    total = h1 + h2
    apart = (h1 - h2).abs() > torch.pi
    h_mean = torch.where(apart, torch.where(total < turn, total + turn, total - turn), total) / 2
    h_mean = torch.where(grey, total, h_mean)
    c_mean, l_mean = (c1 + c2) / 2, (l1 + l2) / 2
    degree = torch.pi / 180
    t = (
        1 - 0.17 * torch.cos(h_mean - 30 * degree) + 0.24 * torch.cos(2 * h_mean)
        + 0.32 * torch.cos(3 * h_mean + 6 * degree) - 0.20 * torch.cos(4 * h_mean - 63 * degree)
    )  # fmt: skip
    off = (l_mean - 50) ** 2
    dl = (l2 - l1) / (1 + 0.015 * off / (20 + off).sqrt())
    dc = (c2 - c1) / (1 + 0.045 * c_mean)
    dh_scaled = 2 * (c1 * c2).sqrt() * torch.sin(dh / 2) / (1 + 0.015 * c_mean * t)
    turned = 60 * degree * torch.exp(-(((h_mean / degree - 275) / 25) ** 2))
    rotation = -2 * (c_mean**7 / (c_mean**7 + 25.0**7)).sqrt() * torch.sin(turned)
    squared = dl**2 + dc**2 + dh_scaled**2 + rotation * dc * dh_scaled
    return squared.clamp(min=0).sqrt().flatten(1).mean(1)


def cached_weights(name: str) -> Path | None:
    """A weights file of torch's hub cache whose name starts with `name` (``alexnet-``), if it is on this machine."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next(iter(sorted(folder.glob(f"{name}*.pth"))), None)


@functools.lru_cache(maxsize=4)
def lpips_metric(device: str = "cpu") -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS v0.1 on AlexNet (Zhang et al., CVPR 2018), or None where its weights are not on this machine.

    Needs the lpips package and torchvision's AlexNet weights in torch's hub cache; nothing is downloaded.
    """
    if cached_weights("alexnet-") is None:
        return None
    try:
        from filtrun.compat import torchvision

        torchvision()
        import lpips
    except ImportError:
        return None
    net = lpips.LPIPS(net="alex", verbose=False).to(device).eval().requires_grad_(False)

    def measure(x: Tensor, y: Tensor) -> Tensor:
        x, y = (t.float().expand(-1, 3, -1, -1) if t.shape[1] == 1 else t.float() for t in (x, y))
        return net(2 * x - 1, 2 * y - 1).flatten().double()

    return measure
