"""LLF-LUT: 3D tables set the tone of the low-pass image, a learned local Laplacian filter restores the detail.

Sources: Zhang et al., "Lookup Table meets Local Laplacian Filter: Pyramid Reconstruction Network for Tone Mapping",
NeurIPS 2023 (arXiv 2310.17190), and its journal version LLF-LUT++, TPAMI 2025 (arXiv 2510.11613), whose code and
weights are the released ones (fengzhang427/LLF-LUT). The defaults are those of the released code.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError, unknown
from filtrun.lut.detail_filter import DetailFilter
from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.lut.memory import LastTensor
from filtrun.lut.pyramid import gaussian_pyramid, laplacian_levels, reconstruct, smallest_side
from filtrun.lut.weight_predictor import WeightPredictor
from filtrun.models.lut3d import check_lut_options, load_exactly, table_penalties


class Table(nn.Module):
    """A basis table under the name it has in the released checkpoints."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.LUT = nn.Parameter(table)


class LLFLUT(nn.Module):
    """RGB image to RGB image of the same size; any height and width, batches of any number.

    1. The low-pass level of the image's pyramid goes to a transformer, which gives a weight map and global weights.
    2. The low-pass level through the basis tables, mixed by the map, is the new low-pass level.
    3. The image through the tables, mixed by the global weights, gives the details; these are remapped level by level
       with parameter maps predicted from coarse to fine.
    4. The output is the reconstruction from both.

    716,277 parameters with 3 levels, 717,339 with 6; without `unused_layers` 551,957 and 553,019.

    Args:
        in_channels: 3, or 1 for grey images, which go through as three equal channels whose outputs are averaged.
        levels: Laplacian levels; 3 for images of about 480 rows, 6 for 4K, so that the low-pass level has about 64x64
            pixels. Images below 2^levels + 1 pixels are padded by repeating their border, and the output is cropped.
        luts: basis tables, 1 or more; the first starts as the identity, the others at zero.
        lut_size: nodes along each axis.
        interpolation: "trilinear" (paper) or "tetrahedral".
        remap: "released", the rule of the code, or "classical", the rule of the fast local Laplacian filter.
        references: discretisation of the tone axis in the remapping, 2 or more.
        blocks: residual blocks of the coarsest parameter map.
        dim: width of the transformer; a multiple of 16.
        drop_path: stochastic depth rate of its deepest blocks, in [0, 1).
        latent: "crop" (released) or "pool"; see `WeightPredictor`. It matters where the low-pass level is not 64x64.
        weight_penalty: which mixing weights the smoothness penalty takes: "map" (released), "point" or "both".
        unused_layers: also make the layers that the released code makes and never uses, so that its checkpoints load
            and parameters count as published. While training they get zero gradients, so that distributed training,
            which waits for all gradients, works.
        bin_margin: cells of ``(1 + bin_margin) / (D - 1)`` as in the released lookup, which has 1e-6; 0 is exact.
        lambda_smooth, lambda_mono: weights of the penalties in `regularisers`.

    Raises:
        UserError: a value outside what is said above.
    """

    tileable = False  # the weights depend on the whole image
    waits = {"hysteresis": "edges of the low-pass image grow along chains whose length is not known before"}

    def __init__(
        self,
        in_channels: int = 3,
        levels: int = 3,
        luts: int = 3,
        lut_size: int = 33,
        interpolation: str = "trilinear",
        remap: str = "released",
        references: int = 10,
        blocks: int = 1,
        dim: int = 32,
        drop_path: float = 0.1,
        latent: str = "crop",
        weight_penalty: str = "map",
        unused_layers: bool = True,
        bin_margin: float = 0.0,
        lambda_smooth: float = 1e-4,
        lambda_mono: float = 10.0,
    ):
        super().__init__()
        check_lut_options("llf_lut", in_channels, luts, lut_size, interpolation, lambda_smooth, lambda_mono)
        _check_ranges(levels, references, blocks, dim, drop_path, bin_margin)
        for name, value, allowed in (
            ("remap", remap, ("released", "classical")),
            ("latent", latent, ("crop", "pool")),
            ("weight_penalty", weight_penalty, ("map", "point", "both")),
        ):
            if value not in allowed:
                raise unknown(f"model.{name}", value, allowed)
        self.in_channels, self.levels, self.luts = in_channels, levels, luts
        self.interpolation, self.bin_margin = interpolation, bin_margin
        self.weight_penalty, self.lambda_smooth, self.lambda_mono = weight_penalty, lambda_smooth, lambda_mono
        self.transformer = WeightPredictor(luts, dim, drop_path, latent, unused_layers)
        self.laplacian_filter = DetailFilter(levels, blocks, remap, references)
        for j in range(luts):
            table = identity_lut(lut_size) if j == 0 else torch.zeros(3, lut_size, lut_size, lut_size)
            self.add_module(f"LUT{j}", Table(table))
        self._energy = LastTensor()

    def tables(self) -> list[Tensor]:
        """The basis tables, each (3, D, D, D) as ``[c, b, g, r]``."""
        return [self.get_parameter(f"LUT{j}.LUT") for j in range(self.luts)]

    def look_up(self, x: Tensor, table: Tensor) -> Tensor:
        """`apply_lut` with this model's interpolation and cell size."""
        end = 1 + self.bin_margin
        return apply_lut(x, table, self.interpolation, domain_max=(end, end, end))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) in [0, 1] to the same shape, not clamped."""
        height, width = x.shape[2:]
        x = x.expand(-1, 3, -1, -1)
        least = smallest_side(self.levels)
        if min(height, width) < least:
            x = F.pad(x, (0, max(0, least - width), 0, max(0, least - height)), mode="replicate")
        low = gaussian_pyramid(x, self.levels)[-1]
        weight_map, weights = self.transformer(low)
        self._remember(weight_map, weights)

        tables = torch.stack(self.tables())
        # all tables as one with 3 luts output channels; table j's colours are weighed by channels 3 j .. 3 j + 2
        toned = weight_map * self.look_up(low, tables.flatten(0, 1))
        toned = toned.unflatten(1, (self.luts, 3)).sum(dim=1)
        # a weighted sum of lookups is one lookup in the weighted sum of the tables
        own = torch.einsum("nj,jcbgr->ncbgr", weights.to(tables.dtype), tables)
        gaussian = gaussian_pyramid(self.look_up(x, own), self.levels)

        y = reconstruct(self.laplacian_filter(gaussian, laplacian_levels(gaussian), toned))
        if self.training and torch.is_grad_enabled():
            for parameter in self.transformer.idle_parameters():
                y = y + 0.0 * parameter.sum()
        y = y[:, :, :height, :width]
        return y if self.in_channels == 3 else y.mean(dim=1, keepdim=True)

    def _remember(self, weight_map: Tensor, weights: Tensor) -> None:
        kept = {"map": [weight_map], "point": [weights], "both": [weight_map, weights]}[self.weight_penalty]
        self._energy.value = None
        if torch.is_grad_enabled():
            self._energy.value = torch.stack([w.square().mean() for w in kept]).sum()

    def regularisers(self) -> dict[str, Tensor]:
        """Penalties of the last forward pass, weighted and ready to add to the loss.

        ``lut_smooth``: lambda_smooth (mean squared mixing weight + sum of the tables' total variation); without a
        forward pass under gradients before, the tables alone. ``lut_mono``: lambda_mono times the sum of their falls.
        """
        return table_penalties(self.tables(), self._energy.value, self.lambda_smooth, self.lambda_mono)

    @classmethod
    def from_official(cls, path: str | os.PathLike[str]) -> LLFLUT:
        """The model with released weights in a file (480p or 4K), in evaluation mode and with their cell size.

        Raises:
            UserError: the file cannot be read, or does not hold such a model.
        """
        from filtrun.models.checkpoint import read_state

        state = read_state(path)
        steps = {name.split(".")[3] for name in state if name.startswith("laplacian_filter.block.high_freq_blocks.")}
        luts = [tensor for name, tensor in state.items() if name.startswith("LUT") and name.endswith(".LUT")]
        if not luts or "transformer.head.weight" not in state:
            raise UserError(f"{path} does not hold an LLF-LUT model: no LUT0 or no transformer in it")
        unused = "transformer.HRconv.weight" in state
        model = cls(
            levels=len(steps) + 1,
            luts=len(luts),
            lut_size=luts[0].shape[-1],
            unused_layers=unused,
            bin_margin=1e-6,
        )
        load_exactly(model, state, path)
        return model.eval()


def _check_ranges(levels: int, references: int, blocks: int, dim: int, drop_path: float, bin_margin: float) -> None:
    ranges = {"levels": (levels, 1, 12), "references": (references, 2, 256), "blocks": (blocks, 0, 64)}
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise UserError(f"model.{name}={value} is out of range; allowed is [{low}, {high}]")
    if dim < 16 or dim % 16:
        raise UserError(f"model.dim={dim} must be a positive multiple of 16, the most attention heads of a stage")
    if not 0 <= drop_path < 1:
        raise UserError(f"model.drop_path={drop_path} is out of range; allowed is [0, 1)")
    if not 0 <= bin_margin <= 0.01:
        raise UserError(f"model.bin_margin={bin_margin} is out of range; allowed is [0, 0.01]")
