"""AdaInt: image-adaptive 3D tables whose nodes move to where an image needs them.

Source: Yang, Jin, Jia, Xu & Chen, "AdaInt: Learning Adaptive Intervals for 3D Lookup Tables on Real-time Image
Enhancement", CVPR 2022 (arXiv 2204.13983), code ImCharlesY/AdaInt.

Alone::

    model = AdaInt().eval()
    retouched = model(photo)  # (N, 3, H, W) in [0, 1]
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.lut.generators import TableGenerator, bank_size, full_precision, make_backbone, official_state, resampled
from filtrun.lut.interpolation import apply_lut
from filtrun.lut.memory import LastTensor
from filtrun.models.lut3d import WIDTHS, check_lut_options, load_exactly


def vertices_from(intervals: Tensor) -> Tensor:
    """Vertices (..., D) in [0, 1] from unnormalised intervals (..., D - 1): ``[0, cumsum(softmax(intervals))]``.

    They increase, and the ends are exactly 0 and 1; equal intervals give the uniform lattice.
    """
    inner = intervals.softmax(-1).cumsum(-1)[..., :-1].clamp(max=1.0)
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=1.0)


class Intervals(nn.Module):
    """Codes (N, F) to vertices (N, 3, D): one fully connected layer, which starts at the uniform lattice."""

    def __init__(self, features: int, size: int, share: bool):
        super().__init__()
        self.size = size
        self.intervals_generator = nn.Linear(features, (size - 1) * (1 if share else 3))
        nn.init.zeros_(self.intervals_generator.weight)
        nn.init.ones_(self.intervals_generator.bias)

    def forward(self, codes: Tensor) -> Tensor:
        intervals = self.intervals_generator(codes).view(len(codes), -1, self.size - 1)
        return vertices_from(intervals).expand(-1, 3, -1)


class AdaInt(nn.Module):
    """RGB image to RGB image of the same size, through a table made for it, with nodes at places made for it.

    A backbone gives a code of the image; linear layers turn it into weights that mix basis tables, and into intervals
    between the nodes along each axis. 619,724 parameters with the defaults. Tensor names are those of the released
    weights (``backbone.0.0.weight``, ``lut_generator.basis_luts_bank.weight``, ``adaint.intervals_generator.weight``).

    Args:
        in_channels: 3, or 1 for grey images, which go through as three equal channels whose outputs are averaged.
        luts: number of basis tables, 1 or more (paper: 3; 5 with resnet18).
        lut_size: nodes along each axis, 2 or more.
        adaptive: False keeps the uniform lattice and the backbone without pooling: the tables of Zeng et al.
        share: one set of vertices for all three axes (Share-AdaInt).
        backbone: "cnn" (five convolutions) or "resnet18".
        pretrained: ImageNet weights for resnet18.
        dropout: after the convolutions of "cnn", in [0, 1).
        interpolation: "trilinear" (paper) or "tetrahedral".
        lambda_sparse, lambda_smooth, lambda_mono: weights of the penalties in `regularisers`.
        lr_factor: learning rate of the interval layer over that of the rest.
        hold_epochs: epochs for which the interval layer does not train yet.
        hold_share: at most this share of a run's steps; 5 of 400 epochs in the paper, and less in short runs.

    Raises:
        UserError: a value outside what is said above.
    """

    tileable = False  # table and vertices depend on the whole image

    def __init__(
        self,
        in_channels: int = 3,
        luts: int = 3,
        lut_size: int = 33,
        adaptive: bool = True,
        share: bool = False,
        backbone: str = "cnn",
        pretrained: bool = False,
        dropout: float = 0.5,
        interpolation: str = "trilinear",
        lambda_sparse: float = 1e-4,
        lambda_smooth: float = 0.0,
        lambda_mono: float = 10.0,
        lr_factor: float = 0.1,
        hold_epochs: float = 5.0,
        hold_share: float = 0.0125,
    ):
        super().__init__()
        check_lut_options("adaint", in_channels, luts, lut_size, interpolation, lambda_smooth, lambda_mono)
        for name, value in (("lambda_sparse", lambda_sparse), ("lr_factor", lr_factor), ("hold_epochs", hold_epochs)):
            if not value >= 0:
                raise UserError(f"model.{name}={value} is out of range; allowed is [0, inf]")
        if not 0 <= hold_share <= 1:
            raise UserError(f"model.hold_share={hold_share} is out of range; allowed is [0, 1]")
        self.in_channels, self.interpolation = in_channels, interpolation
        self.lambda_sparse, self.lambda_smooth, self.lambda_mono = lambda_sparse, lambda_smooth, lambda_mono
        self.lr_factor, self.hold_epochs, self.hold_share = lr_factor, hold_epochs, hold_share
        self.backbone = make_backbone(backbone, WIDTHS, 2 if adaptive else None, dropout, pretrained)
        self.lut_generator = TableGenerator(self.backbone.features, luts, lut_size)
        self.adaint = Intervals(self.backbone.features, lut_size, share) if adaptive else None
        self._energy = LastTensor()

    def param_groups(self) -> list[dict[str, Any]]:
        """The interval layer trains more slowly than the rest, and later."""
        if self.adaint is None:
            return []
        hold = {"hold_epochs": self.hold_epochs, "hold_share": self.hold_share}
        return [{"params": list(self.adaint.parameters()), "lr_factor": self.lr_factor, **hold}]

    def tables_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tables (N, 3, D, D, D) and vertices (N, 3, D), None on the uniform lattice, for images x (N, 3, H, W)."""
        codes = self.backbone(x)
        with full_precision(codes):
            codes = codes.to(self.lut_generator.weights_generator.weight.dtype)
            weights, tables = self.lut_generator(codes)
            vertices = None if self.adaint is None else self.adaint(codes)
        self._energy.value = weights.square().mean() if torch.is_grad_enabled() else None
        return tables, vertices

    def table_for(self, x: Tensor, size: int = 65) -> Tensor:
        """Tables (N, 3, size, size, size) on a uniform grid for .cube files, which know no other.

        They agree with `forward` at the grid's nodes and are an approximation between them, since the vertices lie
        elsewhere: the finer the grid, the closer.
        """
        tables, vertices = self.tables_for(x.expand(-1, 3, -1, -1))
        return resampled(tables, size, interpolation=self.interpolation, vertices=vertices)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) in [0, 1] to the same shape, not clamped; every size works."""
        rgb = x.expand(-1, 3, -1, -1)
        tables, vertices = self.tables_for(rgb)
        y = apply_lut(rgb, tables, self.interpolation, vertices=vertices)
        return y if self.in_channels == 3 else y.mean(dim=1, keepdim=True)

    def regularisers(self) -> dict[str, Tensor]:
        """Penalties of the last forward pass, weighted and ready to add to the loss; see `TableGenerator.penalties`."""
        return self.lut_generator.penalties(
            self._energy.value, self.lambda_sparse, self.lambda_smooth, self.lambda_mono
        )

    @classmethod
    def from_official(cls, path: str | os.PathLike[str]) -> AdaInt:
        """The model with released weights in a file, in evaluation mode; its options are read off the tensors.

        Raises:
            UserError: the file cannot be read, or does not hold such a model.
        """
        state = official_state(path, beside=("cnt_iters", "uniform_vertices"))
        bank, inner = state.get("lut_generator.basis_luts_bank.weight"), state.get("adaint.intervals_generator.weight")
        if bank is None or bank.dim() != 2:
            raise UserError(f"{path} does not hold an AdaInt model: no lut_generator.basis_luts_bank.weight in it")
        size = bank_size(bank)
        model = cls(
            luts=bank.shape[1],
            lut_size=size,
            adaptive=inner is not None,
            share=inner is not None and inner.shape[0] == size - 1,
            backbone="resnet18" if any(name.startswith("backbone.net.") for name in state) else "cnn",
        )
        load_exactly(model, state, path)
        return model.eval()
