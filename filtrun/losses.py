"""Loss terms between an output and its target, images (N, C, H, W) in [0, 1]; each gives a scalar.

Tasks choose them by name and weight: ``task.losses={l1: 1.0, perceptual: 0.1}``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.constants import constant
from filtrun.errors import UserError, unknown


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference."""
    return F.l1_loss(x, y)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference."""
    return F.mse_loss(x, y)


def charbonnier(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(d^2 + eps^2): L1 that is smooth at 0. Charbonnier et al., ICIP 1994; eps as in LapSRN."""
    return ((x - y).square() + eps**2).sqrt().mean()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """1 - SSIM with the 11x11 Gaussian window where it fits (see `filtrun.metrics.image`)."""
    from filtrun.metrics.image import ssim_maps

    return 1 - ssim_maps(x.float(), y.float())[0].mean()


def tv(x: Tensor, y: Tensor) -> Tensor:
    """Anisotropic total variation of the output alone: mean absolute differences of neighbours, both directions."""
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()


def gradient(x: Tensor, y: Tensor) -> Tensor:
    """L1 between the forward differences of output and target, both directions."""
    d = x - y
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


def edge(x: Tensor, y: Tensor) -> Tensor:
    """Charbonnier distance of the Laplacians (kernel 0 1 0 / 1 -4 1 / 0 1 0), inside the image."""
    kernel = constant(((0, 1, 0), (1, -4, 1), (0, 1, 0)), x.dtype, x.device).expand(x.shape[1], 1, 3, 3)
    d = F.conv2d(x - y, kernel, groups=x.shape[1])
    return (d.square() + 1e-6).sqrt().mean()


def perceptual(x: Tensor, y: Tensor) -> Tensor:
    """L1 between VGG-16 features (relu1_2, relu2_2, relu3_3, relu4_3), mean over the layers.

    Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016. Grey images are
    repeated to three channels.

    Raises:
        UserError: VGG-16's weights are not on this machine.
    """
    net = vgg_features(str(x.device))
    pairs = zip(net(x), [f.detach() for f in net(y)], strict=True)
    return torch.stack([F.l1_loss(a, b) for a, b in pairs]).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1, "l2": l2, "charbonnier": charbonnier, "ssim": ssim, "tv": tv, "gradient": gradient, "edge": edge,
    "perceptual": perceptual,
}  # fmt: skip


class VggFeatures(nn.Module):
    """Features of VGG-16 after the given layers of its ``features`` (default: relu1_2, relu2_2, relu3_3, relu4_3).

    Forward: (N, 1 or 3, H, W) in [0, 1] -> a list of feature maps. The weights are frozen.
    """

    def __init__(self, features: nn.Sequential, layers: tuple[int, ...] = (3, 8, 15, 22)) -> None:
        super().__init__()
        self.features = nn.ModuleList(list(features)[: max(layers) + 1]).eval().requires_grad_(False)
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.layers = layers
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = (x - self.mean) / self.std
        found: list[Tensor] = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                found.append(x)
        return found


@functools.lru_cache(maxsize=4)
def vgg_features(device: str = "cpu") -> VggFeatures:
    """VGG-16 features with ImageNet weights from torch's hub cache. Raises UserError where they are missing."""
    from filtrun.compat import torchvision
    from filtrun.metrics.image import cached_weights

    path = cached_weights("vgg16-")
    if path is None:
        raise UserError(
            "task.losses.perceptual needs VGG-16's weights, which are not on this machine: put torchvision's "
            f"vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints, or set task.losses.perceptual=0"
        )
    torchvision()
    from torchvision.models import vgg16

    net = vgg16(weights=None)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return VggFeatures(net.features).to(device)


def check_losses(weights: Mapping[str, float], where: str = "task.losses") -> None:
    """Raise UserError for a term that does not exist, a weight below 0, or weights that are missing.

    That every weight is 0 is no mistake yet: the model or a method may have terms of its own.
    """
    for name, weight in weights.items():
        if name not in LOSSES:
            raise unknown(f"loss of {where}", name, LOSSES)
        if not weight >= 0:
            raise UserError(f"{where}.{name}={weight} must not be negative")
    if weights.get("perceptual"):
        vgg_features()


def weighted(weights: Mapping[str, float], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each chosen term times its weight; a weight of 0 leaves its term out."""
    return {name: weight * LOSSES[name](x, y) for name, weight in weights.items() if weight}


def model_terms(weights: Mapping[str, float], model: Any, output: Any, target: Tensor, batch: Any) -> dict[str, Tensor]:
    """The model's own terms times their weights (1 where none is named).

    Args:
        weights: by name; 0 leaves a term out.
        model: its ``regularisers()`` and ``extra_losses(output, target, batch)``, where it has them, give the terms.
        output: what its forward returned.

    Raises:
        UserError: a weight for a term that the model does not have.
    """
    found: dict[str, Tensor] = {}
    if hasattr(model, "regularisers"):
        found |= model.regularisers()
    if hasattr(model, "extra_losses"):
        found |= model.extra_losses(output, target, batch)
    for name in weights:
        if name not in found:
            raise unknown(f"term of task.model_losses ({type(model).__name__}'s own terms)", name, found)
    return {name: weights.get(name, 1.0) * term for name, term in found.items() if weights.get(name, 1.0)}
