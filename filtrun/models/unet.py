"""Class-conditional U-Net denoiser, compact enough for 8x8 digits and deep enough for 64x64 photos.

The architecture is the usual one of diffusion models: Ho et al., "Denoising Diffusion Probabilistic Models",
NeurIPS 2020 (arXiv 2006.11239, appendix B) for the U-Net with self-attention, Dhariwal & Nichol, "Diffusion Models
Beat GANs on Image Synthesis", NeurIPS 2021 (arXiv 2105.05233, section 3) for scale and shift of the normalised
features by noise level and class, Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
NeurIPS 2022 (arXiv 2206.00364) for the continuous noise input and the zero-initialised output layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from filtrun.errors import UserError, unknown
from filtrun.models.layers import FourierEmbedding, PixelAttention, groups_for


@dataclass(frozen=True)
class Size:
    """One step of the ladder: base width by number of resolutions, and residual blocks at each resolution.

    `second` is the channel multiplier of the lower of two resolutions; more of them use 1, 2, 2, ...
    """

    widths: dict[int, int]
    blocks: int
    second: int = 3


# Widths are chosen so that a size has about the same number of parameters whatever the number of resolutions.
SIZES = {
    "nano": Size({2: 16, 3: 12, 4: 10}, 1, second=2),
    "tiny": Size({2: 16, 3: 18, 4: 14}, 1),
    "small": Size({2: 40, 3: 44, 4: 36}, 1),
    "base": Size({2: 80, 3: 88, 4: 72}, 2),
    "large": Size({2: 156, 3: 168, 4: 140}, 2),
}


def default_multipliers(image_size: int, size: str = "tiny") -> list[int]:
    """Channel multipliers by image side: two resolutions below 16 pixels, three below 64, four from there on."""
    return [1, SIZES[size].second] if image_size < 16 else [1, 2, 2] if image_size < 64 else [1, 2, 2, 2]


def resolutions_of(image_size: int, levels: int) -> list[int]:
    """Feature map sides, finest first, of an image padded to a multiple of 2^(levels - 1)."""
    padded = -(-image_size // 2 ** (levels - 1)) * 2 ** (levels - 1)
    return [padded // 2**level for level in range(levels)]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm; noise and class scale and shift the second norm's output.

    ``h = conv1(silu(norm1(x)))``, ``h = conv2(dropout(silu(norm2(h) (1 + scale) + shift)))``,
    ``y = (skip(x) + h) / sqrt(2)``, then self-attention if asked for. The division keeps the variance of a deep stack
    near that of its input.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, attention: bool):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups_for(inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.condition = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(groups_for(outputs), outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attn = PixelAttention(outputs) if attention else nn.Identity()

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        h = self.conv2(self.dropout(h))
        return self.attn((self.skip(x) + h) * 0.5**0.5)


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Denoising network ``forward(x, c_noise, y)`` for square images of side 8 or more.

    Args:
        in_channels: image channels, also those of the output.
        num_classes: number of classes K >= 0; the id K means "no class" (the null token of classifier-free guidance).
        image_size: side of the training images in pixels. It sets the number of resolutions and the feature maps that
            attend; other sizes, also not square ones, still pass through `forward`.
        size: nano | tiny | small | base | large: about 0.1, 0.2, 1.3, 10 and 35 million parameters.
        width: channels at the finest resolution; None takes the size's.
        multipliers: channels at each resolution as multiples of `width`, finest first; their count is the number of
            resolutions. None: [1, 3] below 16 pixels ([1, 2] for nano), [1, 2, 2] below 64, [1, 2, 2, 2] from there on.
        blocks: residual blocks at each resolution on either side; None takes the size's.
        attention: feature map sides, in pixels, at which blocks attend; None means the smallest only, [] means nowhere.
        dropout: probability in [0, 1) of dropping a feature between the convolutions of a block.

    Raises:
        UserError: for a value outside what is said above.
    """

    time_input = "c_noise"  # what the second argument of forward holds

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 8,
        size: str = "tiny",
        width: int | None = None,
        multipliers: list[int] | None = None,
        blocks: int | None = None,
        attention: list[int] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if size not in SIZES:
            raise unknown("model.size", size, SIZES)
        multipliers = list(default_multipliers(image_size, size) if multipliers is None else multipliers)
        step = _checked(image_size, size, width, multipliers, blocks, dropout)
        width = step.widths[min(max(len(multipliers), 2), 4)] if width is None else width
        blocks = step.blocks if blocks is None else blocks
        sides = resolutions_of(image_size, len(multipliers))
        attending = sides[-1:] if attention is None else list(attention)
        if extra := [side for side in attending if side not in sides]:
            raise UserError(f"model.attention={extra[0]} is no feature map side here; the sides are {sides}")

        self.in_channels, self.num_classes, self.image_size = in_channels, num_classes, image_size
        self.levels = len(multipliers)
        channels = [width * m for m in multipliers]
        embedding = 4 * width
        waves = max(2 * (width // 2), 32)
        self.fourier = FourierEmbedding(waves)
        self.noise = nn.Sequential(nn.Linear(waves, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.classes = nn.Embedding(num_classes + 1, embedding)

        def block(inputs: int, level: int) -> ResidualBlock:
            return ResidualBlock(inputs, channels[level], embedding, dropout, sides[level] in attending)

        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        now = width
        for level, wide in enumerate(channels):
            self.down.append(nn.ModuleList([block(now if i == 0 else wide, level) for i in range(blocks)]))
            now = wide
            if level < self.levels - 1:
                self.shrink.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
        self.middle = block(now, self.levels - 1)
        for level in reversed(range(self.levels)):
            wide = channels[level]
            if level < self.levels - 1:
                self.grow.append(Upsample(now, wide))
            # every block of the way down hands its output to one block of the way up
            self.up.append(nn.ModuleList([block(2 * wide, level) for _ in range(blocks)]))
            now = wide
        self.norm = nn.GroupNorm(groups_for(now), now)
        self.out = nn.Conv2d(now, in_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the network.

        Args:
            x: (N, C, H, W) float, noisy image scaled to about unit variance; H, W >= 1 of any value.
            c_noise: (N,) or scalar, noise level as ``ln(sigma) / 4``.
            y: (N,) int64 class ids in [0, K], K for no class; None means K for all.

        Returns:
            (N, C, H, W); exactly zero in a network that has not been trained.
        """
        n, _, height, width = x.shape
        y = torch.full((n,), self.num_classes, device=x.device) if y is None else y
        waves = self.fourier(c_noise.reshape(-1).expand(n)).to(x.dtype)
        embedding = F.silu(self.noise(waves) + self.classes(y))

        multiple = 2 ** (self.levels - 1)
        below, right = -height % multiple, -width % multiple
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        x = self.stem(x)
        handed: list[torch.Tensor] = []
        for level, stack in enumerate(self.down):
            for layer in stack:  # type: ignore[attr-defined]
                x = layer(x, embedding)
                handed.append(x)
            if level < self.levels - 1:
                x = self.shrink[level](x)
        x = self.middle(x, embedding)
        for level, stack in enumerate(self.up):
            if level:
                x = self.grow[level - 1](x)
            for layer in stack:  # type: ignore[attr-defined]
                x = layer(torch.cat([x, handed.pop()], dim=1), embedding)
        x = self.out(F.silu(self.norm(x)))
        return x[..., :height, :width]


def _checked(
    image_size: int, size: str, width: int | None, multipliers: list[int], blocks: int | None, dropout: float
) -> Size:
    """The named step of the ladder, once every other value is known to be allowed."""
    if image_size < 8:
        raise UserError(f"model=unet needs images of 8x8 pixels or more, not {image_size}x{image_size}")
    if width is not None and width < 4:
        raise UserError(f"model.width={width} is out of range; allowed is [4, inf]")
    if blocks is not None and blocks < 1:
        raise UserError(f"model.blocks={blocks} is out of range; allowed is [1, inf]")
    if not multipliers or min(multipliers) < 1:
        raise UserError(f"model.multipliers={multipliers} must be one or more positive numbers, e.g. [1,2,2]")
    if 2 ** (len(multipliers) - 1) > image_size:
        raise UserError(f"model.multipliers={multipliers} asks for more halvings than {image_size} pixels allow")
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout={dropout} is out of range; allowed is [0, 1)")
    return SIZES[size]
