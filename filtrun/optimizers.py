"""Update rules for matrices, Muon and AuON, and one optimizer made of several rules.

Both act on weight matrices; a convolution's kernel (out, in, k, k) is the matrix (out, in*k*k). Vectors, and what else
is better left to another rule (embeddings, a classifier's last layer), go to AdamW or SGD beside it, see `Together`.

Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/; J. Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982 (the
scale that keeps AdamW's learning rate); D. Maity, "AuON: A Linear-time Alternative to Semi-Orthogonal Momentum
Updates", arXiv:2509.24320v1, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5; chosen by Jordan et al. for the steepest slope at 0, not for convergence to 1."""

SCALES = ("adamw", "paper", "none")


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a matrix (rows, columns) towards 1 and keep its singular vectors.

    The matrix is divided by its Frobenius norm first. After 5 steps every singular value that was at least 0.002 of
    that norm lies in [0.68, 1.21]; more steps do not bring it to 1. In bfloat16 on a GPU, in float32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    wide = x.mT if x.size(-2) > x.size(-1) else x  # the smaller Gram matrix
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide.mT if x.size(-2) > x.size(-1) else wide).to(matrix.dtype)


def cosh_rms(matrix: Tensor) -> Tensor:
    """AuON's update of a matrix: X over the root mean square of cosh(X), where X is the matrix over its norm.

    A positive multiple of the input with a Frobenius norm, and so a spectral norm, below 1.
    """
    x = matrix / (matrix.norm() + 1e-7)
    return x / (torch.cosh(x).square().mean().sqrt() + 1e-8)


class MatrixRule(torch.optim.Optimizer):
    """Nesterov momentum whose direction is reshaped as a whole, matrix by matrix; decoupled weight decay.

    Args:
        params: parameters of two or more dimensions; all but the first are one.
        lr: learning rate.
        momentum: decay of the gradients' moving average.
        weight_decay: a step first shrinks weights by ``lr * weight_decay``.
        steps: Newton-Schulz steps on the direction.
        scale: ``"adamw"``: the step's root mean square is 0.2 lr, so that AdamW's learning rates fit (Liu et al. for
            Muon; the same done for AuON); ``"paper"``: the direction times sqrt(max(1, rows / columns)); ``"none"``.
        rescale: bring each matrix to the norm sqrt(rows) before its step (Jordan's CIFAR-10 speed run).
    """

    default_steps: ClassVar[int] = 0

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int | None = None,
        scale: str = "adamw",
        rescale: bool = False,
    ) -> None:
        steps = self.default_steps if steps is None else steps
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        super().__init__(params, defaults | {"scale": scale, "rescale": rescale})

    def direction(self, matrix: Tensor, steps: int) -> Tensor:
        """The step (rows, columns) for an averaged gradient of that shape, before its scale."""
        raise NotImplementedError

    def adamw_factor(self, rows: int, columns: int) -> float:
        """What brings a direction to a root mean square of 0.2, AdamW's typical one."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` recomputes the loss, as everywhere in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state, gradient, momentum = self.state[parameter], parameter.grad, group["momentum"]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        matrix = gradient.lerp(average, momentum).flatten(1)  # the same order for every memory layout
        rows, columns = matrix.shape
        factor = 1.0
        if group["scale"] == "adamw":
            factor = self.adamw_factor(rows, columns)
        elif group["scale"] == "paper":
            factor = math.sqrt(max(1.0, rows / columns))
        if group["rescale"]:
            parameter.mul_(math.sqrt(rows) / parameter.norm())
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(self.direction(matrix, group["steps"]).view(parameter.shape), alpha=-group["lr"] * factor)


class Muon(MatrixRule):
    """MomentUm Orthogonalized by Newton-Schulz: the nearest semi-orthogonal matrix, nearly, is the step's direction."""

    default_steps = 5

    def direction(self, matrix: Tensor, steps: int) -> Tensor:
        return newton_schulz(matrix, steps)

    def adamw_factor(self, rows: int, columns: int) -> float:
        return 0.2 * math.sqrt(max(rows, columns))  # singular values near 1: the RMS is 1 / sqrt(max)


class AuON(MatrixRule):
    """Normalised momentum over the RMS of its hyperbolic cosine: linear time, one scalar per matrix.

    With ``steps=1`` one Newton-Schulz step comes before it: the paper's Hybrid-AuON.
    """

    default_steps = 0

    def direction(self, matrix: Tensor, steps: int) -> Tensor:
        if not steps:
            return cosh_rms(matrix)
        x = newton_schulz(matrix, steps)
        return x / (torch.cosh(x).square().mean().sqrt() + 1e-8)

    def adamw_factor(self, rows: int, columns: int) -> float:
        return 0.2 * math.sqrt(rows * columns)  # a norm near 1


class Together(torch.optim.Optimizer):
    """Several update rules as one optimizer: one list of groups, one state, one state dict.

    Args:
        groups: parameter groups in the order they should have; each names its rule under the key ``rule``.
        rules: rule -> what makes the optimizer over its groups.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rules: Mapping[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]],
    ) -> None:
        # each part completes its groups with its own options; the dicts stay the same objects
        made = {rule: make([group for group in groups if group["rule"] == rule]) for rule, make in rules.items()}
        super().__init__(list(groups), {})
        self.parts = made
        self._share()

    def _share(self) -> None:
        for rule, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            part.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also how torch loads a state dict: with new groups and a new state
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part; `closure` recomputes the loss once, before the first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss
