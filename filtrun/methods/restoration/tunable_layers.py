"""Convolutions whose kernel is turned by knobs at run time, for any convolutional model.

Maggioni, Tanay, Babiloni, McDonagh, Leonardis, "Tunable Convolutions with Parametric Multi-Loss Optimization", CVPR
2023 (arXiv 2304.00898). A layer holds a bank of kernels K_p, one for each knob; the kernel it uses is ``sum_p a_p K_p``
with a = px, the knobs, or a = A px + c, a small linear layer of its own.

>>> make_tunable(model, ["denoise", "keep"])  # doctest: +SKIP
>>> set_knobs(model, {"denoise": 0.3})        # doctest: +SKIP
>>> y = model(x)                              # doctest: +SKIP
>>> bake(model)                               # a plain model at this setting  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filtrun.errors import UserError, unknown

NAME = "knobs"
"""Attribute of the model under which its `Knobs` are."""


class Knobs(nn.Module):
    """The state of a model's knobs, shared by all its tunable layers.

    `setting` (P,) is what every image gets; `drawn` (N, P), where it is set, holds one row for each image of the batch.
    """

    setting: Tensor

    def __init__(self, names: Sequence[str], simplex: bool = True) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise UserError(f"knobs={list(names)} must be one or more different names")
        self.names, self.simplex = list(names), simplex
        self.drawn: Tensor | None = None
        self.register_buffer("setting", torch.full((len(names),), 1 / len(names)))

    def values(self) -> Tensor:
        """(1, P), or (N, P) while a row for each image is set."""
        return self.setting[None] if self.drawn is None else self.drawn

    @torch.no_grad()
    def set(self, values: Mapping[str, float]) -> None:
        """Turn the named knobs. On the simplex the others share what is left to 1 equally, else they stay as they are.

        Raises UserError for an unknown name, a value outside [0, 1], or values that cannot sum to 1 on the simplex.
        """
        for name, value in values.items():
            if name not in self.names:
                raise unknown("knob", name, self.names)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"knobs.{name}={value!r} must be a number in [0, 1]")
        others = [i for i, name in enumerate(self.names) if name not in values]
        left = 1 - sum(values.values())
        if self.simplex and (left < -1e-6 or (not others and abs(left) > 1e-6)):
            told = ", ".join(f"knobs.{name}={value:g}" for name, value in values.items())
            raise UserError(f"{told}: the knobs of this model sum to 1, these to {1 - left:g}")
        self.drawn = None
        for name, value in values.items():
            self.setting[self.names.index(name)] = float(value)
        if self.simplex and values:
            for i in others:
                self.setting[i] = max(left, 0.0) / len(others)

    def forward(self, x: Tensor) -> Tensor:
        """Nothing happens here; a Sequential calls all that it holds."""
        return x

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:.3g}" for name, value in zip(self.names, self.setting.tolist(), strict=True))


class TunableConv2d(nn.Module):
    """A convolution with a bank of W = P * expand kernels, mixed for every image by the knobs.

    Args:
        conv: the plain convolution it replaces; stride, padding (any mode), dilation, groups and bias are taken over.
        knobs: the shared state.
        mode: ``linear``: the knobs are the weights of the kernels; ``mlp``: a trained linear layer makes the weights.
        expand: kernels for each knob; above 1 the trained layer is there in both modes, as in the official code.
        start: ``copy``: every kernel is the plain one and the trained layer begins as a = px / expand, so on the
            simplex nothing changes at first; ``own``: every kernel is initialised on its own like a plain one;
            ``official``: as the released layer, whose kernels are sqrt(W * out) times smaller than a plain one's.

    `weight` is (W, out, in / groups, k, k), `bias` (W, out) or None.
    """

    def __init__(self, conv: nn.Conv2d, knobs: Knobs, mode: str = "mlp", expand: int = 1, start: str = "copy") -> None:
        super().__init__()
        count = len(knobs.names)
        self.size, self.plain = count * expand, (conv,)  # in a tuple, so that it is no part of this module
        self.shared = (knobs,)
        like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.weight = nn.Parameter(conv.weight.detach().repeat(self.size, 1, 1, 1, 1))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().repeat(self.size, 1))
        self.mixer = nn.Linear(count, self.size, **like) if mode == "mlp" or expand > 1 else None
        if start == "own":
            self._fill([math.prod(self.weight.shape[2:])] * 2)
        elif start == "official":  # the fan-in of the six-dimensional tensor counts kernels and outputs too
            self._fill([math.prod(self.weight.shape)] * 2)
        elif self.mixer is not None:
            with torch.no_grad():
                self.mixer.weight.copy_(torch.eye(count, **like).repeat(expand, 1) / expand)
                self.mixer.bias.zero_()

    @torch.no_grad()
    def _fill(self, fans: list[int]) -> None:
        """Uniform in +-1/sqrt(fan-in), as torch starts convolutions and their biases."""
        self.weight.uniform_(-1 / math.sqrt(fans[0]), 1 / math.sqrt(fans[0]))
        if self.bias is not None:
            self.bias.uniform_(-1 / math.sqrt(fans[1]), 1 / math.sqrt(fans[1]))

    def mixed(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels (N, out, in / groups, k, k) and biases (N, out) for knobs (N, P)."""
        weights = values.to(self.weight.dtype)
        if self.mixer is not None:
            weights = self.mixer(weights)
        kernel = (weights @ self.weight.flatten(1).to(weights.dtype)).view(len(weights), *self.weight.shape[1:])
        return kernel, None if self.bias is None else weights @ self.bias.to(weights.dtype)

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.plain[0]
        kernel, bias = self.mixed(self.shared[0].values())
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        if len(kernel) == 1:
            only = None if bias is None else bias[0]
            return F.conv2d(x, kernel[0], only, conv.stride, padding, conv.dilation, conv.groups)
        n, c, h, w = x.shape
        if n != len(kernel):
            raise RuntimeError(f"knobs were drawn for {len(kernel)} images, but this layer sees {n}")
        # one call for the whole batch: every image is a group of channels
        y = F.conv2d(
            x.reshape(1, n * c, h, w),
            kernel.flatten(0, 1),
            None if bias is None else bias.flatten(),
            conv.stride, padding, conv.dilation, n * conv.groups,
        )  # fmt: skip
        return y.view(n, -1, *y.shape[-2:])

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The plain convolution, the very object that was replaced, with the kernel of the present setting."""
        conv = self.plain[0]
        kernel, bias = self.mixed(self.shared[0].setting[None])
        conv.weight.data = kernel[0].to(self.weight.dtype)
        if conv.bias is not None and bias is not None:
            conv.bias.data = bias[0].to(self.weight.dtype)
        return conv

    def extra_repr(self) -> str:
        return f"{self.plain[0].extra_repr()}, kernels={self.size}"


def make_tunable(
    model: nn.Module,
    names: Sequence[str],
    *,
    mode: str = "mlp",
    expand: int = 1,
    start: str = "copy",
    simplex: bool = True,
) -> Knobs:
    """Put a `TunableConv2d` in place of every plain ``nn.Conv2d`` of `model` and return the shared knobs.

    Sub-classes and parametrised convolutions treat their weight before use and stay as they are. Raises UserError when
    the model has no plain convolution or already has knobs.
    """
    if hasattr(model, NAME):
        raise UserError(f"{type(model).__name__} has knobs already")
    found: list[tuple[nn.Module, str, nn.Conv2d]] = [
        (parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if type(child) is nn.Conv2d
    ]
    if not found:
        raise UserError(f"method=tunable_conv: {type(model).__name__} has no plain Conv2d to turn")
    knobs = Knobs(names, simplex).to(found[0][2].weight.device)
    made: dict[int, TunableConv2d] = {}
    for parent, attribute, conv in found:  # a convolution that is used in two places stays one
        if id(conv) not in made:
            made[id(conv)] = TunableConv2d(conv, knobs, mode, expand, start).train(conv.training)
        setattr(parent, attribute, made[id(conv)])
    model.add_module(NAME, knobs)
    return knobs


def knobs_of(model: nn.Module) -> Knobs:
    """The knobs of a model; UserError when it has none."""
    knobs = getattr(model, NAME, None)
    if not isinstance(knobs, Knobs):
        raise UserError(f"{type(model).__name__} has no knobs; train it with method=tunable_conv (fixed=null)")
    return knobs


def set_knobs(model: nn.Module, values: Mapping[str, float]) -> None:
    """Turn the knobs of a tunable model: ``set_knobs(model, {"denoise": 0.3})``; see `Knobs.set`."""
    knobs_of(model).set(values)


def bake(model: nn.Module) -> None:
    """Put plain convolutions with the kernels of the present setting back into the model, and take its knobs away."""
    knobs_of(model)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, TunableConv2d):
                setattr(parent, attribute, child.merged())
    delattr(model, NAME)
