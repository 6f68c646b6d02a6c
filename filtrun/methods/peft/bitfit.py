"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (ACL 2022, 2106.10199).

Only additive bias terms are trained. Written for transformers; in convolutional networks without convolution biases
the shifts of the normalisation layers are the biases, as in the vision PEFT literature (VPT, arXiv 2203.12119).

Alone, on any model:

>>> bitfit = BitFit().attach(model, head=model.head.parameters())  # doctest: +SKIP
>>> ...                                                            # train the parameters that require a gradient
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.options import opt

if TYPE_CHECKING:
    from filtrun.context import Run


def biases_of(weights: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The tensors whose name ends in "bias", in order. Raises UserError when there is none."""
    found = [p for name, p in weights.items() if name.rpartition(".")[2].endswith("bias")]
    if not found:
        raise UserError("method=bitfit found no bias in this model; choose another method or model")
    return found


@dataclass
class BitFit(Method):
    """Train every bias (of linear, convolution and normalisation layers) and, for a classifier, its head."""

    head: bool = opt(True, "also train the classification head, as PEFT protocols do", source="VPT code")

    trains: ClassVar = "part"
    paper: ClassVar[str] = "BitFit, arXiv 2106.10199 (2022)"

    def attach(self, model: nn.Module, head: Iterable[nn.Parameter] = ()) -> BitFit:
        """Freeze `model` but for its biases and, with the option `head`, the parameters given as `head`; returns self.

        Raises UserError when the model has no bias.
        """
        biases = biases_of(dict(model.named_parameters()))
        model.requires_grad_(False)
        for parameter in (*biases, *(head if self.head else ())):
            parameter.requires_grad_(True)
        return self

    def edit_model(self, run: Run) -> None:
        biases = biases_of(run.weights)
        head = [] if not self.head else run.task.head(run.model)
        run.claim(self, [b for b in biases if not any(b is p for p in head)])
        for bias in biases:
            bias.requires_grad_(True)
        if self.head:
            train_head(run)
