"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (ACL 2022, 2106.10199).

Only additive bias terms are trained. Written for transformers; in convolutional networks without convolution biases
the shifts of the normalisation layers are the biases, as in the vision PEFT literature (VPT, arXiv 2203.12119).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from filtrun.errors import UserError
from filtrun.method import Method, train_head
from filtrun.options import opt

if TYPE_CHECKING:
    from filtrun.context import Run


@dataclass
class BitFit(Method):
    """Train every bias (of linear, convolution and normalisation layers) and, for a classifier, its head."""

    head: bool = opt(True, "also train the classification head, as PEFT protocols do", source="VPT code")

    trains: ClassVar = "part"
    paper: ClassVar[str] = "BitFit, arXiv 2106.10199 (2022)"

    def edit_model(self, run: Run) -> None:
        biases = [p for name, p in run.weights.items() if name.rpartition(".")[2].endswith("bias")]
        if not biases:
            raise UserError("method=bitfit found no bias in this model; choose another method or model")
        head = [] if not self.head else run.task.head(run.model)
        run.claim(self, [b for b in biases if not any(b is p for p in head)])
        for bias in biases:
            bias.requires_grad_(True)
        if self.head:
            train_head(run)
