"""Classifier-free guidance, and the pair of predictions that every rule of its kind starts from."""

from __future__ import annotations

from torch import Tensor

from filtrun.diffusion.denoiser import Denoise, Prediction


def both(denoise: Denoise, x: Tensor, sigma: Tensor, cond: Tensor) -> tuple[Prediction, Prediction]:
    """(conditional, unconditional) predictions: one doubled network call where `denoise` can, else two calls."""
    together = getattr(denoise, "both", None)
    if together is not None:
        return together(x, sigma, cond)
    return denoise(x, sigma, cond), denoise(x, sigma, None)


def cfg(denoise: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): D_u + scale * (D_c - D_u).

    scale 1 is the conditional denoiser and costs one evaluation, 0 the unconditional one; everything else costs two.
    (The paper's weight w is scale - 1.) A call without condition is passed on unguided, so rules nest.
    """

    def guided(x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Prediction:
        if cond is None or scale == 1:
            return denoise(x, sigma, cond)
        if scale == 0:
            return denoise(x, sigma, None)
        with_class, without = both(denoise, x, sigma, cond)
        return Prediction(
            without.x0 + scale * (with_class.x0 - without.x0), without.eps + scale * (with_class.eps - without.eps)
        )

    return guided
