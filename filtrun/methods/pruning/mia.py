"""Membership inference by a support vector classifier: does the model still treat images as ones it was trained on?

The attack of "Model Sparsity Can Simplify Machine Unlearning" (arXiv 2304.04934; official evaluation/SVC_MIA.py): an
RBF classifier with C = 3 learns to tell retained training images (1) from test images (0) by one feature of the
model's predicted probabilities, by default the confidence in the right class, and is then asked about others.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEATURES = ("confidence", "correctness", "entropy", "m_entropy", "prob")


def entropy(p: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats, 0 log 0 = 0: (N, K) -> (N,)."""
    return -torch.xlogy(p, p).sum(-1)


def modified_entropy(p: Tensor, labels: Tensor, official: bool = False) -> Tensor:
    """-(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i): (N, K), (N,) -> (N,).

    Song and Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models" (2021, arXiv 2003.10595). With
    `official` what the official code computes instead: log p for both logarithms, and 1 - p in the columns of all
    labels that occur in the set, for every sample.
    """
    floor = torch.tensor(1e-30, device=p.device).log()
    log_p = torch.where(p > 0, p.log(), floor)
    if official:
        factors = p.clone()
        factors[:, labels] = 1 - p[:, labels]
        return -(factors * log_p).sum(-1)
    log_rest = torch.where(p < 1, (1 - p).log(), floor)
    right = torch.zeros_like(p, dtype=torch.bool).scatter_(1, labels[:, None], True)
    return -torch.where(right, (1 - p) * log_p, p * log_rest).sum(-1)


def feature(p: Tensor, labels: Tensor, kind: str = "confidence", official: bool = False) -> Tensor:
    """What the attacker sees, (N, 1) or for ``prob`` (N, K), of probabilities (N, K) and labels (N,)."""
    if kind == "prob":
        return p
    values = {
        "confidence": lambda: p.gather(1, labels[:, None])[:, 0],
        "correctness": lambda: (p.argmax(1) == labels).to(p.dtype),
        "entropy": lambda: entropy(p),
        "m_entropy": lambda: modified_entropy(p, labels, official),
    }
    if kind not in values:
        raise ValueError(f"feature={kind!r} must be one of {', '.join(FEATURES)}")
    return values[kind]()[:, None]


def attack(members: Tensor, others: Tensor, inside: Tensor | None = None, outside: Tensor | None = None) -> float:
    """Mean accuracy of the attack on sets it was not trained on, in [0, 1].

    Args:
        members, others: features (N, F) the classifier learns from: trained on, and never seen.
        inside: features whose right answer is "member", or None.
        outside: features whose right answer is "not a member", or None.
    """
    from sklearn.svm import SVC

    x = torch.cat([members, others]).cpu().numpy()
    y = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).numpy()
    classifier = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
    found = []
    if inside is not None and len(inside):
        found.append(float(classifier.predict(inside.cpu().numpy()).mean()))
    if outside is not None and len(outside):
        found.append(1 - float(classifier.predict(outside.cpu().numpy()).mean()))
    return sum(found) / len(found)


def efficacy(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    """MIA-efficacy: share of the forgotten images that pass for unseen ones; higher is better forgotten.

    Features (N, F); as many retained images as there are test images teach the attacker.
    """
    return attack(retain[: len(test)], test, outside=forget)


def privacy(retain: Tensor, test: Tensor) -> float:
    """MIA-privacy: accuracy of the attack on the second parts of retained and test images; 0.5 leaks nothing.

    Half as many images as there are test images, of either set, teach the attacker; the others are asked about.
    """
    half = min(len(test), len(retain)) // 2
    return attack(retain[:half], test[:half], retain[half:], test[half:])
