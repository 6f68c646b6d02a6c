"""The networks unlearning starts from and is measured by: trained as the run's base was, in cached stages.

Of "Model Sparsity Can Simplify Machine Unlearning" (arXiv 2304.04934): a pruned network of all images, and one that is
trained from random weights on the retained images alone, inside a mask that was found on all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from filtrun.base import model_options
from filtrun.bits import pack_bits
from filtrun.context import seed_generators
from filtrun.methods.pruning import tickets
from filtrun.plan import new_model, pretrainer
from filtrun.stages import digest
from filtrun.train_stage import train_stage

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Split


def fresh(run: Run) -> nn.Module:
    """An untrained network of the run's configuration, on its device."""
    return new_model(run.config, run.task, run.data).to(run.device)


def trained(
    run: Run, slug: str, name: str, seed: int, keep: Mapping[str, Tensor], rewind: int = 0, part: Split | None = None
) -> nn.Module:
    """A network trained as the base was; on the device.

    Args:
        slug: of the method that asks.
        name: of the stage.
        keep: masks (bool) by name of weight, which act from step `rewind` on; none for a dense network.
        part: the images to train on; None for all the run has.
    """
    method: Any = tickets.MaskedTraining(rewind=rewind).within(keep, part)
    method.slug = f"{slug}_training"
    parts = {
        "model": model_options(run.config),
        "masks": {n: hashlib.sha256(pack_bits(k).numpy().tobytes()).hexdigest()[:16] for n, k in keep.items()},
        "images": None if part is None else digest(part.index.tolist()),
    }
    model, _ = train_stage(
        run, name, lambda: fresh(run), parts=parts, task=run.task.pretraining(), seed=seed,
        trainer=pretrainer(run.config), normalize=run.normalize, methods=[method],
    )  # fmt: skip
    return model


def pruned(
    run: Run, slug: str, how: str, rate: float, imp_step: float, rewind: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A pruned network trained on all images: its state, and the masks by name of weight.

    Args:
        slug: of the method that asks.
        how: ``omp`` (once, by magnitude), ``imp`` (in rounds of the share `imp_step`) or ``synflow`` (before training).
        rate: share of all convolution weights that goes.
        rewind: share of the base's training after which weights and learning rate are rewound to (not synflow).
    """
    seed = run.config["pretrain"].get("seed", 0)
    steps = round(rewind * pretrainer(run.config).total_steps(len(run.data.split("train", "all"))))
    if how == "synflow":
        seed_generators(seed, run.device)
        shape = (run.data.channels, run.data.image_size, run.data.image_size)
        keep = tickets.synflow_masks(fresh(run), shape, rate)
        return trained(run, slug, "unlearn-prune", seed, keep).state_dict(), keep
    model, found = run.model, None
    for share in [rate] if how == "omp" else tickets.imp_shares(rate, imp_step):
        scores = {name: w.detach().abs() for name, w in tickets.conv_weights(model).items()}
        found = tickets.prune_more(scores, share, found)
        model = trained(run, slug, "unlearn-prune", seed, found, steps)
    return model.state_dict(), found or {}
