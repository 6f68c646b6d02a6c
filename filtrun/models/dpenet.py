"""DPENet: From heavy rain removal to detail restoration: A faster and better network (Pattern Recognition 2024).

arXiv 2205.03553; official code chdwyb/DPENet (``NetModel.py``, ``loss.py``). A first network of dilated dense residual
blocks takes the streaks away, a second one of pixel-attention blocks brings detail back; both outputs are supervised
with SSIM and an edge loss. Layers carry the official names, so the released weights load.

Where this differs from the official code, on purpose: there a ReLU follows both 1x1 output convolutions, so neither
stage can make a pixel darker than its input, and rain is brighter than what it hides. The released weights give the
input's PSNR with those ReLUs and about 2 to 3 dB more without them, so the default is without
(``out_act=relu`` gives theirs). The official edge loss reads a constant that is never set; here it is 1e-3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.constants import constant
from filtrun.errors import UserError, unknown

DILATIONS = (1, 2, 5)
EDGE_WEIGHT = 0.05
EDGE_EPS = 1e-3


def _conv(inputs: int, outputs: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)


class DDRB(nn.Module):
    """Dilated dense residual block (N, C, H, W) -> same: pairs of 3x3 convolutions at dilations 1, 2 and 5, each pair
    applied to the rectified sum of the input and all pairs before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dconv1, self.dconv2, self.dconv5 = (
            nn.Sequential(_conv(channels, channels, d), nn.ReLU(), _conv(channels, channels, d)) for d in DILATIONS
        )

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.dconv1(x)  # the first pair sees the input as it is
        for pair in (self.dconv2, self.dconv5):
            total = total + pair(F.relu(total))
        return F.relu(total)


class ERPAB(nn.Module):
    """Enhanced residual pixel-wise attention block (N, C, H, W) -> same.

    Three parallel convolutions at dilations 1, 2 and 5 are fused to C channels; a gate in (0, 1) for every pixel and
    channel, made through a bottleneck of C / `reduction` channels, scales them before they are added to the input.
    """

    def __init__(self, channels: int, reduction: int = 32) -> None:
        super().__init__()
        self.inconv1, self.inconv2, self.inconv3 = (_conv(channels, channels, d) for d in DILATIONS)
        self.outconv = nn.Sequential(nn.Conv2d(3 * channels, channels, 1), nn.ReLU())
        narrow = max(1, channels // reduction)
        self.pa = nn.Sequential(_conv(channels, narrow), nn.ReLU(), _conv(narrow, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        fused = self.outconv(torch.cat([self.inconv1(x), self.inconv2(x), self.inconv3(x)], dim=1))
        return F.relu(x + fused * self.pa(fused))


class DPENet(nn.Module):
    """Deraining network for images of any size; 647,328 parameters, 42.4 billion multiply-adds at 256 x 256.

    Args:
        in_channels: image channels C.
        width: feature channels (paper: 32).
        streak_blocks: DDRBs of the first network; null: 10, or 5 for the light one.
        detail_blocks: ERPABs of the second network.
        light: the paper's LightDPENet.
        out_act: none | relu: what follows the two 1x1 output convolutions; relu is the official behaviour, which can
            only brighten.

    Raises:
        UserError: a value outside what is said above.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 32,
        streak_blocks: int | None = None,
        detail_blocks: int = 3,
        light: bool = False,
        out_act: str = "none",
    ) -> None:
        super().__init__()
        if out_act not in ("none", "relu"):
            raise unknown("model.out_act", out_act, ("none", "relu"))
        count = streak_blocks if streak_blocks is not None else 5 if light else 10
        for key, value in (("width", width), ("streak_blocks", count), ("detail_blocks", detail_blocks)):
            if value < 1:
                raise UserError(f"model.{key}={value} is out of range; allowed is [1, inf]")
        self.in_channels, self.out_act = in_channels, out_act
        self.streak_names = [f"ddrb{i + 1}" for i in range(count)]
        self.detail_names = [f"erpab{i + 1}" for i in range(detail_blocks)]

        def point(inputs: int, outputs: int, act: bool) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            return nn.Sequential(conv, nn.ReLU() if act else nn.Identity())

        for stage in ("1", "2"):
            self.add_module(f"inconv{stage}", point(in_channels, width, True))
            self.add_module(f"outconv{stage}", point(width, in_channels, out_act == "relu"))
        for name in self.streak_names:
            self.add_module(name, DDRB(width))
        for name in self.detail_names:
            self.add_module(name, ERPAB(width))

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs for x (N, C, H, W) in [0, 1]: (without streaks, with detail restored), each (N, C, H, W)."""
        mid = x + self._body(x, "1", self.streak_names)
        return mid, mid + self._body(F.relu(mid), "2", self.detail_names)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The restored image; while training the tuple of `stages`, because the loss needs both."""
        mid, out = self.stages(x)
        return (mid, out) if self.training else out

    def extra_losses(self, output: Any, target: Tensor, batch: Any) -> dict[str, Tensor]:
        """Terms of the paper's loss: ``1 - SSIM`` of each stage, and the sum of their edge losses (weight 0.05)."""
        mid, out = (t.float() for t in output)
        return {
            "ssim_mid": 1 - ssim_zero_padded(mid, target),
            "ssim_out": 1 - ssim_zero_padded(out, target),
            "edge": edge_loss(mid, target) + edge_loss(out, target),
        }

    def _body(self, x: Tensor, stage: str, names: list[str]) -> Tensor:
        h: Tensor = self.get_submodule(f"inconv{stage}")(x)
        for name in names:
            h = self.get_submodule(name)(h)
        result: Tensor = self.get_submodule(f"outconv{stage}")(h)
        return result


# -- the loss --------------------------------------------------------------------------------------------------------
def ssim_zero_padded(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of images (N, C, H, W) in [0, 1], the Gaussian window reaching over zeros outside.

    A scalar, 1 for equal images. Border pixels make it differ from the SSIM that evaluations report.
    """
    channels = a.shape[1]
    at = torch.arange(window, device=a.device, dtype=a.dtype) - window // 2
    line = torch.exp(-(at**2) / (2 * sigma**2))
    line = line / line.sum()
    weight = torch.outer(line, line).expand(channels, 1, window, window)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=window // 2, groups=channels)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()


def laplacian(x: Tensor) -> Tensor:
    """What a blurred, halved and doubled copy of x (N, C, H, W) leaves out: the edges, of the same shape."""
    channels = x.shape[1]
    line = constant((0.05, 0.25, 0.4, 0.25, 0.05), x.dtype, x.device)
    weight = torch.outer(line, line).expand(channels, 1, 5, 5)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), weight, groups=channels)

    kept = torch.zeros_like(x)
    kept[..., ::2, ::2] = 4 * blur(x)[..., ::2, ::2]
    return x - blur(kept)


def edge_loss(a: Tensor, b: Tensor, eps: float = EDGE_EPS) -> Tensor:
    """Mean Charbonnier distance ``sqrt(d^2 + eps^2)`` of the Laplacians of two images; `eps` for equal ones."""
    return torch.sqrt((laplacian(a) - laplacian(b)) ** 2 + eps**2).mean()


def dpenet_loss(mid: Tensor, out: Tensor, target: Tensor, edge_weight: float = EDGE_WEIGHT) -> Tensor:
    """``1 - [SSIM(mid) + SSIM(out)] + edge_weight [E(mid) + E(out)]``, a scalar; near -1 for perfect outputs."""
    similar = ssim_zero_padded(mid, target) + ssim_zero_padded(out, target)
    return 1 - similar + edge_weight * (edge_loss(mid, target) + edge_loss(out, target))
