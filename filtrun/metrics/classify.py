"""How good class predictions are: top-k accuracy, negative log-likelihood, calibration error; gathered in a stream.

Everything a meter knows is one vector of sums on the device: adding a batch waits for nothing, and processes are
joined by summing the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from filtrun.errors import UserError


class ClassifyMeter:
    """Streaming top-k accuracy, NLL and expected calibration error.

    Args:
        num_classes: number of classes K. Values of `top_k` not below K are left out (they would be 1).
        top_k: which accuracies; 1 is reported as "accuracy", k as "top{k}".
        bins: equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3).
        device: where the sums live.

    Attributes:
        state: the sums, float64 (float32 on mps): images, NLL, hits per k, then per bin images, confidence, hits.
            All-reduce it with a sum, or ``merge`` meters, before ``compute``.
    """

    def __init__(
        self, num_classes: int, *, top_k: Sequence[int] = (1, 5), bins: int = 15, device: torch.device | str = "cpu"
    ) -> None:
        if bins < 1 or num_classes < 1:
            raise UserError(f"bins={bins} and num_classes={num_classes} must be at least 1")
        self.top_k = [k for k in top_k if k < num_classes or k == 1]
        self.bins = bins
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.state = torch.zeros(2 + len(self.top_k) + 3 * bins, dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (N, K), labels (N,) int64 in 0 ... K - 1."""
        log_probs = logits.to(self.state.dtype).log_softmax(1)
        nll = -log_probs.gather(1, labels[:, None]).sum()
        order = log_probs.topk(max(self.top_k, default=1), dim=1)
        hit = order.indices == labels[:, None]
        confidence, first = order.values[:, 0].exp(), hit[:, 0].to(log_probs)
        # bins are half open on the left: (0, 1/M], (1/M, 2/M], ...
        index = (confidence * self.bins).ceil().clamp(1, self.bins) - 1
        member = (index == torch.arange(self.bins, device=index.device)[:, None]).to(log_probs)  # (bins, N)
        per_bin = member @ torch.stack([torch.ones_like(first), confidence, first], 1)
        head = torch.stack([member.sum(), nll, *(hit[:, :k].sum().to(nll) for k in self.top_k)])
        self.state += torch.cat([head, per_bin.T.flatten()])

    def merge(self, other: ClassifyMeter) -> None:
        """Add what another meter with the same settings has seen."""
        self.state += other.state.to(self.state)

    def compute(self) -> dict[str, float]:
        """accuracy, top{k}, nll (nats), ece: all fractions in [0, 1] but nll. NaN when nothing was added."""
        state = self.state.double().cpu()
        n = state[0]
        totals, per_bin = state[1 : 2 + len(self.top_k)] / n, state[2 + len(self.top_k) :].reshape(3, self.bins)
        result = {"accuracy" if k == 1 else f"top{k}": totals[1 + i].item() for i, k in enumerate(self.top_k)}
        result["nll"] = totals[0].item()
        result["ece"] = ((per_bin[1] - per_bin[2]).abs().sum() / n).item()
        return result


def classify_metrics(
    logits: Tensor, labels: Tensor, *, top_k: Sequence[int] = (1, 5), bins: int = 15
) -> dict[str, float]:
    """The metrics of `ClassifyMeter` for one set: logits (N, K), labels (N,)."""
    meter = ClassifyMeter(logits.shape[1], top_k=top_k, bins=bins, device=logits.device)
    meter.update(logits, labels)
    return meter.compute()
