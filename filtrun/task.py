"""Task: what a model is asked to do. It turns a batch into a loss, evaluates a model, and shows what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Data


@dataclass(frozen=True)
class Metric:
    """How a number is read: what it is called, which way is better, what it means, how it is printed."""

    title: str
    better: str
    meaning: str
    format: str = ".3f"


@dataclass
class Task:
    """Base of all tasks. `metrics` describes every number `evaluate` may give, the headline first."""

    kind: ClassVar[str] = ""
    metrics: ClassVar[dict[str, Metric]] = {}
    loss_draws: ClassVar[bool] = True
    """Whether `loss` draws at random; runs whose loss does not can be trained at once (`filtrun.lockstep`)."""
    training_options: ClassVar[tuple[str, ...]] = ()
    """Options the training loss depends on: they go into the key of a pre-trained base."""

    def prepare(self, run: Run) -> None:
        """Make what evaluation needs: judges and statistics, through ``run.stage``."""

    def loss(self, run: Run, batch: Any) -> Tensor:
        """The scalar training loss of ``run.net`` on a batch."""
        raise NotImplementedError

    def evaluate(self, run: Run) -> dict[str, float]:
        """Metric name -> value for the model as it is now; the same on every process."""
        raise NotImplementedError

    def probe(self, run: Run) -> Tensor:
        """A small output of the model on fixed input: equal bits mean an unchanged model."""
        raise NotImplementedError

    def show(self, run: Run, path: Path) -> bool:
        """Draw what the model does now as a PNG at `path`; False when there is nothing to draw."""
        return False

    def notes(self, run: Run) -> dict[str, Any]:
        """How the numbers were made (feature network, judge, sample count), for the record."""
        return {}

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters PEFT protocols always train beside the method's own (a classifier's last layer)."""
        return []

    def augment(self, data: Data) -> Callable[[Tensor], Tensor] | None:
        """Training augmentation of float images (N, C, H, W) in [0, 1], or None."""
        return data.augmentation()

    def sizes(self, data: Data) -> dict[str, Any]:
        """What a model is told when it is built, by the names of its arguments."""
        return {"num_classes": data.num_classes, "in_channels": data.channels, "image_size": data.image_size}

    def check_data(self, data: Data) -> None:
        """Raise UserError when the task cannot work on this kind of data; nothing has been read yet."""

    def pretraining(self) -> Task:
        """The task a base is pre-trained on: another than this one where it is only evaluated in another way."""
        return self

    def training_key(self) -> dict[str, Any]:
        """The options that change what training computes."""
        return {name: getattr(self, name) for name in self.training_options}


def normalizer(run: Run) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (1, C, 1, 1) on the run's device, by the model's `normalize` setting."""
    channels = run.data.channels
    if run.normalize == "imagenet":
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        if channels == 1:
            mean, std = [sum(mean) / 3], [sum(std) / 3]
    elif run.normalize == "half":
        mean, std = [0.5] * channels, [0.5] * channels
    elif run.normalize == "none":
        mean, std = [0.0] * channels, [1.0] * channels
    else:
        mean, std = run.data.mean_std()
    shape = (1, -1, 1, 1)
    return torch.tensor(mean, device=run.device).view(shape), torch.tensor(std, device=run.device).view(shape)


def show_images(run: Run) -> None:
    """Let a model that asks for it see training images before it trains: as many as its ``looks_at``, normalised.

    It asks with a method ``look_at(images)``. The images are spread over the training split, always the same ones.
    """
    look = getattr(run.model, "look_at", None)
    if not callable(look):
        return
    split = run.data.split("train", run.which)
    count = min(int(getattr(run.model, "looks_at", 1000)), len(split))
    mean, std = normalizer(run)
    look((split.batch(torch.arange(count) * len(split) // count).x.to(run.device) - mean) / std)
