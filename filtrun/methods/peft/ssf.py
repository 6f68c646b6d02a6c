"""SSF: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning (NeurIPS 2022, arXiv 2210.08823;
official code dongzelian/SSF).

Behind every operation of the frozen network, y = gamma * x + beta per channel; only gamma, beta and the head train. In
the end both are folded into the layer before them (the paper's re-parameterisation), and nothing is left. There is no
official code for folding; it is checked here against the unfolded network.

Where the official code picks the channel dimension by comparing sizes, the last one first, here the layer says it: a
feature map whose width equals its channel count is scaled by channels too. RMS norms and norms without a scale of
their own have nothing to fold into and are left alone. Layers that treat their weight before use (sub-classes of
torch's, ``nn.MultiheadAttention``) get the same numbers through their weight and bias from the start.

Alone, on any model:

>>> ssf = SSF().attach(model)    # doctest: +SKIP
>>> ...                          # train the parameters that require a gradient
>>> ssf.merge()                  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.method import Method, train_head
from filtrun.options import check_options, opt
from filtrun.surgery import (
    CONVS,
    NORMS,
    base_tensor,
    behaves,
    check_targets,
    check_trains,
    choose,
    put_behind,
    put_into,
    take_off,
    take_out,
    write,
)  # fmt: skip

if TYPE_CHECKING:
    from filtrun.context import Run

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear, nn.MultiheadAttention),
    "conv": CONVS,
    "norm": NORMS,
}
KNOWN_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm,
)  # fmt: skip


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, dim: int = -1) -> Tensor:
    """scale * x + shift along dimension `dim` of `x`; `scale` and `shift` have shape (x.shape[dim],)."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


