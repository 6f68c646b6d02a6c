"""8-bit lookups against integer arithmetic pixel by pixel, and quantised layers against torch's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from filtrun.lut.quantized import SHIFTS, apply_8bit, quantized_linear, to_8bit


def slow(colour: list[int], curves: torch.Tensor, lut: torch.Tensor, shift: int) -> list[int]:
    """One pixel in Python's integers."""

    def split(value: int) -> tuple[int, int]:
        return value >> shift, (value << (8 - shift)) - (value >> shift) * 255

    between = []
    for value, curve in zip(colour, curves.tolist(), strict=True):
        k, inside = split(value)
        between.append(((255 - inside) * curve[k] + inside * curve[k + 1]) // 255)
    cells = [split(value) for value in between]
    out = []
    for table in lut.tolist():
        total = 0
        for r, g, b in itertools.product((0, 1), repeat=3):
            weight = 1
            for (_, inside), bit in zip(cells, (r, g, b), strict=True):
                weight *= inside if bit else 255 - inside
            total += weight * table[cells[2][0] + b][cells[1][0] + g][cells[0][0] + r]
        out.append(total // 255**3)
    return out


@pytest.mark.parametrize("size", sorted(SHIFTS))
def test_equals_integers(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    image, curves, lut = (
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        for shape in ((2, 3, 5, 6), (2, 3, size), (2, 3, size, size, size))
    )
    image[0, :, 0, 0], image[0, :, 0, 1] = 0, 255
    y = apply_8bit(image, curves, lut)
    for n, i, j in itertools.product(range(2), range(5), range(6)):
        assert y[n, :, i, j].tolist() == slow(image[n, :, i, j].tolist(), curves[n], lut[n], SHIFTS[size])


@pytest.mark.parametrize("size", sorted(SHIFTS))
def test_white_and_black_are_exact(size: int) -> None:
    line = to_8bit(torch.arange(size) / (size - 1)).expand(1, 3, -1)
    lut = torch.full((1, 3, size, size, size), 255, dtype=torch.uint8)
    lut[:, :, 0, 0, 0] = 7
    ends = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert apply_8bit(ends, line, lut)[0, :, 0].tolist() == [[7, 255]] * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="torch's x86 kernels are needed")
@pytest.mark.parametrize(("inputs", "outputs", "offset"), [(64, 51, 0.0), (3, 90, 0.4), (16, 3, -2.0)])
def test_layers_equal_torchs_dynamic_quantisation(inputs: int, outputs: int, offset: float) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(inputs)
    layer, x = nn.Linear(inputs, outputs), torch.randn(4, inputs) * 0.3 + offset
    theirs = quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    expected = torch.cat([theirs(row[None]) for row in x])
    assert torch.allclose(quantized_linear(layer, x), expected, atol=1e-6)
    assert (expected - layer(x)).abs().max() > 1e-4  # it does quantise


def test_an_empty_range_is_no_division_by_zero() -> None:
    layer = nn.Linear(4, 2)
    assert torch.equal(quantized_linear(layer, torch.zeros(1, 4)), layer.bias[None])
