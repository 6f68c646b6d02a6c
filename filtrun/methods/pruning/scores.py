"""What decides which weights go: scores (higher = keep) and the thresholds over them. Pure functions of tensors.

The conventions are those of Synaptic-Flow's reference pruners (Tanaka et al., NeurIPS 2020, arXiv 2006.05467; official
code ganguli-lab/Synaptic-Flow): a density of d keeps the share d, k = int((1 - d) n), and every score that is not
above the k-th smallest goes. Scores of whole channels and their coupled layers come from torch-pruning (`slim`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from filtrun.errors import UserError, closest


def random_scores(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Uniform noise of each weight's shape; a pure function of `seed` and the shapes, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}


def magnitude(weight: Tensor, p: int = 1) -> Tensor:
    """|w| (p = 1) or w^2 (p = 2) of every entry; both rank alike, sums over filters do not (Han et al., NIPS 2015)."""
    return weight.detach().abs() if p == 1 else weight.detach().square()


def filter_norm(weight: Tensor, p: int = 1) -> Tensor:
    """Sum of |w|^p over each filter: (out, ...) -> (out,) (Li et al., ICLR 2017, arXiv 1608.08710, for p = 1)."""
    return magnitude(weight, p).flatten(1).sum(1)


def taylor(weight: Tensor, grad: Tensor, squared: bool = False) -> Tensor:
    """|w dL/dw| of every entry, or its square: the first-order change of the loss when the weight goes.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019 (arXiv 1906.10771), eq. 8.
    """
    product = weight.detach() * grad
    return product.square() if squared else product.abs()


def snip(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w dL/dw| over its sum over all weights: SNIP's connection sensitivity (ICLR 2019, arXiv 1810.02340, eq. 6).

    The derivative by a multiplicative mask at 1 is w times the derivative by the weight.
    """
    scores = {name: taylor(w, grads[name]) for name, w in weights.items()}
    total = torch.stack([s.sum() for s in scores.values()]).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: s / total for name, s in scores.items()}


def bn_scale(gamma: Tensor) -> Tensor:
    """|gamma| of a batch norm (network slimming, Liu et al., ICCV 2017, arXiv 1708.06519)."""
    return gamma.detach().abs()


def drop_count(total: int, density: float) -> int:
    """How many of `total` go: int((1 - density) n) in floating point, as the reference code counts."""
    return int((1.0 - density) * total)


def threshold(scores: Tensor, density: float) -> float | None:
    """The k-th smallest of all `scores`, k = `drop_count`; None when nothing is to go."""
    k = drop_count(scores.numel(), density)
    return None if k < 1 else scores.flatten().kthvalue(k).values.item()


def keep_masks(scores: Mapping[str, Tensor], density: float, scope: str = "global") -> dict[str, Tensor]:
    """Keep masks (bool, shapes of the scores) that drop the scores at or below the threshold.

    Args:
        scores: name -> scores, higher = keep.
        density: share to keep, in [0, 1].
        scope: ``global`` ranks all tensors together, ``local`` each on its own.

    Equal scores at the threshold all go, so ties remove more than asked for.
    """
    if scope not in ("global", "local"):
        raise ValueError(f"scope={scope!r} must be global or local")
    whole = torch.cat([s.flatten() for s in scores.values()]) if scores and scope == "global" else None
    found = {}
    for name, values in scores.items():
        limit = threshold(values if whole is None else whole, density)
        found[name] = torch.ones_like(values, dtype=torch.bool) if limit is None else values > limit
    return found


def prunable_weights(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Name -> weight of every convolution and linear layer, without those of the layers `ignore` names.

    Args:
        model: any module.
        ignore: names of layers or of modules that hold them.

    Raises:
        UserError: a name in `ignore` is no module of the model, or nothing is left.
    """
    modules = dict(model.named_modules())
    wrong = [name for name in ignore if name not in modules]
    if wrong:
        raise UserError(f"ignore={wrong[0]} names no module of the model{closest(wrong[0], list(modules))}")
    found = {}
    for name, module in modules.items():
        inside = any(name == i or name.startswith(f"{i}.") for i in ignore)
        weight = module._parameters.get("weight")
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and weight is not None and not inside:
            found[f"{name}.weight".lstrip(".")] = weight
    if not found:
        raise UserError("pruning finds no convolution and no linear layer it may prune in this model")
    return found
