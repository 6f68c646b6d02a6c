"""Bits of masks, and tensors with zeros: what comes back is what went in, in fewer bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from filtrun.bits import pack_bits, pack_zeros, unpack_bits, unpack_zeros


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 1, 3), (17,)])
def test_bits_are_those_of_numpy_and_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.numpy().tolist() == np.packbits(mask.numpy().flatten()).tolist()
    assert torch.equal(unpack_bits(packed, shape), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_zeros_are_packed_without_loss(dtype):
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) < 0.9] = 0
    tensor[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-30], dtype=dtype)
    packed = pack_zeros(tensor)
    assert isinstance(packed, dict)
    kept = packed["values"].numel()
    assert kept * tensor.element_size() + 512 == sum(packed[k].numel() * packed[k].element_size() for k in
                                                     ("values", "nonzero"))  # fmt: skip
    back = unpack_zeros(packed)
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_what_would_not_get_smaller_stays():
    dense, small, whole = torch.ones(100, 100), torch.zeros(20), torch.zeros(1000, dtype=torch.int64)
    for tensor in (dense, small, whole, torch.zeros(0)):
        assert pack_zeros(tensor) is tensor and unpack_zeros(tensor) is tensor
