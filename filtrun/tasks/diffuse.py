"""Task diffuse: train a class-conditional denoiser, sample from it, and measure the samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from filtrun.data.augment import Augment
from filtrun.diffusion.denoiser import Denoise, Denoiser
from filtrun.diffusion.guidance import cfg
from filtrun.diffusion.noise import noise_levels
from filtrun.diffusion.samplers import sampler as named_sampler
from filtrun.judge import feature_network, judge_network
from filtrun.metrics.distribution import fid, kid, precision_recall
from filtrun.metrics.features import feature_matrix
from filtrun.options import opt
from filtrun.task import Metric, Task

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Batch, Data


@dataclass
class Diffuse(Task):
    """Class-conditional denoising and sampling; images are scaled to [-1, 1]."""

    prediction: str = opt("edm", "what the network predicts", choices=("edm", "eps", "x0", "v", "flow"))
    noise: str = opt("edm", "noise levels", choices=("edm", "cosine", "linear", "scaled_linear"))
    weighting: str = opt("target", "loss weight: of the network's target, or of the noise levels",
                         choices=("target", "levels"))  # fmt: skip
    sigma_data: float = opt(0.5, "standard deviation of the images in [-1, 1]", low=1e-3)
    label_dropout: float = opt(0.1, "share of training labels replaced by the null token", low=0, high=1)
    sampler: str = opt("ddim", "solver", choices=("ddim", "euler", "heun", "ancestral"))
    sample_steps: int = opt(20, "solver steps", low=1)
    grid: str = opt("karras", "spacing of the sampler's noise levels", choices=("karras", "log", "uniform_t"))
    guidance: float = opt(1.0, "classifier-free guidance scale w; 1 is the plain conditional model", low=0)
    clip: float | None = opt(1.0, "clamp x0 estimates to [-clip, clip] when sampling; null for no clamping")
    samples: int = opt(512, "samples per evaluated set of classes", low=2)
    sample_batch: int = opt(256, "samples drawn at a time", low=1)
    sample_seed: int = opt(1234, "seed of the evaluation's noise, the same for every run that is compared")
    features: str = opt("auto", "feature network of FID and KID: Inception where its weights are, else a classifier",
                        choices=("auto", "inception", "classifier"))  # fmt: skip
    judge_steps: int = opt(400, "training steps of the judge and of the feature classifier", low=1)

    kind: ClassVar[str] = "diffuse"
    training_options: ClassVar[tuple[str, ...]] = (
        "prediction", "noise", "weighting", "sigma_data", "label_dropout",
    )  # fmt: skip
    metrics: ClassVar[dict[str, Metric]] = {
        "fid": Metric("FID", "lower", "distance of the samples' features to real images", ".2f"),
        "kid": Metric("KID", "lower", "kernel distance of the features, unbiased", ".4f"),
        "precision": Metric("precision", "higher", "samples that lie among real images", ".1%"),
        "recall": Metric("recall", "higher", "real images that lie among samples", ".1%"),
        "target_accuracy": Metric("class accuracy", "higher", "samples the judge gives the class asked for", ".1%"),
        "source_accuracy": Metric("old classes kept", "higher", "the same for classes the base already knew", ".1%"),
        "source_fid": Metric("FID, old classes", "lower", "distance to real images of the old classes", ".2f"),
    }

    def prepare(self, run: Run) -> None:
        run.shared["judge"] = judge_network(run, steps=self.judge_steps)
        run.shared["features"] = feature_network(run, self.features, steps=self.judge_steps)

    def augment(self, data: Data) -> Augment | None:
        """Flips only: a generator would learn the borders that crops and cut-outs leave in the images."""
        return Augment(flip=True) if data.flip else None

    def denoiser(self, run: Run) -> Denoiser:
        """The run's network as a denoiser in variables x = x0 + sigma * eps."""
        return Denoiser(
            run.net,
            noise_levels(self.noise, self.sigma_data),
            self.prediction,
            num_classes=run.data.num_classes,
            sigma_data=self.sigma_data,
            label_dropout=self.label_dropout,
            weighting=self.weighting,
            clip=self.clip,
        )

    def loss(self, run: Run, batch: Batch) -> Tensor:
        denoiser = run.shared.get("denoiser")
        if denoiser is None:
            denoiser = run.shared["denoiser"] = self.denoiser(run)
        return denoiser.loss(batch.x * 2 - 1, batch.y)

    # -- sampling --------------------------------------------------------------------------------------------------
    def generate(self, run: Run, classes: Tensor, seed: int) -> tuple[Tensor, int]:
        """Draw one image per class id; returns (images (N, C, H, W) in [0, 1] on the device, evaluations per image).

        The noise of sample i depends on `seed` and the order only, and not on the number of processes.
        """
        denoiser = self.denoiser(run)
        denoise: Denoise = cfg(denoiser, self.guidance) if self.guidance != 1 else denoiser
        for method in run.methods:
            denoise = method.guide(run, denoise)
        solvers = [s for s in (m.sampler(run) for m in run.methods) if s is not None]
        solve = solvers[-1] if solvers else named_sampler(self.sampler)
        sigmas = denoiser.levels.sigmas(self.sample_steps, self.grid)
        size = (len(classes), run.data.channels, run.data.image_size, run.data.image_size)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        parts = []
        for i, rows in enumerate(torch.arange(len(classes)).split(self.sample_batch)):
            if i % run.fabric.world_size != run.fabric.global_rank:
                continue
            generator = torch.Generator(run.device).manual_seed(seed + 1 + i)
            start = denoiser.levels.start(noise[rows].to(run.device), sigmas[0].item())
            x = solve(denoise, start, sigmas, classes[rows].to(run.device), generator=generator)
            parts.append(((x + 1) / 2).clamp(0, 1).float())
        images = torch.cat(parts) if parts else noise[:0].to(run.device)
        return gather(run, images, len(classes), self.sample_batch), denoiser.nfe // max(len(parts), 1)

    def classes(self, run: Run, which: str, count: int) -> Tensor:
        """`count` class ids (N,), spread evenly over the classes of one part of the data."""
        ids = {"all": list(range(run.data.num_classes)), "target": run.data.target, "source": run.data.source}[which]
        return torch.tensor(ids)[torch.arange(count) % len(ids or [])]

    # -- evaluation ------------------------------------------------------------------------------------------------
    def evaluate(self, run: Run) -> dict[str, float]:
        values = self._measure(run, run.which)
        if run.keeps:
            kept = self._measure(run, run.keeps)
            values |= {"source_accuracy": kept["target_accuracy"], "source_fid": kept["fid"]}
        return values

    def _measure(self, run: Run, which: str) -> dict[str, float]:
        wanted = self.classes(run, which, self.samples)
        images, run.shared["nfe"] = self.generate(run, wanted, self.sample_seed)
        features = run.shared["features"]
        fake = feature_matrix(features, images)
        real = run.shared.get(f"real/{which}")
        if real is None:
            split = run.data.split("train", which).to(run.device)
            chunks = [split.batch(rows).to(run.device).x for rows in torch.arange(len(split)).split(1000)]
            real = run.shared[f"real/{which}"] = torch.cat([feature_matrix(features, x) for x in chunks])
        kid_mean, _ = kid(real, fake, subset_size=min(1000, len(real), len(fake)))
        spread = precision_recall(real[:10_000], fake)
        guess = run.shared["judge"](images).argmax(1)
        return {
            "fid": fid(real, fake),
            "kid": kid_mean,
            "precision": spread.precision,
            "recall": spread.recall,
            "target_accuracy": (guess == wanted.to(guess.device)).float().mean().item(),
        }

    def probe(self, run: Run) -> Tensor:
        ids = self.classes(run, "all", 8)
        size = (8, run.data.channels, run.data.image_size, run.data.image_size)
        x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(run.device)
        return self.denoiser(run)(x, torch.tensor(1.0, device=run.device), ids.to(run.device)).x0

    def show(self, run: Run, path: Path) -> bool:
        from filtrun.images import save_grid

        ids = (
            [*(run.data.source or [])[:4], *run.data.target[:4]] if run.keeps else list(range(run.data.num_classes))[:8]
        )
        wanted = torch.tensor(ids).repeat_interleave(10)
        images, _ = self.generate(run, wanted, self.sample_seed)
        if run.fabric.global_rank == 0:
            new = set(run.data.target) if run.keeps else set()
            names = [str(run.data.classes[c]) + (" (new)" if c in new else "") for c in ids]
            save_grid(images, path, columns=10, rows=names)
        return True

    def notes(self, run: Run) -> dict[str, Any]:
        return {
            "feature_net": run.shared["features"].name,
            "judge": run.shared["judge"].name,
            "samples": self.samples,
            "reference": f"train images of the {run.which} classes",
            "sampler": f"{self.sampler}, {self.sample_steps} steps, guidance {self.guidance:g}",
        }


def gather(run: Run, images: Tensor, count: int, batch: int) -> Tensor:
    """Put the processes' batches (dealt out in turn) back into order: (count, C, H, W) on every process."""
    world = run.fabric.world_size
    if world == 1:
        return images
    batches = -(-count // batch)
    room = -(-batches // world) * batch  # every process sends the same number of rows
    padded = images.new_zeros((room, *images.shape[1:]))
    padded[: len(images)] = images
    everyone = cast(Tensor, run.fabric.all_gather(padded))
    order = [everyone[i % world, (i // world) * batch : (i // world + 1) * batch] for i in range(batches)]
    sizes = [min(batch, count - i * batch) for i in range(batches)]
    return torch.cat([part[:size] for part, size in zip(order, sizes, strict=True)])
