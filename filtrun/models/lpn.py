"""Learned proximal networks: a denoiser that is the gradient of a convex function, so the prior behind it can be read.

Fang, Buchanan, Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", ICLR 2024 (arXiv
2310.14344); official code Sulam-Group/learned-proximal-networks (``lpn/networks/lpn_mnist.py``, ``lpn_128.py``). Layers
carry the official names, so the released weights load.

Where this differs from the official code, on purpose: the input is never changed (there ``requires_grad`` is switched
on in place); images of other sizes than the network's are averaged over overlapping patches; the bias of the potential,
a constant that no gradient reaches, is left out unless ``potential_bias=true`` asks for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError, unknown

FEATURES = 64
"""Width of the last hidden layer."""


class ConvexGradient(nn.Module):
    """A network whose output is the gradient of a scalar `potential`, which is convex while some weights are not
    negative."""

    lin: nn.ModuleList

    def potential(self, x: Tensor) -> Tensor:
        """The convex function at x (N, ...): (N,)."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, mean: float = -10.0, std: float = 0.1) -> None:
        """Start the weights that must not be negative at exp(N(mean, std^2)), the official way."""
        for weight in self.convex_weights():
            weight.normal_(mean, std).exp_()

    def convex_weights(self) -> list[Tensor]:
        """The weights that must stay non-negative for the potential to be convex."""
        return [layer.weight for layer in self.lin[1:]]  # type: ignore[misc]

    @torch.no_grad()
    def project(self) -> None:
        """Put negative ones of them to 0; to be called after every optimizer step."""
        for weight in self.convex_weights():
            weight.clamp_(min=0)

    def prox(self, x: Tensor) -> Tensor:
        """The gradient of the potential at x, which has the size the network is built for: same shape.

        Differentiable where gradients are on; works under ``torch.no_grad`` too.
        """
        outer = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            at = x if outer and x.requires_grad else x.detach().clone().requires_grad_(True)
            at = at.view_as(at)  # hooks of profilers cannot stand a leaf here
            (gradient,) = torch.autograd.grad(self.potential(at).sum(), at, create_graph=outer)
        return gradient


