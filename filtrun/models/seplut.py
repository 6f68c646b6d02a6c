"""SepLUT: a curve for every channel, then a small 3D table, both made for the image.

Source: Yang, Jin, Xu, Zhang, Chen & Liu, "SepLUT: Separable Image-adaptive Lookup Tables for Real-time Image
Enhancement", ECCV 2022 (arXiv 2207.08351), code ImCharlesY/SepLUT.

Alone::

    model = SepLUT().eval()
    retouched = model(photo)  # (N, 3, H, W) in [0, 1]
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from filtrun.errors import UserError
from filtrun.lut.curves import apply_curves
from filtrun.lut.generators import TableGenerator, bank_size, full_precision, make_backbone, official_state
from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.lut.memory import LastTensor
from filtrun.lut.quantized import SHIFTS, apply_8bit, quantized_linear, to_8bit
from filtrun.models.lut3d import check_lut_options, load_exactly


class CurveGenerator(nn.Module):
    """Codes (N, F) to curves (N, 3, D) in (0, 1): the sigmoid of one fully connected layer."""

    def __init__(self, features: int, size: int, share: bool):
        super().__init__()
        self.size = size
        self.lut1d_generator = nn.Linear(features, size * (1 if share else 3))

    def forward(self, codes: Tensor) -> Tensor:
        return self.shaped(self.lut1d_generator(codes))

    def shaped(self, raw: Tensor) -> Tensor:
        """The layer's output (N, D or 3 D) as curves."""
        return raw.view(len(raw), -1, self.size).sigmoid().expand(-1, 3, -1)


