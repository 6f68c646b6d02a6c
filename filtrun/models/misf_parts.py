"""Parts of MISF: filtering with a kernel of its own for every pixel, the network that predicts those kernels, and the
patch discriminator it is trained against.

Li, Guo, Lin, Li, Feng, Wang, "MISF: Multi-level Interactive Siamese Filtering for High-Fidelity Image Inpainting", CVPR
2022 (arXiv 2203.06304); official code tsingqguo/misf (``kpn/network.py``, ``src/networks.py``). Modules carry the names
that code gives them, so its weights load by name.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def pixelwise_filter(x: Tensor, kernels: Tensor, size: int = 3) -> Tensor:
    """Filter every pixel of every channel with its own kernel: ``y[c, p] = sum_t K[c, t, p] x[c, p + t]`` (eq. 3).

    Args:
        x: (N, C, H, W); zeros are assumed outside.
        kernels: (N, C * size * size, H, W), channel by channel, the taps of each in row-major order; not normalised.
        size: odd side of the kernels.

    Returns:
        (N, C, H, W). No copy of `x` is made for each tap, so that large feature maps fit.
    """
    n, c, h, w = x.shape
    taps = kernels.reshape(n, c, size * size, h, w)
    padded = F.pad(x, (size // 2,) * 4)
    y = torch.zeros_like(x)
    for tap in range(size * size):
        i, j = divmod(tap, size)
        y = torch.addcmul(y, taps[:, :, tap], padded[..., i : i + h, j : j + w])
    return y


def expand_kernels(kernels: Tensor, groups: int, repeat: int, how: str = "official") -> Tensor:
    """Kernels for ``groups * repeat`` channels from the predicted ones of `groups` channels.

    Args:
        kernels: (N, groups * T, H, W) with T taps for each.
        how: ``official``: the whole channel axis is stretched, so channel j of the result is channel j // repeat of the
            prediction and neighbouring *taps* of a kernel repeat (a 3x3 kernel has three different values for repeat
            4): what the released weights were trained with. ``grouped``: `repeat` neighbouring channels share one whole
            predicted kernel.

    Returns:
        (N, groups * repeat * T, H, W).
    """
    if how == "official":
        return kernels.repeat_interleave(repeat, dim=1)
    n, total, h, w = kernels.shape
    return kernels.reshape(n, groups, total // groups, h, w).repeat_interleave(repeat, dim=1).reshape(n, -1, h, w)


def composite(output: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The output inside the hole, the image outside it, exactly: `mask` (N, 1, H, W) is 1 in the hole."""
    return mask * output + (1 - mask) * image


class TripleConv(nn.Module):
    """Three 3x3 convolutions, each followed by ReLU; no normalisation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1), nn.ReLU()]
        self.conv1 = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv1(x))


class KernelPredictor(nn.Module):
    """U-Net that looks at the masked image and the encoder's features and predicts kernels for both levels.

    Args:
        inputs: channels of masked image and mask together.
        outputs: channels of the image to be filtered.
        width: channels w at full resolution; the encoder's feature, concatenated at half, has 2 w.
        size: side of the kernels.
        semantic, image: which kernels are wanted; layers that only the others need are left out.
        unused_layer: also hold the convolution that the official code defines and never calls.

    ``forward(z, feature)`` maps z (N, inputs, H, W) and feature (N, 2w, H/2, W/2) to the kernels of the deep feature
    map (N, w * size^2, H/4, W/4) and of the image (N, outputs * size^2, H, W), or None; H, W are multiples of 4.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        size: int = 3,
        semantic: bool = True,
        image: bool = True,
        unused_layer: bool = False,
    ) -> None:
        super().__init__()
        w = width
        self.semantic, self.image = semantic, image
        self.conv1 = TripleConv(inputs, w)
        self.conv2 = TripleConv(w, 2 * w)
        self.conv3 = TripleConv(4 * w, 4 * w)
        if semantic:
            self.kernels = nn.Conv2d(4 * w, w * size**2, 1)
        if image:
            self.conv4 = TripleConv(4 * w, 8 * w)
            self.conv7 = TripleConv(12 * w, 4 * w)
            self.conv8 = TripleConv(8 * w, 2 * w)
            self.conv9 = TripleConv(3 * w, w)
            self.core_img = nn.Conv2d(w, outputs * size**2, 1)
        if unused_layer:
            self.conv_final = nn.Conv2d(4 * outputs, outputs, 3, padding=1)

    def forward(self, z: Tensor, feature: Tensor) -> tuple[Tensor | None, Tensor | None]:
        full = self.conv1(z)
        half = torch.cat([self.conv2(F.avg_pool2d(full, 2)), feature], dim=1)  # the two branches meet here
        quarter = self.conv3(F.avg_pool2d(half, 2))
        semantic = self.kernels(quarter) if self.semantic else None
        if not self.image:
            return semantic, None
        up = self.conv7(torch.cat([quarter, self.conv4(quarter)], dim=1))
        up = self.conv8(torch.cat([half, F.interpolate(up, scale_factor=2, mode="bilinear")], dim=1))
        up = self.conv9(torch.cat([full, F.interpolate(up, scale_factor=2, mode="bilinear")], dim=1))
        return semantic, self.core_img(up)


class ResidualBlock(nn.Module):
    """``x + IN(conv(relu(IN(conv(x)))))`` with reflected borders; the first 3x3 convolution is dilated."""

    def __init__(self, channels: int, dilation: int = 2) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(dilation),
            nn.Conv2d(channels, channels, 3, dilation=dilation),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class PatchDiscriminator(nn.Module):
    """Says of every 70 x 70 patch whether it is real: five spectrally normalised 4x4 convolutions without biases.

    ``forward`` maps images (N, C, H, W), H and W from 24 on, to logits (N, 1, H', W'), H' = H // 8 - 2. 2,763,776
    parameters for RGB and width 64. Isola et al. 2017 (arXiv 1611.07004); Miyato et al. 2018 (arXiv 1802.05957).
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        sizes = [in_channels, width, 2 * width, 4 * width, 8 * width, 1]
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            conv = nn.Conv2d(inputs, outputs, 4, stride=2 if i < 3 else 1, padding=1, bias=False)
            nn.init.normal_(conv.weight, 0.0, 0.02)
            layers += [spectral_norm(conv), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))
