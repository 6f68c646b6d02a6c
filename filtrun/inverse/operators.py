"""Linear measurement operators y = H x with their exact adjoint and Moore-Penrose pseudo-inverse.

Each knows its singular value decomposition H = U S V^T, by the cheapest way there is: a mask selects, a separable
operator has two small matrices, a circular blur the Fourier transform, compressed sensing one matrix a channel. With
it everything follows: H = U S V^T, the adjoint V S U^T, the pseudo-inverse V S^+ U^T, and the coordinates solvers such
as DDRM work in.

>>> hidden = Mask(keep)                                    # doctest: +SKIP
>>> y = hidden.forward(x); x = hidden.pinv(y)              # doctest: +SKIP
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from filtrun.degrade.bicubic import resize_matrix
from filtrun.errors import UserError
from filtrun.precision import full_precision


class Operator:
    """A linear operator on images (N, C, H, W) of one shape, in their dtype and on their device.

    Coordinates are images in the basis of the right singular vectors, complex for a blur; where an operator measures
    nothing of a coordinate its singular value is 0.

    Attributes:
        shape: (C, H, W) of the images.
        singular: singular values, at least 0, float64; broadcasts against coordinates (N, C, H, W).
    """

    def __init__(self, shape: tuple[int, int, int], singular: Tensor) -> None:
        self.shape, self.singular = shape, singular
        self._moved: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    # -- what a kind of operator has to say -------------------------------------------------------------------------
    def basis(self, x: Tensor) -> Tensor:
        """Coordinates V^T x of images (N, C, H, W), the same shape."""
        return x

    def image(self, coordinates: Tensor) -> Tensor:
        """V z: the image of coordinates, the inverse of `basis`."""
        return coordinates

    def measured(self, y: Tensor) -> Tensor:
        """U^T y in the coordinates (N, C, H, W); 0 where nothing is measured."""
        raise NotImplementedError

    def measurement(self, coordinates: Tensor) -> Tensor:
        """U z: the measurement that belongs to coordinates, each already times its singular value."""
        raise NotImplementedError

    # -- what follows -----------------------------------------------------------------------------------------------
    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        """H x, in the operator's own shape (N, ...)."""
        return self.measurement(self.spectrum(x) * self.basis(x))

    __call__ = forward

    @full_precision
    def adjoint(self, y: Tensor) -> Tensor:
        """H^T y (N, C, H, W): <H x, y> = <x, H^T y>."""
        return self.image(self.spectrum(y) * self.measured(y))

    @full_precision
    def pinv(self, y: Tensor) -> Tensor:
        """H^+ y (N, C, H, W): the shortest of the images that fit `y` best."""
        s = self.spectrum(y)
        return self.image(torch.where(s > 0, self.measured(y) / s.where(s > 0, 1), 0))

    def spectrum(self, like: Tensor) -> Tensor:
        """The singular values in the dtype and on the device of a real tensor."""
        return self.moved(self.singular, like)

    def moved(self, part: Tensor, like: Tensor) -> Tensor:
        """A tensor of this operator in the dtype and on the device of `like`: copied once, since copies wait."""
        if part.device == like.device and part.dtype == like.dtype:
            return part
        key = id(part), like.device, like.dtype
        kept = self._moved.get(key)
        if kept is None or kept[0] is not part:  # in a copy of an operator, ids are those of the other one's tensors
            kept = self._moved[key] = part, part.to(like.device, like.dtype)
        return kept[1]

    @property
    def count(self) -> int:
        """Numbers measured of one image: coordinates with a singular value above 0."""
        one = self.singular if self.singular.ndim == 3 else self.singular[0]  # every image's mask keeps as many
        return int((one.expand(self.shape) > 0).sum())

    def picture(self, y: Tensor) -> Tensor:
        """A measurement as an image (N, C, H, W) for people."""
        return self.pinv(y)


class Mask(Operator):
    """Inpainting: pixels are kept or lost. `keep` (N or 1, 1 or C, H, W), 1 where a pixel is measured.

    Measurements are images with 0 in the holes; every image of a batch must keep equally many pixels. All ones is the
    identity, the operator of denoising.
    """

    def __init__(self, keep: Tensor, channels: int = 1) -> None:
        if keep.ndim != 4 or bool(((keep != 0) & (keep != 1)).any()):
            raise UserError("a mask must be (N, C, H, W) of 0 and 1")
        if len(set(keep.flatten(1).sum(1).tolist())) != 1:
            raise UserError("the masks of a batch must keep equally many pixels each")
        super().__init__((max(channels, keep.shape[1]), *keep.shape[-2:]), keep.double())

    def measured(self, y: Tensor) -> Tensor:
        return self.spectrum(y) * y

    def measurement(self, coordinates: Tensor) -> Tensor:
        return (self.spectrum(coordinates) > 0) * coordinates

    def picture(self, y: Tensor) -> Tensor:
        """Holes are grey: 0 in [-1, 1]."""
        return y


