"""Weights of 1 to 8 bits: code book, fake quantisation in training, and the packed bytes that are kept.

Mathematics of "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy" (Jie et
al., ICCV 2023, arXiv 2307.16867; official code JieShibo/PETL-ViT, ``binary_adapter/utils.py``, whose file layout this
is). A matrix is standardised by its own mean and standard deviation and each entry replaced by the nearest of 2^b
values that suit a standard normal; mean and deviation give the scale back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.constants import constant
from filtrun.errors import UserError

BITS = (1, 2, 4, 8)
EPS = 1e-5
"""Added to the standard deviation, so that a constant matrix does not divide by zero (``utils.py``)."""


@functools.cache
def codebook(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(2^bits values, 2^bits - 1 borders between them), both increasing: the L1-optimal code of a standard normal.

    500 rounds from zero of: borders half-way between values, values at the median of their cell (section 3.3).
    One bit: values +-0.674490, border 0.
    """
    values = torch.zeros(2**bits, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    borders = values[1:]
    for _ in range(500):
        borders = (values[1:] + values[:-1]) / 2
        mass = torch.cat([ends[:1], torch.special.ndtr(borders), ends[1:]])
        values = torch.special.ndtri((mass[1:] + mass[:-1]) / 2)
    return tuple(values.tolist()), tuple(borders.tolist())


def encode(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes int64 in [0, 2^bits), mean, standard deviation) of a matrix of any shape with at least two entries.

    The deviation is the unbiased one; an entry on a border gets the lower code.
    """
    mean, std = weight.mean(), weight.std()
    borders = constant(codebook(bits)[1], weight.dtype, weight.device)
    codes = torch.bucketize(((weight - mean) / (std + EPS)).detach(), borders)
    return codes, mean, std


def decode(codes: Tensor, mean: Tensor, std: Tensor, bits: int) -> Tensor:
    """The weights that codes stand for: value * deviation + mean, in the type of `mean`."""
    values = constant(codebook(bits)[0], mean.dtype, codes.device)
    return values[codes] * std + mean


def fake_quantise(weight: Tensor, bits: int) -> Tensor:
    """The weight as it will be decoded, with the gradient of a straight-through quantiser (eq. 7).

    The rounding has the gradient of the identity; mean and deviation have their own.
    """
    codes, mean, std = encode(weight, bits)
    normal = (weight - mean) / (std + EPS)
    values = constant(codebook(bits)[0], weight.dtype, weight.device)
    return (values[codes] + (normal - normal.detach())) * std + mean


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape) as uint8 (ceil(n * bits / 8),), the first code in the lowest bits of the first byte."""
    each = 8 // bits
    flat = F.pad(codes.flatten(), (0, -codes.numel() % each)).view(-1, each)
    shifts = torch.arange(each, device=codes.device) * bits
    return (flat << shifts).sum(1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, int64, of what `pack_codes` made."""
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    return ((packed.long()[:, None] >> shifts) & (2**bits - 1)).flatten()[:count]


def packed_size(count: int, bits: int) -> int:
    """Bytes of a matrix with `count` entries: its codes, and mean and deviation as 4-byte floats."""
    return -(-count * bits // 8) + 8


class Quantised(nn.Module):
    """Mix-in of a layer whose forward pass sees its weight in `bits` bits.

    While it trains, `weight` holds ordinary numbers; once fixed, the decoded ones, and `kept` the bytes they are from
    (numbers decoded once have another mean: coding them again would give other ones).
    """

    bits: int
    weight: Tensor
    kept: Tensor | None

    def seen(self) -> Tensor:
        """The weight as the forward pass sees it."""
        if self.kept is not None:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            return fake_quantise(self.weight, self.bits)

    @torch.no_grad()
    def fix(self) -> None:
        """Keep the decoded numbers in `weight` for good."""
        self.unpack(self.packed())

    @torch.no_grad()
    def packed(self) -> Tensor:
        """The layer in bytes, uint8 (`packed_bytes`,): codes, mean, deviation."""
        if self.kept is not None:
            return self.kept
        codes, mean, std = encode(self.weight, self.bits)
        stats = torch.stack([mean, std]).float().cpu()
        return torch.cat([pack_codes(codes, self.bits).cpu(), stats.view(torch.uint8)])

    @property
    def packed_bytes(self) -> int:
        """Length of what `packed` gives."""
        return packed_size(self.weight.numel(), self.bits)

    @torch.no_grad()
    def unpack(self, data: Tensor) -> None:
        """Take the weight from what `packed` gave; it is fixed from then on."""
        self.kept = data.clone()
        stats = data[-8:].clone().view(torch.float32).to(self.weight)
        codes = unpack_codes(data[:-8].to(self.weight.device), self.bits, self.weight.numel())
        self.weight.copy_(decode(codes, stats[0], stats[1], self.bits).view_as(self.weight))


class QuantisedLinear(Quantised, nn.Linear):
    """``nn.Linear`` without bias, its weight in `bits` bits."""

    def __init__(self, inputs: int, outputs: int, bits: int = 1) -> None:
        nn.Linear.__init__(self, inputs, outputs, bias=False)
        self.bits, self.kept = bits, None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.seen())


class QuantisedConv(Quantised, nn.Conv2d):
    """1x1 ``nn.Conv2d`` without bias, its weight in `bits` bits."""

    def __init__(self, inputs: int, outputs: int, bits: int = 1, stride: Any = 1) -> None:
        nn.Conv2d.__init__(self, inputs, outputs, 1, stride=stride, bias=False)
        self.bits, self.kept = bits, None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.seen(), stride=self.stride)


def quantised_layers(model: nn.Module) -> Iterator[Quantised]:
    """The layers with few bits of a model, in the order in which files hold them."""
    return (m for m in model.modules() if isinstance(m, Quantised))


def dump(model: nn.Module, floats: list[Tensor]) -> bytes:
    """The official file: every quantised layer's bytes, then `floats` (the head's tensors) as 4-byte numbers."""
    parts = [layer.packed() for layer in quantised_layers(model)]
    parts += [t.detach().float().contiguous().flatten().cpu().view(torch.uint8) for t in floats]
    return b"".join(part.numpy().tobytes() for part in parts)


@torch.no_grad()
def load(model: nn.Module, floats: list[Tensor], data: bytes) -> None:
    """Put what `dump` gave (or the official code wrote) into a model with the same layers.

    Raises UserError when the number of bytes does not fit.
    """
    layers = list(quantised_layers(model))
    expected = sum(layer.packed_bytes for layer in layers) + 4 * sum(t.numel() for t in floats)
    if len(data) != expected:
        raise UserError(f"{len(data)} bytes of quantised adapters do not fit this model, which needs {expected}")
    rest = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    for layer in layers:
        layer.unpack(rest[: layer.packed_bytes])
        rest = rest[layer.packed_bytes :]
    for tensor in floats:
        size = 4 * tensor.numel()
        tensor.copy_(rest[:size].clone().view(torch.float32).view_as(tensor))
        rest = rest[size:]
