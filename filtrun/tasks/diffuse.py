"""Task diffuse: train a class-conditional denoiser, sample from it, and measure the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from filtrun.data.augment import Augment
from filtrun.diffusion.denoiser import Denoise, Denoiser
from filtrun.diffusion.guidance import begin, cfg
from filtrun.diffusion.noise import NoiseLevels, noise_levels
from filtrun.diffusion.samplers import SAMPLER_NAMES, unipc
from filtrun.diffusion.samplers import sampler as named_sampler
from filtrun.judge import feature_network, judge_network
from filtrun.method import Method
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
    sampler: str = opt("ddim", "solver", choices=SAMPLER_NAMES)
    sample_steps: int = opt(20, "solver steps", low=1)
    grid: str = opt("karras", "spacing of the sampler's noise levels", choices=("karras", "log", "uniform_t"))
    to_zero: bool = opt(True, "the last step goes from the lowest noise level to 0; false: the grid ends at that level")
    guidance: float = opt(1.0, "classifier-free guidance scale w, where no method sets its own; 1: plain conditional",
                          low=0)  # fmt: skip
    clip: float | None = opt(1.0, "clamp x0 estimates to [-clip, clip] when sampling; null for no clamping")
    samples: int = opt(512, "samples per evaluated set of classes", low=2)
    sample_batch: int = opt(256, "samples drawn at a time", low=1)
    ode_steps: int = opt(0, "steps of the fine solution that ode_error is measured against; 0: not measured", low=0)
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
        "ode_error": Metric("solver error", "lower", "RMS pixel distance to a fine solution, same noise", ".4f"),
        "source_accuracy": Metric("old classes kept", "higher", "the same for classes the base already knew", ".1%"),
        "source_fid": Metric("FID, old classes", "lower", "distance to real images of the old classes", ".2f"),
    }

    def prepare(self, run: Run) -> None:
        run.shared["judge"] = judge_network(run, steps=self.judge_steps)
        run.shared["features"] = feature_network(run, self.features, steps=self.judge_steps)

    def augment(self, data: Data) -> Augment | None:
        """Flips only: a generator would learn the borders that crops and cut-outs leave in the images."""
        return Augment(flip=True, alternate=data.alternate_flip) if data.flip else None

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
    def guided(self, run: Run) -> tuple[Denoiser, Denoise]:
        """A fresh denoiser, and around it the task's guidance and every method's in their order.

        A method that is itself a rule of classifier-free guidance (`Method.combines`) takes the place of the task's.
        """
        denoiser = self.denoiser(run)
        rule = any(method.combines for method in run.methods)
        denoise: Denoise = denoiser if rule or self.guidance == 1 else cfg(denoiser, self.guidance)
        for method in run.methods:
            denoise = method.guide(run, denoise)
        return denoiser, denoise

    def solver(self, run: Run, levels: NoiseLevels) -> tuple[Callable[..., Tensor], Tensor]:
        """The sampler, a method's or the task's, and the noise levels (S + 1,) it walks."""
        solvers = [s for s in (m.sampler(run) for m in run.methods) if s is not None]
        solve = solvers[-1] if solvers else named_sampler(self.sampler)
        grid = getattr(solve, "grid", None)
        if grid is not None:
            return solve, grid(levels, self.sample_steps)
        return solve, levels.sigmas(self.sample_steps, self.grid, zero=self.to_zero)

    def generate(self, run: Run, classes: Tensor, seed: int) -> tuple[Tensor, float]:
        """Draw one image per class id; returns (images (N, C, H, W) in [0, 1] on the device, evaluations per image).

        The noise of sample i depends on `seed` and the order only, and not on the number of processes. The number of
        evaluations is whole unless a method saves some for a part of the samples.
        """
        # a method's solver may sample on its own first
        solve, sigmas = self.solver(run, noise_levels(self.noise, self.sigma_data))
        return self._draw(run, classes, seed, solve, sigmas)

    def _draw(
        self, run: Run, classes: Tensor, seed: int, solve: Callable[..., Tensor], sigmas: Tensor
    ) -> tuple[Tensor, float]:
        denoiser, denoise = self.guided(run)
        size = (len(classes), run.data.channels, run.data.image_size, run.data.image_size)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        parts, evaluations = [], 0.0
        for i, rows in enumerate(torch.arange(len(classes)).split(self.sample_batch)):
            if i % run.fabric.world_size != run.fabric.global_rank:
                continue
            generator = torch.Generator(run.device).manual_seed(seed + 1 + i)
            start = denoiser.levels.start(noise[rows].to(run.device), sigmas[0].item())
            denoiser.reset()
            begin(denoise, sigmas)
            x = solve(denoise, start, sigmas, classes[rows].to(run.device), generator=generator)
            evaluations += denoiser.nfe * len(rows)
            parts.append(((x + 1) / 2).clamp(0, 1).float())
        images = torch.cat(parts) if parts else noise[:0].to(run.device)
        total = run.reduce(torch.tensor(evaluations, dtype=torch.float64, device=run.device), "sum")
        return gather(run, images, len(classes), self.sample_batch), whole(total.item() / max(1, len(classes)))

    def ode_error(self, run: Run, classes: Tensor, images: Tensor) -> float:
        """Root mean square distance of `images`, as `generate` drew them, to `ode_steps` steps of UniPC.

        Says how well a deterministic solver of few steps solves the ODE it is given, whatever the network is worth.
        """
        fine = noise_levels(self.noise, self.sigma_data).sigmas(self.ode_steps, "log", zero=False)
        exact, _ = self._draw(run, classes, self.sample_seed, unipc, fine)
        return (images - exact).square().mean().sqrt().item()

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
        exact = {"ode_error": self.ode_error(run, wanted, images)} if self.ode_steps else {}
        return exact | {
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
        images, nfe = self.generate(run, wanted, self.sample_seed)
        run.shared.setdefault("nfe", nfe)  # a base that was measured long ago is still drawn
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
            "sampler": f"{self._solver_name(run)}, {self.sample_steps} steps, {self._guidance_name(run)}",
        }

    def _solver_name(self, run: Run) -> str:
        own = [m.slug for m in run.methods if type(m).sampler is not Method.sampler]
        return own[-1] if own else self.sampler

    def _guidance_name(self, run: Run) -> str:
        rules = [m.slug for m in run.methods if type(m).guide is not Method.guide]
        if not any(m.combines for m in run.methods):
            rules = [f"guidance {self.guidance:g}", *rules]
        return " + ".join(rules)


def whole(value: float) -> float:
    """An integer where `value` is one up to rounding, else the value to six places."""
    return round(value) if abs(value - round(value)) < 1e-6 else round(value, 6)


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