def identity(shape: tuple[int, int, int]) -> Mask:
    """H = identity: denoising."""
    return Mask(torch.ones(1, *shape), shape[0])


class Separable(Operator):
    """H x = A x B^T for every channel: rows by A (h', H), columns by B (w', W). Singular values are products."""

    def __init__(self, rows: Tensor, columns: Tensor, channels: int = 1) -> None:
        self._rows, self._columns = _svd(rows), _svd(columns)
        self._rows_t, self._columns_t = ((u.mT, v.mT) for u, _, v in self.parts)
        sides = rows.shape[1], columns.shape[1]
        values = [torch.nn.functional.pad(s, (0, n - len(s))) for (_, s, _), n in zip(self.parts, sides, strict=True)]
        super().__init__((channels, *sides), (values[0][:, None] * values[1])[None].expand(channels, -1, -1))

    @property
    def parts(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """(U, s, V) of the rows' matrix and of the columns', V square."""
        return self._rows, self._columns

    def basis(self, x: Tensor) -> Tensor:
        return self._both(x, self._rows_t[1], self._columns[2])

    def image(self, coordinates: Tensor) -> Tensor:
        return self._both(coordinates, self._rows[2], self._columns_t[1])

    def measured(self, y: Tensor) -> Tensor:
        seen = self._both(y, self._rows_t[0], self._columns[0])
        height, width = self.shape[1:]
        return torch.nn.functional.pad(seen, (0, width - seen.shape[-1], 0, height - seen.shape[-2]))

    def measurement(self, coordinates: Tensor) -> Tensor:
        height, width = self._rows[0].shape[1], self._columns[0].shape[1]
        return self._both(coordinates[..., :height, :width], self._rows[0], self._columns_t[0])

    def picture(self, y: Tensor) -> Tensor:
        """Low resolution, each pixel repeated."""
        return torch.nn.functional.interpolate(y, self.shape[1:], mode="nearest")

    def _both(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return self.moved(left, x) @ x @ self.moved(right, x)


def downsample(shape: tuple[int, int, int], factor: int, kind: str = "average") -> Separable:
    """Super-resolution's operator: averages of factor x factor pixels, or MATLAB's antialiased bicubic resizing.

    Raises:
        UserError: a side that is no multiple of `factor`, or an unknown kind.
    """
    channels, height, width = shape
    if height % factor or width % factor:
        raise UserError(f"task.factor={factor} must divide the images' sides {height}x{width}")
    if kind not in ("average", "bicubic"):
        raise UserError(f"downsampling kind={kind} is not allowed; choose from average, bicubic")
    if kind == "bicubic":
        return Separable(resize_matrix(height, 1, factor), resize_matrix(width, 1, factor), channels)

    def average(length: int) -> Tensor:
        eye = torch.eye(length // factor, dtype=torch.float64)
        return eye.repeat_interleave(factor, 1) / factor

    return Separable(average(height), average(width), channels)


class Blur(Operator):
    """Circular convolution with one kernel (h, w) of odd sides, its middle at the pixel, by the Fourier transform.

    Frequencies whose response is below `cutoff` times the largest one count as lost, in H too (as in DDRM's code, with
    0.03): the pseudo-inverse would blow noise up there.
    """

    def __init__(self, kernel: Tensor, shape: tuple[int, int, int], cutoff: float = 0.03) -> None:
        if kernel.ndim != 2 or not all(n % 2 for n in kernel.shape):
            raise UserError(f"a blur kernel must be (h, w) with odd sides; got {tuple(kernel.shape)}")
        padded = torch.zeros(shape[1:], dtype=torch.float64)
        place = [(torch.arange(n) - n // 2) % m for n, m in zip(kernel.shape, shape[1:], strict=True)]
        padded.index_put_((place[0][:, None], place[1]), kernel.double(), accumulate=True)
        response = torch.fft.fft2(padded)
        values = response.abs()
        values = (values + values.flip(0, 1).roll((1, 1), (0, 1))) / 2  # k and -k: equal to the last bit
        values = values.where(values > max(cutoff, 1e-12) * values.max(), 0)
        self._phase = torch.where(values > 0, response / response.abs().clamp(min=1e-300), 0)
        self._phase_conj = self._phase.conj().resolve_conj()
        super().__init__(shape, values[None].expand(shape))

    def basis(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x, norm="ortho")

    def image(self, coordinates: Tensor) -> Tensor:
        return torch.fft.ifft2(coordinates, norm="ortho").real

    def measured(self, y: Tensor) -> Tensor:
        seen = torch.fft.fft2(y, norm="ortho")
        return self.moved(self._phase_conj, seen) * seen

    def measurement(self, coordinates: Tensor) -> Tensor:
        return self.image(self.moved(self._phase, coordinates) * coordinates)

    def picture(self, y: Tensor) -> Tensor:
        return y


def gaussian_kernel(sigma: float, size: int) -> Tensor:
    """(size, size) float64, sum 1: a Gaussian of standard deviation `sigma` pixels at whole distances."""
    t = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(t**2) / (2 * sigma**2))
    return torch.outer(line, line) / line.sum() ** 2


def uniform_kernel(size: int) -> Tensor:
    """(size, size) float64 of 1 / size^2."""
    return torch.full((size, size), 1 / size**2, dtype=torch.float64)


class Rows(Operator):
    """H x = A x for the pixels of every channel, A (m, H W): compressed sensing. Measurements are (N, C, m)."""

    def __init__(self, matrix: Tensor, shape: tuple[int, int, int]) -> None:
        height, width = shape[1:]
        if matrix.ndim != 2 or matrix.shape[1] != height * width:
            raise UserError(f"the rows must have {height * width} entries; got a matrix of {tuple(matrix.shape)}")
        self._left, values, self._right = _svd(matrix)
        values = torch.nn.functional.pad(values, (0, height * width - len(values)))
        super().__init__(shape, values.view(1, height, width).expand(shape))

    def basis(self, x: Tensor) -> Tensor:
        return (x.flatten(2) @ self.moved(self._right, x)).view(x.shape)

    def image(self, coordinates: Tensor) -> Tensor:
        z = coordinates
        return (z.flatten(2) @ self.moved(self._right, z).mT).view(z.shape)

    def measured(self, y: Tensor) -> Tensor:
        seen = y @ self.moved(self._left, y)
        room = math.prod(self.shape[1:])
        return torch.nn.functional.pad(seen, (0, room - seen.shape[-1])).view(*y.shape[:2], *self.shape[1:])

    def measurement(self, coordinates: Tensor) -> Tensor:
        left = self.moved(self._left, coordinates)
        return coordinates.flatten(2)[..., : left.shape[1]] @ left.mT


def gaussian_rows(rows: int, pixels: int, seed: int) -> Tensor:
    """(rows, pixels) float64 of independent N(0, 1 / rows), a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, pixels, generator=generator, dtype=torch.float64) / rows**0.5


def hadamard_rows(rows: int, pixels: int, seed: int) -> Tensor:
    """(rows, pixels) float64: rows of the orthonormal Walsh-Hadamard matrix, the constant one first.

    Rows, and the order of the pixels, are drawn from the seed. Raises UserError unless `pixels` is a power of two.
    """
    if pixels & (pixels - 1):
        raise UserError(f"a Walsh-Hadamard matrix needs a power of two pixels, not {pixels}; use Gaussian rows")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(pixels - 1, generator=generator)])[:rows]
    both = chosen[:, None] & torch.randperm(pixels, generator=generator)  # entry (i, j) is (-1)^(bits of i & j)
    bits = sum((both >> k) & 1 for k in range(pixels.bit_length()))
    return (1 - 2 * (torch.as_tensor(bits) % 2)).double() / pixels**0.5


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U (m, r), s (r), V (n, n)) in float64; singular values below rounding are 0."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=True)
    values = values.where(values > values.max() * max(matrix.shape) * 1e-14, 0)
    return left[:, : len(values)], values, right.mT


@functools.lru_cache(maxsize=8)
def named_operator(kind: str, shape: tuple[int, int, int], **options: float) -> Operator:
    """The fixed operator called `kind`, kept for the next batch.

    Kinds: denoise; superres_average, superres_bicubic (factor); blur_gaussian (sigma, size, cutoff), blur_uniform
    (size, cutoff); cs_gaussian, cs_hadamard (share of the pixels measured, seed).
    """
    channels, height, width = shape
    if kind == "denoise":
        return identity(shape)
    if kind.startswith("superres_"):
        return downsample(shape, int(options["factor"]), kind.removeprefix("superres_"))
    if kind.startswith("blur_"):
        size = int(options["size"])
        kernel = uniform_kernel(size) if kind == "blur_uniform" else gaussian_kernel(options["sigma"], size)
        return Blur(kernel, shape, options["cutoff"])
    if kind.startswith("cs_"):
        made = hadamard_rows if kind == "cs_hadamard" else gaussian_rows
        rows = max(1, round(options["share"] * height * width))
        return Rows(made(rows, height * width, int(options["seed"])), shape)
    raise UserError(f"task.operator={kind} is not a fixed operator")
