"""Mathematics of machine unlearners: a decaying L1 penalty, Fisher forgetting and influence unlearning.

Pure functions of tensors, as "Model Sparsity Can Simplify Machine Unlearning" compares them (NeurIPS 2023, arXiv
2304.04934; official code OPTML-Group/Unlearn-Sparse, unlearn/FT.py, fisher.py and Wfisher.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def l1_weight(alpha: float, epoch: int, epochs: int, free_epochs: int = 0) -> float:
    """Weight of the L1 penalty in `epoch` (from 0) of `epochs`: falls in a line from `alpha`, 0 in the last ones.

    alpha (1 - e / (E - E0)) while e < E - E0 and 0 after that; constant where all E0 = `free_epochs` epochs are free.
    """
    decaying = epochs - free_epochs
    if epoch < decaying:
        return alpha * (1 - epoch / decaying)
    return alpha if decaying == 0 else 0.0


def l1_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of |theta| over all entries of all `parameters`, biases and norms too; a scalar with gradients."""
    return torch.stack([p.abs().sum() for p in parameters if p.is_floating_point()]).sum()


def fisher_diagonal(
    forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], batches: Iterable[Tensor]
) -> list[Tensor]:
    """Squared gradients of the batch's mean cross-entropy for each class, weighted by the class's mean probability.

    Args:
        forward: x -> logits (N, K); in evaluation mode, so that batch norm does not mix samples.
        parameters: what to differentiate by; each must enter the logits.
        batches: inputs (N, ...); the official code takes 32 retained images at a time, in order.

    Returns:
        One non-negative tensor for each parameter: the mean over batches (a short last one counts as much).
    """
    totals, count = [torch.zeros_like(p) for p in parameters], 0
    for x in batches:
        count += 1
        with torch.enable_grad():
            logits = forward(x).float()
            shares = logits.detach().softmax(-1).mean(0)
            classes = logits.shape[1]
            for y in range(classes):
                loss = F.cross_entropy(logits, torch.full((len(logits),), y, device=logits.device))
                gradients = torch.autograd.grad(loss, list(parameters), retain_graph=y + 1 < classes)
                for total, gradient in zip(totals, gradients, strict=True):
                    total += shares[y] * gradient.square()
    return [total / max(1, count) for total in totals]


def fisher_variance(fisher: Tensor, alpha: float, last: bool = False, forget: Sequence[int] = ()) -> Tensor:
    """Variance of the noise that hides what one parameter knew; the parameter's shape.

    alpha / (F + 1e-8), where 1 / (F + 1e-8) is at most 1e3 (1e2 in the last layer), averaged over dimension 1 of
    matrices and kernels; ten times as much in the last layer and for vectors.

    Args:
        fisher: the diagonal from `fisher_diagonal`, 0 where an entry is pruned.
        alpha: how much noise.
        last: whether this is the weight or bias of the classification head (K, ...).
        forget: classes that are forgotten as a whole: their rows of the head get the variance 1e-3.
    """
    variance = alpha * (1 / (fisher + 1e-8)).clamp(max=1e2 if last else 1e3)
    if variance.ndim > 1:
        variance = variance.mean(1, keepdim=True).expand_as(variance).clone()
    if last and len(forget):
        variance[list(forget)] = 1e-4
    return variance * 10 if last or variance.ndim == 1 else variance


def fisher_mean(weight: Tensor, last: bool = False, forget: Sequence[int] = ()) -> Tensor:
    """What the noise is added to: the weight, with rows of forgotten classes in the head at 0. A copy."""
    mean = weight.detach().clone()
    if last and len(forget):
        mean[list(forget)] = 0
    return mean


def influence(forget: Tensor, retain: Tensor, forget_count: int, retain_count: int) -> Tensor:
    """The direction of influence unlearning before the inverse Hessian: (n_f / n) (g_f - g_r), n = n_f + n_r.

    Args:
        forget, retain: mean gradients (D,) of the loss over either part.
    """
    return forget_count / (forget_count + retain_count) * (forget - retain)


def woodfisher(v: Tensor, gradients: Iterable[Tensor], n: int = 1000) -> Tensor:
    """The official recursion for F^-1 v, (D,) -> (D,), over gradients (D,) of single samples.

    k starts as v and o as the first gradient; every further gradient g does k -= (k.g) / (n + o.g) o, then
    o -= (o.g) / (n + o.g) o, up to index n + 1. o keeps the first gradient's direction, so this is a rank-one
    correction of v and not the inverse of the empirical Fisher matrix; for that see `woodbury`.
    """
    k, o = v.clone(), None
    for i, g in enumerate(gradients):
        if o is None:
            o = g.clone()
        else:
            along = torch.dot(o, g)
            k -= torch.dot(k, g) / (n + along) * o
            o -= along / (n + along) * o
        if i > n:
            break
    return k


def woodbury(v: Tensor, gradients: Iterable[Tensor]) -> Tensor:
    """(I + sum_i g_i g_i^T / n)^-1 v, exactly: v - G^T (n I + G G^T)^-1 G v. Holds all n gradients (D,) in memory."""
    g = torch.stack(list(gradients)).to(torch.float32)
    system = g @ g.T + len(g) * torch.eye(len(g), device=g.device)
    return v - g.T @ torch.linalg.solve(system, g @ v)
