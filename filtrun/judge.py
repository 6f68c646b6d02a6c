"""The networks that judge samples: a classifier that says which class it sees, and features for FID and KID.

Neither is ever trained with, or used to guide, the model it judges: each is a stage of its own with its own seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from filtrun.metrics.features import ClassifierFeatures, FeatureNet, find_inception, inception_features
from filtrun.metrics.small_cnn import SmallCNN
from filtrun.tasks.classify import Classify
from filtrun.train_stage import train_stage
from filtrun.trainer import Trainer

if TYPE_CHECKING:
    from filtrun.context import Run

JUDGE_SEED, FEATURE_SEED = 7001, 9002


class Judge:
    """A frozen classifier with a name; images (N, C, H, W) in [0, 1] -> logits (N, K)."""

    def __init__(self, net: nn.Module, name: str) -> None:
        self.net, self.name = net.eval().requires_grad_(False), name

    def __call__(self, images: Tensor) -> Tensor:
        return self.net(images)


def judge_network(run: Run, steps: int) -> Judge:
    """The classifier that decides which class a sample shows, trained on real images of all classes."""
    return Judge(_classifier(run, "judge", JUDGE_SEED, steps), f"small_cnn on {run.data.name}, seed {JUDGE_SEED}")


def feature_network(run: Run, choice: str, steps: int) -> FeatureNet:
    """The features FID and KID are measured in: Inception where its weights are (or demanded), else a classifier."""
    if choice == "inception" or (choice == "auto" and run.data.image_size >= 32 and find_inception() is not None):
        return inception_features(run.device)
    net = _classifier(run, "features", FEATURE_SEED, steps)
    return ClassifierFeatures(net, f"small_cnn on {run.data.name}, seed {FEATURE_SEED}, pooled features")


def _classifier(run: Run, name: str, seed: int, steps: int) -> nn.Module:
    sizes: dict[str, Any] = {
        "num_classes": run.data.num_classes, "in_channels": run.data.channels, "image_size": run.data.image_size,
    }  # fmt: skip
    batch = min(128, len(run.data.split("train")))
    trainer = Trainer(steps=steps, batch_size=batch, lr=3e-3, warmup=min(40, steps // 10), clip=0.0, log_every=50)
    net, _ = train_stage(
        run, name, lambda: SmallCNN(**sizes), parts={"net": "small_cnn", **sizes}, task=Classify(), trainer=trainer,
        seed=seed, normalize="none",
    )  # fmt: skip
    return net
