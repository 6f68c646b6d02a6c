"""Operators against their own dense matrices: adjoint, the Moore-Penrose conditions, and what each one measures."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from filtrun.degrade.bicubic import imresize
from filtrun.errors import UserError
from filtrun.inverse.operators import (
    Blur,
    Mask,
    Rows,
    Separable,
    downsample,
    gaussian_kernel,
    gaussian_rows,
    hadamard_rows,
    identity,
    named_operator,
    uniform_kernel,
)  # fmt: skip

SHAPE = (2, 8, 4)


def draws(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operators():
    keep = (draws(1, 1, 8, 4) > 0).double()
    motion = draws(3, 5).abs()
    return {
        "mask": Mask(keep, 2),
        "mask_of_channels": Mask((draws(1, *SHAPE) > 0).double()),
        "identity": identity(SHAPE),
        "average": downsample(SHAPE, 2),
        "bicubic": downsample(SHAPE, 2, "bicubic"),
        "deficient": Separable(torch.ones(3, 8), draws(6, 4), 2),
        "gaussian": Blur(gaussian_kernel(1.0, 5), SHAPE),
        "uniform": Blur(uniform_kernel(3), SHAPE),
        "asymmetric": Blur(motion / motion.sum(), SHAPE, 0.0),
        "cs_gaussian": Rows(gaussian_rows(12, 32, 1), SHAPE),
        "cs_hadamard": Rows(hadamard_rows(12, 32, 1), SHAPE),
    }


@pytest.mark.parametrize("name", operators())
def test_adjoint_and_pseudo_inverse_are_those_of_the_dense_matrix(name):
    operator = operators()[name]
    basis = torch.eye(64, dtype=torch.float64).view(64, *SHAPE)
    dense = operator.forward(basis).flatten(1).mT  # column j: H e_j
    x, y = draws(3, *SHAPE), operator.forward(draws(3, *SHAPE, seed=2))
    y = y + operator.forward(draws(3, *SHAPE, seed=5)) if name.startswith("mask") else y + draws(*y.shape, seed=3)
    inner = (operator.forward(x) * y).sum()
    torch.testing.assert_close(inner, (x * operator.adjoint(y)).sum())
    torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ dense, atol=1e-12, rtol=1e-9)
    inverse = torch.linalg.pinv(dense, rtol=1e-10)
    torch.testing.assert_close(operator.pinv(y).flatten(1), y.flatten(1) @ inverse.mT, atol=1e-9, rtol=1e-8)

    h, p = dense, operator.pinv(operator.forward(basis)).flatten(1).mT  # H^+ H
    torch.testing.assert_close(h @ p, h, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(p, p.mT, atol=1e-10, rtol=0)
    torch.testing.assert_close(p @ p, p, atol=1e-10, rtol=0)
    assert operator.count == torch.linalg.matrix_rank(dense)
    values = torch.linalg.svdvals(dense)
    mine = operator.singular.expand(1, *SHAPE).flatten().sort(descending=True).values[: len(values)]
    torch.testing.assert_close(mine, values[: len(mine)], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", operators())
def test_coordinates_are_a_turn_of_the_image(name):
    operator, x = operators()[name], draws(3, *SHAPE)
    z = operator.basis(x)
    assert z.shape == x.shape
    torch.testing.assert_close(operator.image(z), x)
    torch.testing.assert_close(z.abs().square().sum(), x.square().sum())
    torch.testing.assert_close(operator.measured(operator.forward(x)), operator.singular * z, atol=1e-12, rtol=1e-9)
    assert operator.picture(operator.forward(x)).shape == x.shape
    assert operator.forward(x.float()).dtype == torch.float32
    torch.testing.assert_close(operator.pinv(operator.forward(x.float())).double(), operator.pinv(operator.forward(x)),
                               atol=2e-3 if name == "asymmetric" else 2e-5, rtol=0)  # fmt: skip


def test_what_they_measure():
    x = draws(2, 1, 8, 8)
    torch.testing.assert_close(downsample((1, 8, 8), 4).forward(x), F.avg_pool2d(x, 4))
    torch.testing.assert_close(downsample((1, 8, 8), 2, "bicubic").forward(x), imresize(x, 1, 2))
    kernel = draws(3, 5).abs()
    wrapped = F.pad(x, (2, 2, 1, 1), mode="circular")
    torch.testing.assert_close(
        Blur(kernel, (1, 8, 8), 0.0).forward(x), F.conv2d(wrapped, kernel.flip(0, 1)[None, None])
    )
    assert torch.equal(identity((1, 8, 8)).forward(x), x)
    keep = torch.ones(2, 1, 8, 8)
    keep[0, 0, :4], keep[1, 0, 4:] = 0, 0  # another mask for each image
    y = Mask(keep).forward(x)
    assert torch.equal(y[0, 0, 4:], x[0, 0, 4:]) and not y[0, 0, :4].any() and torch.equal(y[1, 0, :4], x[1, 0, :4])
    assert Mask(keep).count == 32


def test_blur_drops_what_it_hardly_passes():
    kernel = gaussian_kernel(1.5, 7)
    cut, whole = Blur(kernel, (1, 16, 16), 0.05), Blur(kernel, (1, 16, 16), 0.0)
    assert cut.count < whole.count == 256
    x = draws(1, 1, 16, 16)
    assert (cut.forward(x) - whole.forward(x)).norm() <= 0.05 * x.norm()
    assert cut.singular[cut.singular > 0].min() > 0.05


def test_rows_are_a_function_of_the_seed_and_walsh_hadamard_ones_orthonormal():
    rows = hadamard_rows(10, 64, 3)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(10, dtype=torch.float64))
    assert torch.equal(rows, hadamard_rows(10, 64, 3)) and not torch.equal(rows, hadamard_rows(10, 64, 4))
    assert bool((rows[0] == 1 / 8).all())
    assert torch.equal(gaussian_rows(4, 9, 1), gaussian_rows(4, 9, 1))


def test_bad_operators():
    with pytest.raises(UserError, match=r"task.factor=3 must divide the images' sides 8x8"):
        named_operator("superres_average", (1, 8, 8), factor=3)
    with pytest.raises(UserError, match="power of two pixels, not 36"):
        named_operator("cs_hadamard", (1, 6, 6), share=0.5, seed=0)
    with pytest.raises(UserError, match="odd sides"):
        Blur(torch.ones(2, 2), (1, 8, 8))
    with pytest.raises(UserError, match="equally many"):
        Mask(torch.stack([torch.ones(1, 2, 2), torch.zeros(1, 2, 2)]))
    with pytest.raises(UserError, match="0 and 1"):
        Mask(torch.full((1, 1, 2, 2), 0.5))
    with pytest.raises(UserError, match="entries"):
        Rows(torch.ones(2, 5), (1, 2, 2))
