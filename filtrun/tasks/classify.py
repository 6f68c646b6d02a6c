"""Task classify: cross-entropy on class ids; accuracy, negative log-likelihood and calibration on the test images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filtrun.metrics.classify import ClassifyMeter
from filtrun.options import opt
from filtrun.task import Metric, Task, normalizer

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Batch


@dataclass
class Classify(Task):
    """Image classification over all classes of the data set.

    A run that adapts a pre-trained base trains on the target classes; its accuracy on the source classes says what
    was kept. Both are measured over the whole label set, so mixing up old and new classes counts as an error.
    """

    label_smoothing: float = opt(0.0, "share of the label spread over all classes in training", low=0, high=1)
    eval_batch: int = opt(250, "test images per forward", low=1)
    views: str = opt(
        "one", "logits are averaged over these views of a test image", choices=("one", "mirror", "mirror_translate"),
        source="mirror_translate: 1/4 each for both sides of the image, 1/8 each for both moved a pixel up and left, "
        "and down and right; arXiv:2404.00498",
    )  # fmt: skip
    split: str = opt("test", "split the reported numbers are from", choices=("test", "val"))

    kind: ClassVar[str] = "classify"
    loss_draws: ClassVar[bool] = False
    training_options: ClassVar[tuple[str, ...]] = ("label_smoothing",)
    metrics: ClassVar[dict[str, Metric]] = {
        "accuracy": Metric("accuracy", "higher", "test images given the right class", ".2%"),
        "top5": Metric("top-5 accuracy", "higher", "right class among the five most likely", ".2%"),
        "nll": Metric("NLL", "lower", "negative log-likelihood of the right class, nats", ".4f"),
        "ece": Metric("ECE", "lower", "gap between confidence and accuracy, 15 bins", ".4f"),
        "source_accuracy": Metric("old classes", "higher", "accuracy on the classes the base knew", ".2%"),
        "source_nll": Metric("old classes, NLL", "lower", "negative log-likelihood on them, nats", ".4f"),
    }

    def logits(self, run: Run, x: Tensor) -> Tensor:
        """Class scores (N, K) of images (N, C, H, W) in [0, 1]."""
        if "normalizer" not in run.shared:
            run.shared["normalizer"] = normalizer(run)
        mean, std = run.shared["normalizer"]
        return run.net((x - mean) / std)

    def averaged(self, run: Run, x: Tensor) -> Tensor:
        """Class scores (N, K) of images (N, C, H, W) in [0, 1], averaged over the `views`."""

        def both(images: Tensor) -> Tensor:
            return (self.logits(run, images).float() + self.logits(run, images.flip(-1)).float()) / 2

        if self.views == "one":
            return self.logits(run, x).float()
        if self.views == "mirror":
            return both(x)
        h, w = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1), "reflect")
        moved = both(padded[..., :h, :w]) + both(padded[..., 2 : h + 2, 2 : w + 2])
        return both(x) / 2 + moved / 4

    def loss(self, run: Run, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(run, batch.x), batch.y, label_smoothing=self.label_smoothing)

    def _meter(self, run: Run, which: str) -> dict[str, float]:
        meter = ClassifyMeter(run.data.num_classes, device=run.device)
        for batch in self._shard(run, which):
            meter.update(self.averaged(run, batch.x), batch.y)
        meter.state = run.reduce(meter.state, "sum")
        return meter.compute()

    def _shard(self, run: Run, which: str) -> Iterator[Batch]:
        """This process's share of the evaluation split; the counts are summed over all processes."""
        split = run.data.split(self.split, which).to(run.device)
        rows = torch.arange(run.fabric.global_rank, len(split), run.fabric.world_size)
        for part in rows.split(self.eval_batch):
            yield split.batch(part).to(run.device)

    def evaluate(self, run: Run) -> dict[str, float]:
        values = self._meter(run, run.which)
        if run.keeps:
            kept = self._meter(run, run.keeps)
            values |= {f"source_{name}": kept[name] for name in ("accuracy", "nll")}
        return values

    def probe(self, run: Run) -> Tensor:
        split = run.data.split(self.split, "all")
        rows = torch.arange(min(16, len(split)))
        return self.logits(run, split.batch(rows).to(run.device).x).float()

    def notes(self, run: Run) -> dict[str, Any]:
        count = len(run.data.split(self.split, run.which))
        views = {} if self.views == "one" else {"views": self.views}
        return {"split": self.split, "classes": run.which, "images": count, "normalize": run.normalize, **views}

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        from filtrun.models.checkpoint import head_of

        return list(head_of(model)[1].parameters())
