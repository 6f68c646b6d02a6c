"""Networks that make tables for an image: backbones, a bank of basis tables with mixing weights, and its penalties.

Source: code of ImCharlesY/AdaInt and ImCharlesY/SepLUT, which share these parts and follow Zeng et al., TPAMI 2020
(HuiZeng/Image-Adaptive-3DLUT). Tensor names are those of the released weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError, unknown
from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.lut.regularise import monotonicity, total_variation

SIDE = 256
BACKBONES = ("cnn", "resnet18")


class ConvBackbone(nn.Sequential):
    """(N, 3, H, W) to a code (N, features): strided convolutions on a 256x256 copy, pooled to `pool` pixels a side."""

    def __init__(self, widths: Sequence[int], pool: int | None, dropout: float):
        layers: list[nn.Module] = []
        for i, (inputs, width) in enumerate(zip((3, *widths), widths, strict=False)):
            block: list[nn.Module] = [nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            if i < len(widths) - 1:
                block.append(nn.InstanceNorm2d(width, affine=True))
            layers.append(nn.Sequential(*block))
        layers.append(nn.Dropout(dropout))
        if pool is not None:
            layers.append(nn.AdaptiveAvgPool2d(pool))
        super().__init__(*layers)
        self.features = widths[-1] * (SIDE // 2 ** len(widths) if pool is None else pool) ** 2
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.InstanceNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return super().forward(x).flatten(1)


class ResNetBackbone(nn.Module):
    """(N, 3, H, W) to a code (N, 512): torchvision's ResNet-18 on a 224x224 bilinear copy, colours as they are.

    Args:
        pretrained: ImageNet weights, read from torch's hub cache.

    Raises:
        UserError: they are wanted and not there.
    """

    def __init__(self, pretrained: bool):
        super().__init__()
        from filtrun.compat import torchvision
        from filtrun.metrics.image import cached_weights

        torchvision()
        from torchvision.models import resnet18

        net = resnet18(weights=None)
        if pretrained:
            path = cached_weights("resnet18-")
            if path is None:
                raise UserError(
                    "model.pretrained=true needs torchvision's resnet18-f37072fd.pth in "
                    f"{torch.hub.get_dir()}/checkpoints; model.pretrained=false starts without"
                )
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        net.fc = nn.Identity()
        self.net = net
        self.features = 512

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)).flatten(1)


def make_backbone(
    kind: str, widths: Sequence[int], pool: int | None, dropout: float, pretrained: bool
) -> ConvBackbone | ResNetBackbone:
    """The backbone called `kind`.

    Raises:
        UserError: an unknown kind, a dropout outside [0, 1), or ImageNet weights for the small network.
    """
    if kind not in BACKBONES:
        raise unknown("model.backbone", kind, BACKBONES)
    if not 0 <= dropout < 1:
        raise UserError(f"model.dropout={dropout} is out of range; allowed is [0, 1)")
    if kind == "resnet18":
        return ResNetBackbone(pretrained)
    if pretrained:
        raise UserError("model.pretrained=true is for model.backbone=resnet18; there are no ImageNet weights for cnn")
    return ConvBackbone(widths, pool, dropout)


class TableGenerator(nn.Module):
    """Codes (N, F) to mixing weights (N, R) and the tables (N, 3, D, D, D) mixed from a bank of R basis tables.

    The bank is a bias-free linear layer from the weights to all table values; its first table starts as the identity,
    the others at zero, and all weights start near one.
    """

    def __init__(self, features: int, luts: int, size: int):
        super().__init__()
        self.size = size
        self.weights_generator = nn.Linear(features, luts)
        self.basis_luts_bank = nn.Linear(luts, 3 * size**3, bias=False)
        nn.init.ones_(self.weights_generator.bias)
        with torch.no_grad():
            self.basis_luts_bank.weight.zero_()[:, 0] = identity_lut(size).flatten()

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights_generator(codes)
        return weights, self.basis_luts_bank(weights).view(-1, 3, *[self.size] * 3)

    def tables(self) -> list[Tensor]:
        """The basis tables, each (3, D, D, D) as ``[c, b, g, r]``."""
        return list(self.basis_luts_bank.weight.t().contiguous().view(-1, 3, *[self.size] * 3).unbind())

    def penalties(
        self, energy: Tensor | None, lambda_sparse: float, lambda_smooth: float, lambda_mono: float
    ) -> dict[str, Tensor]:
        """Weighted terms of the loss, without those of weight 0.

        ``lut_sparse``: `energy`, the mean square of the last mixing weights (0 if None). ``lut_smooth``: total
        variation, every difference counted once. ``lut_mono``: falls along the axes. Both are summed over basis tables.
        """
        found: dict[str, Tensor] = {}
        if lambda_sparse:
            last = self.weights_generator.bias.new_zeros(()) if energy is None else energy
            found["lut_sparse"] = lambda_sparse * last
        if lambda_smooth:
            found["lut_smooth"] = lambda_smooth * sum_of(total_variation(table, 1.0) for table in self.tables())
        if lambda_mono:
            found["lut_mono"] = lambda_mono * sum_of(monotonicity(table) for table in self.tables())
        return found


def sum_of(terms: Any) -> Tensor:
    """Sum of scalar tensors."""
    return torch.stack(list(terms)).sum()


def full_precision(codes: Tensor) -> Any:
    """Context in which tables are made: a table value rounded to half precision would show as banding."""
    return torch.autocast(codes.device.type, enabled=False)


def resampled(tables: Tensor, size: int, **lookup: Any) -> Tensor:
    """Look the nodes of a uniform grid of `size` up in tables (N, 3, D, D, D): (N, 3, size, size, size).

    Args:
        lookup: for `apply_lut`, beside image and table.
    """
    grid = identity_lut(size, dtype=tables.dtype, device=tables.device).view(1, 3, size * size, size)
    found = apply_lut(grid.expand(tables.shape[0], -1, -1, -1), tables, **lookup)
    return found.view(-1, 3, size, size, size)


def official_state(path: str | os.PathLike[str], beside: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors of a released file, without the counters in `beside`.

    Raises:
        UserError: the file cannot be read.
    """
    from filtrun.models.checkpoint import read_state

    return {name: tensor for name, tensor in read_state(path).items() if name not in beside}


def bank_size(bank: Tensor) -> int:
    """Nodes along each axis of the tables in a bank's weight (3 D^3, R)."""
    return max(2, round((bank.shape[0] / 3) ** (1 / 3)))
