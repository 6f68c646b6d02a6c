"""Image-adaptive 3D look-up tables: a small CNN mixes three learned tables into one for each image.

Source: Zeng, Cai, Li, Cao & Zhang, "Learning Image-adaptive 3D Lookup Tables for High Performance Photo Enhancement in
Real-time", TPAMI 2020 (arXiv 2009.14468), code HuiZeng/Image-Adaptive-3DLUT.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError, unknown
from filtrun.lut.interpolation import apply_lut, identity_lut
from filtrun.lut.memory import LastTensor
from filtrun.lut.regularise import monotonicity, total_variation
from filtrun.lut.schemes import SCHEMES

WIDTHS = (16, 32, 64, 128, 128)
SIDE = 256


class _Resize(nn.Module):
    """To 256x256, bilinear without antialiasing, as the weights were trained."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


class Classifier(nn.Module):
    """(N, 3, H, W) to mixing weights (N, luts): five strided convolutions on a 256x256 copy of the image."""

    def __init__(self, luts: int, dropout: float):
        super().__init__()
        layers: list[nn.Module] = [_Resize()]
        inputs = 3
        for step, width in enumerate(WIDTHS):
            layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            if step < len(WIDTHS) - 1:
                layers.append(nn.InstanceNorm2d(width, affine=True))
            inputs = width
        last = nn.Conv2d(inputs, luts, SIDE // 2 ** len(WIDTHS))
        self.model = nn.Sequential(*layers, nn.Dropout(dropout), last)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.InstanceNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.ones_(last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(1)


class LUT3D(nn.Module):
    """RGB image to RGB image of the same size, through a table made for it: ``T = sum_j w_j(x) T_j``, ``y = T(x)``.

    T_0 starts as the identity, the others at zero. 593,516 parameters with the defaults. Tensor names (``lut0``, ...,
    ``classifier.model.1.weight``, ...) are those of the converted released weights, so that file loads as it is.

    Args:
        in_channels: 3, or 1 for grey images, which go through as three equal channels whose outputs are averaged.
        luts: number of basis tables, 1 or more.
        lut_size: nodes along each axis, 2 or more.
        dropout: before the classifier's last layer, in [0, 1).
        interpolation: "trilinear" (paper) or "tetrahedral".
        bin_margin: the released lookup divides an axis into D - 1 cells of ``(1 + bin_margin) / (D - 1)``, so that
            white stays inside the last cell: 1e-4 in its first version, 1e-6 in its later one. 0 is exact.
        lambda_smooth, lambda_mono: weights of the penalties in `regularisers`.

    Raises:
        UserError: a value outside what is said above.
    """

    tileable = False  # the table depends on the whole image

    def __init__(
        self,
        in_channels: int = 3,
        luts: int = 3,
        lut_size: int = 33,
        dropout: float = 0.5,
        interpolation: str = "trilinear",
        bin_margin: float = 0.0,
        lambda_smooth: float = 1e-4,
        lambda_mono: float = 10.0,
    ):
        super().__init__()
        check_lut_options("lut3d", in_channels, luts, lut_size, interpolation, lambda_smooth, lambda_mono)
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout={dropout} is out of range; allowed is [0, 1)")
        if not 0 <= bin_margin <= 0.01:
            raise UserError(f"model.bin_margin={bin_margin} is out of range; allowed is [0, 0.01]")
        self.in_channels, self.luts = in_channels, luts
        self.interpolation, self.bin_margin = interpolation, bin_margin
        self.lambda_smooth, self.lambda_mono = lambda_smooth, lambda_mono
        self.classifier = Classifier(luts, dropout)
        for j in range(luts):
            table = identity_lut(lut_size) if j == 0 else torch.zeros(3, lut_size, lut_size, lut_size)
            self.register_parameter(f"lut{j}", nn.Parameter(table))
        self._energy = LastTensor()

    def tables(self) -> list[Tensor]:
        """The basis tables, each (3, D, D, D) as ``[c, b, g, r]``."""
        return [self.get_parameter(f"lut{j}") for j in range(self.luts)]

    def table_for(self, x: Tensor) -> Tensor:
        """The tables (N, 3, D, D, D) that `forward` uses for the images x (N, 3, H, W), ready for .cube files."""
        weights = self.classifier(x)
        self._energy.value = weights.square().mean() if torch.is_grad_enabled() else None
        return torch.einsum("nj,jcbgr->ncbgr", weights.to(self.lut0.dtype), torch.stack(self.tables()))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) in [0, 1] to the same shape, not clamped; every size works."""
        rgb, end = x.expand(-1, 3, -1, -1), 1 + self.bin_margin
        y = apply_lut(rgb, self.table_for(rgb), self.interpolation, domain_max=(end, end, end))
        return y if self.in_channels == 3 else y.mean(dim=1, keepdim=True)

    def regularisers(self) -> dict[str, Tensor]:
        """Penalties of the last forward pass, weighted and ready to add to the loss.

        ``lut_smooth``: lambda_smooth (mean of the squared mixing weights + sum of `total_variation`); without a forward
        pass under gradients before, the tables alone. ``lut_mono``: lambda_mono times the sum of `monotonicity`.
        """
        return table_penalties(self.tables(), self._energy.value, self.lambda_smooth, self.lambda_mono)

    @classmethod
    def from_official(cls, path: str | os.PathLike[str]) -> LUT3D:
        """The model with released weights, in evaluation mode and with their cell size.

        Args:
            path: a file, where names of the released code (``LUT0.LUT``, ``model.1.weight``) are understood beside the
                model's own, or a folder with the two released files, LUTs.pth and classifier.pth.

        Raises:
            UserError: a file cannot be read, or does not hold such a model.
        """
        from filtrun.models.checkpoint import read_state

        if Path(path).expanduser().is_dir():
            files = [Path(path).expanduser() / name for name in ("LUTs.pth", "classifier.pth")]
            found = {**read_state(files[0], nested=True), **read_state(files[1])}
        else:
            found = read_state(path)
        state = {_own_name(name): tensor for name, tensor in found.items()}
        luts = sum(name.startswith("lut") for name in state)
        if "lut0" not in state or "classifier.model.1.weight" not in state:
            raise UserError(f"{path} does not hold an image-adaptive 3D LUT model: no lut0 or no classifier in it")
        model = cls(luts=luts, lut_size=state["lut0"].shape[-1], bin_margin=1e-4)
        load_exactly(model, state, path)
        return model.eval()


def _own_name(name: str) -> str:
    if name.endswith(".LUT"):
        return "lut" + name.removeprefix("LUT")[:-4]
    return f"classifier.{name}" if name.startswith("model.") else name


def load_exactly(model: nn.Module, state: dict[str, Tensor], path: object) -> None:
    """Load `state`, or say in one line why it does not fit."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [n for n, t in own.items() if t.shape != state[n].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit {type(model).__name__}: {', '.join(wrong[:3])}{more} differ")
    model.load_state_dict(state)


