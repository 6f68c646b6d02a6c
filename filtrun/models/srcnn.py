"""SRCNN: three convolutions that sharpen a bicubically enlarged image.

Dong et al., "Image Super-Resolution Using Deep Convolutional Networks", TPAMI 2016 (arXiv 1501.00092).
"""

from __future__ import annotations

from torch import Tensor, nn

from filtrun.degrade.bicubic import imresize
from filtrun.errors import UserError


class SRCNN(nn.Module):
    """Convolutions f1 x f1 / 64, f2 x f2 / 32 and f3 x f3 / C with ReLU between, on the enlarged image.

    Parameters for one channel: 8,129 with kernels 9-1-5, 57,281 with 9-5-5. Forward: (N, C, H, W) ->
    (N, C, r H, r W); the enlargement is inside. The paper pads nothing and so loses a border; here zeros keep the size.

    Args:
        scale: r, how many times larger the output is.
        in_channels: C; the paper works on luma, so 1.
        kernels: f1, f2, f3, odd numbers.

    Raises:
        UserError: kernels that are not three odd numbers.
    """

    def __init__(self, scale: int, in_channels: int = 1, kernels: list[int] = [9, 1, 5]) -> None:  # noqa: B006
        super().__init__()
        if len(kernels) != 3 or any(k < 1 or k % 2 == 0 for k in kernels):
            raise UserError(f"model.kernels={kernels} must be three odd numbers, such as [9, 1, 5]")
        a, b, c = kernels
        self.scale = scale
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 64, a, padding=a // 2), nn.ReLU(),
            nn.Conv2d(64, 32, b, padding=b // 2), nn.ReLU(),
            nn.Conv2d(32, in_channels, c, padding=c // 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(imresize(x, self.scale, 1))
