"""Remapping of detail: the learned rule of LLF-LUT and the fast local Laplacian filter it comes from.

Sources: Paris, Hasinoff & Kautz, "Local Laplacian Filters", SIGGRAPH 2011 (the filter); Aubry, Paris, Hasinoff, Kautz
& Durand, "Fast Local Laplacian Filters", ACM TOG 2014 (the discretisation over references); Zhang et al., "Lookup Table
meets Local Laplacian Filter", NeurIPS 2023 (arXiv 2310.17190), code fengzhang427/LLF-LUT, models/PPB.py.

`fact` sets how much detail around a reference is raised (> 0) or flattened (< 0), `sigma` which differences count as
detail. References are ``r_m = m / (M - 1)``, m = 0 ... M - 1; a pixel of the Gaussian level g lies between two of them,
and takes from both by linear interpolation ("hat" weights ``1 - |g - r_m| (M - 1)``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from filtrun.errors import UserError
from filtrun.lut.pyramid import down, gaussian_pyramid, laplacian_pyramid, reconstruct, up
from filtrun.lut.workers import for_pieces

REFERENCES = 10
ROWS = 1 << 18
"""Values handled at a time where no gradient is needed, so that the many small steps stay in the cache."""


def remap(gaussian: Tensor, detail: Tensor, fact: Tensor, sigma: Tensor, references: int = REFERENCES) -> Tensor:
    """The rule of the released LLF-LUT code: it changes the Laplacian level itself, reference by reference.

    For m = 0 ... M - 1 in turn, with the hat weight h_m of `gaussian`::

        l <- l + h_m fact (l - r_m) exp(-2 sigma^2 (l - r_m)^2)

    It differs from the classical filter (`remap_classical`): sigma multiplies, the value inside the exponential is the
    Laplacian one, and the second reference sees what the first one did. Where the maps are large, the
    iterated exponential amplifies rounding a thousandfold and more.

    Args:
        gaussian: (N, C, H, W) level of the Gaussian pyramid; values beyond [-1/(M-1), 1 + 1/(M-1)] are not remapped.
        detail: (N, C, H, W) the same level of the Laplacian pyramid.
        fact, sigma: (N, 1, H, W) parameter maps, or anything that broadcasts.
        references: M >= 2.

    Returns:
        (N, C, H, W); `detail` itself, bit for bit, where `fact` is zero.
    """
    _check_references(references)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (gaussian, detail, fact, sigma)):
        return _remap(gaussian, detail, fact, sigma, references)
    fact, sigma = (t.expand(t.shape[0], t.shape[1], *detail.shape[2:]) if t.dim() == 4 else t for t in (fact, sigma))
    out = torch.empty_like(detail)

    def strip(start: int, end: int) -> None:
        g, d, f, s = (t[:, :, start:end] if t.dim() == 4 else t for t in (gaussian, detail, fact, sigma))
        out[:, :, start:end] = _remap(g, d, f, s, references)

    rows = max(1, ROWS // max(1, detail[:, :, 0].numel()))
    for_pieces(strip, detail.shape[2], rows, parallel=not detail.is_cuda)
    return out


def _remap(gaussian: Tensor, detail: Tensor, fact: Tensor, sigma: Tensor, references: int) -> Tensor:
    # only the two references next to a pixel have a weight that is not zero: the lower one comes first
    place = gaussian * (references - 1)
    lower = place.detach().floor()
    above = place - lower
    rate = -2 * sigma * sigma
    for step, weight in ((0, 1 - above), (1, above)):
        index = lower + step
        weight = torch.where((index >= 0) & (index < references), weight, 0.0)
        offset = detail - index / (references - 1)
        detail = detail + weight * fact * offset * torch.exp(offset * offset * rate)
    return detail


def tone(image: Tensor, reference: Tensor | float, fact: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The classical remapping around one reference: ``i + fact (i - r) exp(-(i - r)^2 / (2 sigma^2))`` (Aubry 2014)."""
    offset = image - reference
    spread = torch.as_tensor(sigma, dtype=image.dtype, device=image.device).square()
    # sigma = 0 means that no difference counts as detail; the floor keeps 0 / 0 out
    return image + fact * offset * torch.exp(-offset * offset / (2 * spread.clamp_min(1e-12)))


def remap_classical(gaussian: Tensor, fact: Tensor, sigma: Tensor, references: int = REFERENCES) -> Tensor:
    """One Laplacian level by the classical rule, with a parameter map of that level's size.

    The Gaussian level is remapped around each reference with `tone`, the Laplacian level of every result is taken, and
    each pixel interpolates between the two whose references enclose its value. With constant parameters, level 0
    equals that of `fast_local_laplacian`.

    Args:
        gaussian: (N, C, H, W), H, W >= 3.
        fact, sigma: (N, 1, H, W) or broadcastable.
    """
    _check_references(references)
    out = torch.zeros_like(gaussian)
    for m in range(references):
        curve = tone(gaussian, m / (references - 1), fact, sigma)
        out = out + _hat(gaussian, m, references) * (curve - up(down(curve), (curve.shape[2], curve.shape[3])))
    return out


def fast_local_laplacian(
    image: Tensor, fact: float, sigma: float, levels: int, references: int = REFERENCES, residual: Tensor | None = None
) -> Tensor:
    """The fast local Laplacian filter of a whole image.

    Args:
        image: (N, C, H, W) in [0, 1]; each channel is filtered by itself. Values outside take the nearest reference.
        fact: > 0 raises local contrast, < 0 smooths, -1 < fact; 0 gives the image back.
        sigma: largest difference that counts as detail.
        levels: Laplacian levels; see `filtrun.lut.pyramid.smallest_side`.
        references: M >= 2; more of them come closer to the exact filter.
        residual: what to put for the low-pass level; None keeps the image's own.

    Returns:
        (N, C, H, W), not clamped.
    """
    _check_references(references)
    gaussian = gaussian_pyramid(image, levels)
    out = [torch.zeros_like(level) for level in gaussian[:-1]]
    for m in range(references):
        curve = laplacian_pyramid(tone(image, m / (references - 1), fact, sigma), levels)
        for level in range(levels):
            out[level] = out[level] + _hat(gaussian[level], m, references) * curve[level]
    return reconstruct([*out, gaussian[-1] if residual is None else residual])


def _hat(gaussian: Tensor, m: int, references: int) -> Tensor:
    """Interpolation weight of reference m; over m they add up to one everywhere."""
    return (1 - (gaussian.clamp(0, 1) * (references - 1) - m).abs()).clamp_min(0)


def _check_references(references: int) -> None:
    if references < 2:
        raise UserError(f"references={references} is out of range; allowed is [2, inf]")
