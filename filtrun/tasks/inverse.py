"""Task inverse: reconstruct images from linear measurements with a denoiser that was trained as in task diffuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from filtrun.context import mix_seed
from filtrun.diffusion.guidance import begin
from filtrun.diffusion.noise import NoiseLevels, noise_levels
from filtrun.errors import UserError
from filtrun.inverse.measurement import Measurement, pseudo_inverse
from filtrun.inverse.operators import Mask, Operator, named_operator
from filtrun.method import Method
from filtrun.metrics.image import psnr, ssim_maps
from filtrun.options import opt
from filtrun.task import Metric, Task
from filtrun.tasks.diffuse import Diffuse, gather, whole

if TYPE_CHECKING:
    from filtrun.context import Run

OPERATORS = (
    "inpaint_box", "inpaint_random", "inpaint_mask", "superres_average", "superres_bicubic", "blur_gaussian",
    "blur_uniform", "cs_gaussian", "cs_hadamard", "denoise",
)  # fmt: skip


@dataclass
class Inverse(Diffuse):
    """Linear inverse problems y = H x + n on test images x; training is that of task diffuse, and shares its base.

    A method solves them: its hook `sampler` returns a solver that is called as a sampler is, with the measurement
    beside it,

        solve(denoise, x, sigmas, cond, measurement=Measurement(y, operator, noise), generator=generator)

    where x is the start of plain sampling at sigmas[0], all images lie in [-1, 1], and the solution comes back in x's
    shape. Without such a method the solution is the pseudo-inverse. The measurement of a test image follows from
    (measure_seed, image), the solver's noise from `sample_seed`: both are the same for every method.

    The options of task diffuse about how samples are judged, and `sampler`, have no effect here.
    """

    operator: str = opt("inpaint_box", "what is measured", choices=OPERATORS)
    box: float = opt(0.5, "inpaint_box: side of the lost box over the image's", low=0, high=1)
    box_place: str = opt("centre", "inpaint_box: where it lies", choices=("centre", "random"))
    missing: float = opt(0.5, "inpaint_random: share of the pixels that are lost", low=0, high=1)
    mask_file: str | None = opt(None, "inpaint_mask: image whose light pixels are lost, resized to the images' size")
    factor: int = opt(2, "superres_*: how many times smaller each side is measured", low=1)
    blur_sigma: float = opt(1.0, "blur_gaussian: standard deviation in pixels", low=1e-3)
    blur_size: int = opt(5, "blur_*: side of the kernel, odd; the blur goes round the borders", low=1)
    blur_cutoff: float = opt(0.03, "blur_*: frequencies passed by less than this share of the best are lost", low=0,
                             high=1, source="DDRM's code")  # fmt: skip
    share: float = opt(0.5, "cs_*: numbers measured for each pixel", low=0, high=1)
    measurement_noise: float = opt(0.0, "standard deviation of the measurement's noise, for images in [0, 1]", low=0)
    measure_seed: int = opt(0, "seed of holes, random rows and measurement noise", low=0)
    labels: bool = opt(False, "tell the solver the class of every test image; else the denoiser is unconditional")
    samples: int = opt(64, "test images that are reconstructed, spread over the test set", low=1)
    sample_batch: int = opt(64, "images solved at a time", low=1)
    sample_steps: int = opt(100, "noise levels a solver visits", low=1, source="RED-diff, official README")

    kind: ClassVar[str] = "inverse"
    metrics: ClassVar[dict[str, Metric]] = {
        "psnr": Metric("PSNR", "higher", "peak signal-to-noise ratio in dB, per image, then the mean", ".2f"),
        "ssim": Metric("SSIM", "higher", "structural similarity, Gaussian window of 11 pixels or what fits", ".4f"),
        "consistency": Metric("misfit", "lower", "RMS of H x - y over all that is measured, images in [0, 1]", ".4f"),
        "source_psnr": Metric("PSNR, old classes", "higher", "the same for classes the base already knew", ".2f"),
    }

    def __post_init__(self) -> None:
        if self.operator == "inpaint_mask" and not self.mask_file:
            raise UserError("task.operator=inpaint_mask needs task.mask_file=FILE, light where pixels are lost")
        if self.operator.startswith("blur_") and self.blur_size % 2 == 0:
            raise UserError(f"task.blur_size={self.blur_size} must be odd")

    def pretraining(self) -> Task:
        """The base is that of task diffuse: trained once for both."""
        return Diffuse(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Diffuse)})

    def prepare(self, run: Run) -> None:
        """Nothing: no judge is asked."""

    # -- measurements ------------------------------------------------------------------------------------------------
    def measure(self, run: Run, images: Tensor, numbers: Tensor) -> Measurement:
        """Measurements of images (N, C, H, W) in [-1, 1] that have `numbers` (N,) in their set."""
        shape: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]
        draws = [torch.Generator().manual_seed(mix_seed(self.measure_seed, int(i))) for i in numbers]
        operator = self.make_operator(shape, draws)
        y = operator.forward(images)
        if self.measurement_noise:
            noise = torch.stack([torch.randn(y.shape[1:], generator=g) for g in draws]).to(y)
            if isinstance(operator, Mask):
                noise = operator.measured(noise)  # a hole measures nothing, not even noise
            y = y + 2 * self.measurement_noise * noise
        return Measurement(y, operator, 2 * self.measurement_noise)

    def make_operator(self, shape: tuple[int, int, int], draws: list[torch.Generator]) -> Operator:
        """The operator for a batch of images, one generator for each image's own holes."""
        if not self.operator.startswith("inpaint_"):
            return named_operator(
                self.operator, shape, factor=self.factor, sigma=self.blur_sigma, size=self.blur_size,
                cutoff=self.blur_cutoff, share=self.share, seed=self.measure_seed,
            )  # fmt: skip
        channels, height, width = shape
        if self.operator == "inpaint_mask":
            from filtrun.degrade.masks import read_mask

            hole = read_mask(Path(str(self.mask_file)), height, width).view(1, 1, height, width)
            keep = (hole < 0.5).float()
        else:
            keep = torch.stack([self._keep(height, width, g) for g in draws])[:, None]
        if not keep.any():
            raise UserError(f"task.operator={self.operator} loses every pixel of a {height}x{width} image")
        return Mask(keep, channels)

    def _keep(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """(height, width), 1 where a pixel is measured."""
        keep = torch.ones(height, width)
        if self.operator == "inpaint_random":
            lost = torch.randperm(height * width, generator=generator)[: round(self.missing * height * width)]
            keep.view(-1)[lost] = 0
            return keep
        sides = round(self.box * height), round(self.box * width)
        room = height - sides[0], width - sides[1]
        if self.box_place == "random":
            corner = [int(torch.randint(n + 1, (1,), generator=generator)) for n in room]
        else:
            corner = [n // 2 for n in room]
        keep[corner[0] : corner[0] + sides[0], corner[1] : corner[1] + sides[1]] = 0
        return keep

    # -- solving -----------------------------------------------------------------------------------------------------
    def solver(self, run: Run, levels: NoiseLevels) -> tuple[Callable[..., Tensor], Tensor]:
        """The last method's solver, or the pseudo-inverse, and the noise levels (S + 1,) it walks."""
        solvers = [s for s in (m.sampler(run) for m in run.methods) if s is not None]
        solve = solvers[-1] if solvers else pseudo_inverse
        grid = getattr(solve, "grid", None)
        if grid is not None:
            return solve, grid(levels, self.sample_steps)
        return solve, levels.sigmas(self.sample_steps, self.grid, zero=self.to_zero)

    def solve(self, run: Run, images: Tensor, numbers: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Measure images (N, C, H, W) in [-1, 1] of classes `y` and reconstruct them.

        Returns:
            reconstructions and pictures of the measurements, both (N, C, H, W) in [0, 1]; the RMS misfit of each
            image (N,) for images in [0, 1]; network evaluations per image.
        """
        solve, sigmas = self.solver(run, noise_levels(self.noise, self.sigma_data))
        denoiser, denoise = self.guided(run)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.sample_seed))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        evaluations = 0.0
        for i, rows in enumerate(torch.arange(len(images)).split(self.sample_batch)):
            if i % run.fabric.world_size != run.fabric.global_rank:
                continue
            generator = torch.Generator(run.device).manual_seed(self.sample_seed + 1 + i)
            clean, cond = images[rows].to(run.device), y[rows].to(run.device) if self.labels else None
            made = self.measure(run, clean, numbers[rows])
            start = denoiser.levels.start(noise[rows].to(run.device), sigmas[0].item())
            denoiser.reset()
            begin(denoise, sigmas)
            x = solve(denoise, start, sigmas, cond, measurement=made, generator=generator).clamp(-1, 1).float()
            evaluations += denoiser.nfe * len(rows)
            square = made.residual(x).square().flatten(1).sum(1) / max(1, made.operator.count)
            picture = made.operator.picture(made.y).float()
            parts.append(((x + 1) / 2, ((picture + 1) / 2).clamp(0, 1), square.sqrt() / 2))
        empty = noise[:0].to(run.device), noise[:0].to(run.device), noise[:0, 0, 0, 0].to(run.device)
        joined = [torch.cat(part) for part in zip(*(parts or [empty]), strict=True)]
        total = run.reduce(torch.tensor(evaluations, dtype=torch.float64, device=run.device), "sum")
        found, pictures, misfit = (gather(run, part, len(images), self.sample_batch) for part in joined)
        return found, pictures, misfit, whole(total.item() / max(1, len(images)))

    def test_images(self, run: Run, which: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Up to `count` test images (N, C, H, W) in [-1, 1], their numbers and classes, spread over the whole set."""
        split = run.data.split("test", which)
        count = min(count, len(split))
        batch = split.batch(torch.arange(count) * len(split) // count)
        return batch.x * 2 - 1, batch.index.cpu(), batch.y

    # -- evaluation --------------------------------------------------------------------------------------------------
    def evaluate(self, run: Run) -> dict[str, float]:
        values = self._measure(run, run.which)
        if run.keeps:
            values["source_psnr"] = self._measure(run, run.keeps)["psnr"]
        return values

    def _measure(self, run: Run, which: str) -> dict[str, float]:
        images, numbers, y = self.test_images(run, which, self.samples)
        found, _, misfit, run.shared["nfe"] = self.solve(run, images, numbers, y)
        truth = (images.to(found) + 1) / 2
        side = min(11, min(truth.shape[-2:]) - 1 + min(truth.shape[-2:]) % 2)
        return {
            "psnr": psnr(found, truth).mean().item(),
            "ssim": ssim_maps(found.double(), truth.double(), size=side)[0].mean().item(),
            "consistency": misfit.square().mean().sqrt().item(),
        }

    def show(self, run: Run, path: Path) -> bool:
        from filtrun.images import save_grid

        images, numbers, y = self.test_images(run, run.which, 10)
        found, pictures, _, nfe = self.solve(run, images, numbers, y)
        run.shared.setdefault("nfe", nfe)
        if run.fabric.global_rank == 0:
            sheet = torch.cat([pictures, found, (images.to(found) + 1) / 2])
            save_grid(sheet, path, columns=len(images), rows=["measurement", "reconstruction", "truth"])
        return True

    def notes(self, run: Run) -> dict[str, Any]:
        solver = self._solver_name(run)
        asked = f", {self.sample_steps} steps, {self._guidance_name(run)}" if solver != "pseudo-inverse" else ""
        return {
            "operator": self.operator,
            "measurement_noise": self.measurement_noise,
            "samples": self.samples,
            "reference": f"test images of the {run.which} classes",
            "sampler": f"{solver}{asked}",
        }

    def _solver_name(self, run: Run) -> str:
        own = [m.slug for m in run.methods if type(m).sampler is not Method.sampler]
        return own[-1] if own else "pseudo-inverse"