class LPN(ConvexGradient):
    """``forward(x)`` = gradient of `potential` at x, a convex function once `project` has been called after each step.

    317,056 parameters for 1 x 28 x 28 (small); 7,235,712 for 3 x 128 x 128 (large), and the potential's bias.

    Args:
        in_channels: image channels C.
        image_size: side N of the images the network is built for; others are cut into patches.
        size: small: three feature grids, down to N / 4 (paper: MNIST); large: down to N / 8 (paper: CelebA, CT).
        hidden: feature channels; null: 64 for small, 256 for large.
        beta: sharpness of the softplus; null: 10 or 100.
        alpha: strong convexity: alpha * |x|^2 is part of the potential; null: 0.01 or 1e-6.
        potential_bias: have the official large network's bias of the potential.

    Raises:
        UserError: a value outside what is said above.
    """

    tileable = False
    """Overlapping patches are taken here already."""

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        size: str = "small",
        hidden: int | None = None,
        beta: float | None = None,
        alpha: float | None = None,
        potential_bias: bool = False,
    ) -> None:
        super().__init__()
        if size not in ("small", "large"):
            raise unknown("model.size", size, ("small", "large"))
        large = size == "large"
        hidden = hidden if hidden is not None else 256 if large else 64
        self.beta = beta if beta is not None else 100.0 if large else 10.0
        self.alpha = alpha if alpha is not None else 1e-6 if large else 0.01
        for key, value, low in (("image_size", image_size, 8 if large else 4), ("hidden", hidden, 1)):
            if value < low:
                raise UserError(f"model.{key}={value} is out of range; allowed is [{low}, inf]")
        if not self.beta > 0 or not self.alpha >= 0:
            raise UserError(f"model.beta={self.beta} must be above 0 and model.alpha={self.alpha} not negative")
        self.in_channels, self.image_size = in_channels, image_size

        strides = [2, 1, 2, 1, 2] if large else [2, 1, 2]
        self.grids = [image_size]  # the side of each feature map, which is also the side x is resized to for it
        for stride in strides:
            self.grids.append(-(-self.grids[-1] // stride))
        side = self.grids[-1]

        def conv(inputs: int, stride: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(inputs, hidden, 3, stride=stride, padding=1, bias=bias)

        last: list[nn.Module]
        if large:
            last = [nn.Conv2d(hidden, FEATURES, side, bias=False), nn.Linear(FEATURES, 1, bias=potential_bias)]
            from_image: nn.Module = nn.Conv2d(in_channels, FEATURES, side)
        else:
            last = [nn.Linear(hidden * side**2, FEATURES, bias=False), nn.Linear(FEATURES, 1, bias=potential_bias)]
            from_image = nn.Linear(in_channels * side**2, FEATURES)
        self.lin = nn.ModuleList([conv(in_channels, 1, large), *[conv(hidden, s, False) for s in strides], *last])
        self.res = nn.ModuleList([*[conv(in_channels, s, True) for s in strides], from_image])
        self.reset()

    def potential(self, x: Tensor) -> Tensor:
        """The convex function psi at x (N, C, side, side): (N,)."""
        z = self._act(self.lin[0](x))
        for core, skip, side in zip(self.lin[1:-2], self.res[:-1], self.grids[:-1], strict=True):
            z = self._act(core(z) + skip(self._resized(x, side)))
        image = self._resized(x, self.grids[-1])
        if isinstance(self.lin[-2], nn.Linear):
            z, image = z.flatten(1), image.flatten(1)
        z = self._act(self.lin[-2](z) + self.res[-1](image))
        value: Tensor = self.lin[-1](z.flatten(1))
        return value[:, 0] + self.alpha * x.square().flatten(1).sum(1)

    def forward(self, x: Tensor, patches: int = 64) -> Tensor:
        """Denoise x (N, C, H, W) of any size, in [0, 1].

        Only for images of the network's own side is the output the exact proximal map; smaller ones are filled up by
        repeating the border, larger ones cut into patches at half a side's distance, `patches` at a time, and averaged.
        """
        side, (height, width) = self.image_size, x.shape[-2:]
        if height == width == side:
            return self.prox(x)
        if height < side or width < side:
            x = F.pad(x, (0, max(0, side - width), 0, max(0, side - height)), mode="replicate")
        places = [(i, j) for i in _starts(x.shape[-2], side) for j in _starts(x.shape[-1], side)]
        total, count = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        step = max(1, patches // len(x))
        for first in range(0, len(places), step):
            some = places[first : first + step]
            out = self.prox(torch.cat([x[..., i : i + side, j : j + side] for i, j in some]))
            for (i, j), patch in zip(some, out.split(len(x)), strict=True):
                total[..., i : i + side, j : j + side] += patch
                count[..., i : i + side, j : j + side] += 1
        return (total / count)[..., :height, :width]

    def _act(self, x: Tensor) -> Tensor:
        return F.softplus(x, beta=self.beta)

    def _resized(self, x: Tensor, side: int) -> Tensor:
        return F.interpolate(x, (side, side), mode="bilinear")


class ScalarLPN(ConvexGradient):
    """The one-dimensional network of the paper's Laplacian experiment: vectors (N, d) -> same, dense layers.

    Args:
        features: d.
        hidden, layers: width and number of the hidden layers after the first.
        beta: sharpness of the softplus.
        start: mean and standard deviation of the logarithm of the non-negative weights.
    """

    def __init__(
        self, features: int = 1, hidden: int = 50, layers: int = 4, beta: float = 10.0,
        start: tuple[float, float] = (-3.0, 0.1),
    ) -> None:  # fmt: skip
        super().__init__()
        self.beta = beta
        cores = [nn.Linear(hidden, hidden, bias=False) for _ in range(layers)]
        self.lin = nn.ModuleList([nn.Linear(features, hidden, bias=False), *cores, nn.Linear(hidden, 1, bias=False)])
        self.res = nn.ModuleList([*[nn.Linear(features, hidden) for _ in range(layers)], nn.Linear(features, 1)])
        self.reset(*start)

    def potential(self, x: Tensor) -> Tensor:
        """The convex function at x (N, d): (N,)."""
        z = F.softplus(self.lin[0](x), beta=self.beta)
        for core, skip in zip(self.lin[1:-1], self.res[:-1], strict=True):
            z = F.softplus(core(z) + skip(x), beta=self.beta)
        value: Tensor = self.lin[-1](z) + self.res[-1](x)
        return value[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """The gradient of the potential, (N, d)."""
        return self.prox(x)


def _starts(length: int, side: int) -> list[int]:
    """Where patches of `side` begin along `length`: half a side apart, the last at the end."""
    return sorted({*range(0, length - side + 1, max(1, side // 2)), length - side})