def table_penalties(
    tables: list[Tensor], energy: Tensor | None, lambda_smooth: float, lambda_mono: float
) -> dict[str, Tensor]:
    """The two weighted penalties on basis tables; `energy` is the mean square of their mixing weights, if known."""
    smooth = torch.stack([total_variation(table) for table in tables]).sum()
    if energy is not None:
        smooth = smooth + energy
    mono = torch.stack([monotonicity(table) for table in tables]).sum()
    return {"lut_smooth": lambda_smooth * smooth, "lut_mono": lambda_mono * mono}


def check_lut_options(
    model: str, in_channels: int, luts: int, lut_size: int, interpolation: str, lambda_smooth: float, lambda_mono: float
) -> None:
    """Raise UserError for an option that both table models share and that is out of range."""
    if in_channels not in (1, 3):
        raise UserError(f"model={model} needs RGB or grey images: the data has {in_channels} channels, not 3 or 1")
    if luts < 1:
        raise UserError(f"model.luts={luts} is out of range; allowed is [1, inf]")
    if not 2 <= lut_size <= 256:
        raise UserError(f"model.lut_size={lut_size} is out of range; allowed is [2, 256]")
    if interpolation not in SCHEMES:
        raise unknown("model.interpolation", interpolation, SCHEMES)
    for name, value in (("lambda_smooth", lambda_smooth), ("lambda_mono", lambda_mono)):
        if not value >= 0:
            raise UserError(f"model.{name}={value} is out of range; allowed is [0, inf]")