def scaled_weight(weight: Tensor, scale: Tensor, transposed_groups: int = 0) -> Tensor:
    """The weight whose layer gives `scale` times the output, per output channel.

    Args:
        weight: (out, ...), of a linear layer, convolution or norm; (..., C) of a layer norm with C scales; a transposed
            convolution's (in, out / groups, ...) with `transposed_groups` = groups.
        scale: (out,).
    """
    if transposed_groups:
        parts = weight.view(transposed_groups, -1, *weight.shape[1:])
        shape = (transposed_groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        return (parts * scale.view(shape)).view(weight.shape)
    if weight.shape[0] == len(scale):
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight * scale


def channels_of(layer: nn.Module) -> tuple[int, int] | None:
    """(channels, their dimension) of what a layer gives; None for classes whose forward pass is not known."""
    made: Any = layer
    if behaves(layer, CONVS):
        return made.out_channels, -1 - len(made.kernel_size)
    if behaves(layer, (nn.Linear,)):
        return made.out_features, -1
    if behaves(layer, KNOWN_NORMS):
        last = behaves(layer, (nn.LayerNorm,))
        return made.weight.shape[-1], -1 if last else 1
    return None


class ScaleShift(nn.Module):
    """gamma ~ N(1, std^2) and beta ~ N(0, std^2) for `channels` channels along `dim` (std 0: the identity)."""

    def __init__(self, channels: int, dim: int, std: float, like: Tensor | None) -> None:
        super().__init__()
        assert like is not None
        self.dim = dim
        self.scale = nn.Parameter(like.new_ones(channels))
        self.shift = nn.Parameter(like.new_zeros(channels))
        if std:
            nn.init.normal_(self.scale, mean=1.0, std=std)
            nn.init.normal_(self.shift, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return scale_shift(x, self.scale, self.shift, self.dim)

    def behind(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """What the forward pass of a layer gives instead of `output`."""
        return self(output)


class _Scaled(nn.Module):
    """A weight (or, with `bias`, a bias) as it is after folding."""

    def __init__(self, part: ScaleShift, bias: bool) -> None:
        super().__init__()
        self.part, self.bias = part, bias

    def forward(self, tensor: Tensor) -> Tensor:
        part = self.part
        return tensor * part.scale + part.shift if self.bias else scaled_weight(tensor, part.scale)


@dataclass
class _Place:
    """Where one pair of gamma and beta acts: behind `layer` (`hook`), or in tensors of `owner` (`orders`)."""

    owner: nn.Module
    part: ScaleShift
    weight: str
    bias: str
    hook: Any = None
    inside: tuple[_Scaled, ...] = ()
    orders: tuple[list[str], ...] = ()


@dataclass
class SSF(Method):
    """Train a scale and a shift behind every operation, then fold them into the weights (Lian et al., 2210.08823)."""

    targets: Any = opt("all", "operations to adapt: all, linear, conv, norm, attention, a name, the end of one, a "
                       "regular expression, or a list of these", source="official code: all")  # fmt: skip
    init: str = opt("normal", "start of scale and shift", choices=("normal", "identity"), source="official code")
    init_std: float = opt(0.02, "standard deviation at the start, around 1 and 0", low=0, source="official code")
    head: bool = opt(True, "train the classification head itself instead of adapting it", source="official code")

    trains: ClassVar = "part"
    identity_at_start: ClassVar = False
    paper: ClassVar[str] = "SSF, arXiv 2210.08823 (NeurIPS 2022)"

    def __post_init__(self) -> None:
        check_targets(self.targets, KINDS, "method.ssf.targets")
        check_options(self, "method.ssf")
        self.places: list[_Place] = []

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def attach(self, model: nn.Module, skip: Collection[nn.Parameter] = ()) -> SSF:
        """Freeze `model` and put trainable scales and shifts into it; returns self. `skip`: tensors to leave alone."""
        model.requires_grad_(False)
        self._insert(self.layers(model, skip))
        return self

    def layers(
        self, model: nn.Module, skip: Collection[nn.Parameter] = (), weights: Mapping[str, nn.Parameter] | None = None
    ) -> dict[str, nn.Module]:
        """Base name -> layer to adapt. Raises UserError when there is none."""
        able = choose(model, self.targets, KINDS, "method.ssf.targets", skip, weights)
        # nothing is known about the channels of a sub-class of a transposed convolution
        return {n: m for n, m in able.items() if channels_of(m) is not None or not isinstance(m, CONVS[3:])}

    def _insert(self, layers: Mapping[str, nn.Module]) -> None:
        std = self.init_std if self.init == "normal" else 0.0
        for layer in layers.values():
            where = channels_of(layer)
            if where is not None:
                part = ScaleShift(*where, std, base_tensor(layer, "weight"))
                self.places.append(_Place(layer, part, "weight", "bias", put_behind(layer, "ssf", part)))
            elif isinstance(layer, nn.MultiheadAttention):
                if layer.in_proj_weight is not None:
                    self._put_inside(layer, "in_proj_weight", "in_proj_bias", std)
                self._put_inside(layer.out_proj, "weight", "bias", std)
            else:
                self._put_inside(layer, "weight", "bias", std)

    def _put_inside(self, owner: nn.Module, weight: str, bias: str, std: float) -> None:
        tensor = base_tensor(owner, weight)
        assert tensor is not None
        part = ScaleShift(tensor.shape[0], 0, std, tensor)
        if base_tensor(owner, bias) is None:
            owner.register_parameter(bias, nn.Parameter(tensor.new_zeros(len(tensor)), requires_grad=False))
        inside = _Scaled(part, False), _Scaled(part, True)
        orders = put_into(owner, weight, inside[0]), put_into(owner, bias, inside[1])
        self.places.append(_Place(owner, part, weight, bias, None, inside, orders))

    @torch.no_grad()
    def merge(self) -> None:
        """Fold every scale and shift into the layer before it; they are gone. A layer without a bias gets one."""
        for place in reversed(self.places):
            scale, shift = place.part.scale.double(), place.part.shift.double()
            if place.hook is None:
                weight, bias = (
                    take_out(place.owner, tensor, part, order)
                    for tensor, part, order in zip((place.weight, place.bias), place.inside, place.orders, strict=True)
                )
                groups = 0
            else:
                take_off(place.owner, "ssf", place.hook)
                weight, bias = base_tensor(place.owner, "weight"), base_tensor(place.owner, "bias")
                made: Any = place.owner
                groups = made.groups if behaves(place.owner, CONVS[3:]) else 0
                if bias is None:
                    like = place.part.shift
                    place.owner.register_parameter("bias", nn.Parameter(torch.zeros_like(like), requires_grad=False))
                    bias = base_tensor(place.owner, "bias")
            if weight is not None:
                write(weight, scaled_weight(weight.double(), scale, groups))
            if bias is not None:
                write(bias, bias.double() * scale + shift)
        self.places = []

    def parameters(self) -> list[nn.Parameter]:
        """All scales and shifts."""
        return [p for place in self.places for p in (place.part.scale, place.part.shift)]

    # -- hooks -----------------------------------------------------------------------------------------------------
    def edit_model(self, run: Run) -> None:
        layers = self.layers(run.model, run.task.head(run.model) if self.head else (), run.weights)
        self._insert(layers)
        base = {id(p) for p in run.weights.values()}
        run.claim(self, [p for m in layers.values() for p in m.parameters() if id(p) in base], "scale")
        if self.head:
            train_head(run)

    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        check_trains(run, self, self.parameters())
        return [{"params": self.parameters(), "weight_decay": 0.0}]  # as timm treats all 1-D tensors

    def finish(self, run: Run) -> None:
        self.merge()

    def report(self, run: Run) -> dict[str, float | int | str]:
        return {"adapted_layers": len(self.places), "adapter_params": sum(p.numel() for p in self.parameters())}