class SepLUT(nn.Module):
    """RGB image to RGB image of the same size: the curves treat each channel, the table mixes channels.

    A backbone of a quarter of AdaInt's width gives a code of the image; linear layers turn it into curves and into
    weights that mix basis tables. 119,791 parameters with the defaults, 75,967 with 9 nodes, 47,175 with 9 nodes and
    width 6. Tensor names are those of the released weights (``backbone.0.0.weight``,
    ``lut1d_generator.lut1d_generator.weight``, ``lut3d_generator.basis_luts_bank.weight``).

    Args:
        in_channels: 3, or 1 for grey images, which go through as three equal channels whose outputs are averaged.
        luts: number of basis tables, 1 or more (paper: 3; 5 with resnet18).
        lut3d_size: nodes along each axis of the table, 2 or more; 0 leaves the table out.
        lut1d_size: nodes of the curves, 2 or more; 0 leaves the curves out.
        width: channels of the backbone's first layer; the last has eight times as many.
        share: one curve for all channels.
        backbone: "cnn" (five convolutions) or "resnet18".
        pretrained: ImageNet weights for resnet18.
        dropout: after the convolutions of "cnn", in [0, 1).
        interpolation: of the table, "trilinear" (paper) or "tetrahedral".
        quantized: in evaluation mode, make the tables with 8-bit layers and look them up in 8-bit integers.
        lambda_sparse, lambda_smooth, lambda_mono: weights of the penalties in `regularisers`.

    Raises:
        UserError: a value outside what is said above, or quantisation of other than 9 or 17 trilinear nodes in both.
    """

    tileable = False  # the tables depend on the whole image

    def __init__(
        self,
        in_channels: int = 3,
        luts: int = 3,
        lut3d_size: int = 17,
        lut1d_size: int = 17,
        width: int = 8,
        share: bool = False,
        backbone: str = "cnn",
        pretrained: bool = False,
        dropout: float = 0.5,
        interpolation: str = "trilinear",
        quantized: bool = False,
        lambda_sparse: float = 1e-4,
        lambda_smooth: float = 0.0,
        lambda_mono: float = 0.0,
    ):
        super().__init__()
        check_lut_options("seplut", in_channels, luts, 2, interpolation, lambda_smooth, lambda_mono)
        for name, size, most in (("lut3d_size", lut3d_size, 256), ("lut1d_size", lut1d_size, 65536)):
            if size != 0 and not 2 <= size <= most:
                raise UserError(f"model.{name}={size} is out of range; allowed is [2, {most}], or 0 to leave it out")
        if lut3d_size == lut1d_size == 0:
            raise UserError("model.lut3d_size=0 and model.lut1d_size=0 leave nothing; set one of them")
        if width < 1:
            raise UserError(f"model.width={width} is out of range; allowed is [1, inf]")
        if not lambda_sparse >= 0:
            raise UserError(f"model.lambda_sparse={lambda_sparse} is out of range; allowed is [0, inf]")
        if quantized and (lut3d_size != lut1d_size or lut3d_size not in SHIFTS or interpolation != "trilinear"):
            raise UserError(
                f"model.quantized=true needs lut3d_size=lut1d_size=9 or 17 and interpolation=trilinear, "
                f"not {lut3d_size}, {lut1d_size} and {interpolation}"
            )
        self.in_channels, self.interpolation, self.quantized = in_channels, interpolation, quantized
        self.lambda_sparse, self.lambda_smooth, self.lambda_mono = lambda_sparse, lambda_smooth, lambda_mono
        widths = [width * scale for scale in (1, 2, 4, 8, 8)]
        self.backbone = make_backbone(backbone, widths, 2, dropout, pretrained)
        features = self.backbone.features
        self.lut3d_generator = TableGenerator(features, luts, lut3d_size) if lut3d_size else None
        self.lut1d_generator = CurveGenerator(features, lut1d_size, share) if lut1d_size else None
        self._energy = LastTensor()

    def tables_for(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Curves (N, 3, D1) and tables (N, 3, D3, D3, D3) for images x (N, 3, H, W); None for what is left out.

        As a 1D and a 3D .cube file, applied in this order, they give exactly what `forward` gives.
        """
        codes = self.backbone(x)
        curves = tables = weights = None
        with full_precision(codes):
            codes = codes.to(next(self.parameters()).dtype)
            if self.lut1d_generator is not None:
                curves = self.lut1d_generator(codes)
            if self.lut3d_generator is not None:
                weights, tables = self.lut3d_generator(codes)
        self._energy.value = weights.square().mean() if weights is not None and torch.is_grad_enabled() else None
        return curves, tables

    def table_for(self, x: Tensor, size: int = 65) -> Tensor:
        """Curves and tables in one: (N, 3, size, size, size) for one .cube file per image.

        They agree with `forward` at the grid's nodes and are an approximation between them: the finer the grid, the
        closer. `tables_for` is exact.
        """
        curves, tables = self.tables_for(x.expand(-1, 3, -1, -1))
        grid = identity_lut(size, dtype=x.dtype, device=x.device).view(1, 3, size * size, size)
        found = self._look_up(grid.expand(len(x), -1, -1, -1), curves, tables)
        return found.view(-1, 3, size, size, size)

    def _look_up(self, x: Tensor, curves: Tensor | None, tables: Tensor | None) -> Tensor:
        x = x if curves is None else apply_curves(x, curves)
        return x if tables is None else apply_lut(x, tables, self.interpolation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) in [0, 1] to the same shape, not clamped; every size works.

        Quantised evaluation gives values of 8 bits in [0, 1].
        """
        rgb = x.expand(-1, 3, -1, -1)
        if self.quantized and not self.training:
            y = self._quantized(rgb)
        else:
            y = self._look_up(rgb, *self.tables_for(rgb))
        return y if self.in_channels == 3 else y.mean(dim=1, keepdim=True)

    def _quantized(self, x: Tensor) -> Tensor:
        """No gradients: everything between the code and the output is rounded."""
        bank, curve = self.lut3d_generator, self.lut1d_generator
        assert bank is not None and curve is not None
        with torch.no_grad():
            codes = self.backbone(x)
            with full_precision(codes):
                weights = quantized_linear(bank.weights_generator, codes)
                tables = quantized_linear(bank.basis_luts_bank, weights)
                curves = curve.shaped(quantized_linear(curve.lut1d_generator, codes))
            low, high = tables.amin(1, keepdim=True), tables.amax(1, keepdim=True)
            span = (high - low).clamp(min=torch.finfo(tables.dtype).tiny)
            levels = to_8bit((tables - low) / span).view(-1, 3, *[bank.size] * 3)
            y = apply_8bit(to_8bit(x.float()), to_8bit(curves), levels)
            low, span = (t[..., None, None] for t in (low, span))
            return y.float().div_(255).mul_(span).add_(low).clamp_(0, 1).mul_(255).round_().div_(255).to(x.dtype)

    def regularisers(self) -> dict[str, Tensor]:
        """Penalties of the last forward pass, weighted and ready to add to the loss; see `TableGenerator.penalties`."""
        if self.lut3d_generator is None:
            return {}
        return self.lut3d_generator.penalties(
            self._energy.value, self.lambda_sparse, self.lambda_smooth, self.lambda_mono
        )

    @classmethod
    def from_official(cls, path: str | os.PathLike[str], share: bool = False, quantized: bool = False) -> SepLUT:
        """The model with released weights in a file, in evaluation mode; sizes are read off the tensors.

        Args:
            share, quantized: as for the model; the file does not tell.

        Raises:
            UserError: the file cannot be read, or does not hold such a model.
        """
        state = official_state(path)
        bank, curve, first = (
            state.get(f"{name}.weight")
            for name in ("lut3d_generator.basis_luts_bank", "lut1d_generator.lut1d_generator", "backbone.0.0")
        )
        if (bank is None or bank.dim() != 2) and curve is None:
            raise UserError(f"{path} does not hold a SepLUT model: no lut1d_generator and no lut3d_generator in it")
        model = cls(
            luts=3 if bank is None else bank.shape[1],
            lut3d_size=0 if bank is None else bank_size(bank),
            lut1d_size=0 if curve is None else curve.shape[0] // (1 if share else 3),
            width=8 if first is None else first.shape[0],
            share=share,
            backbone="resnet18" if first is None else "cnn",
            quantized=quantized,
        )
        load_exactly(model, state, path)
        return model.eval()
