"""Base of the image-to-image tasks: pairs made on the device, loss terms by config, whole test images measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from filtrun.context import mix_seed
from filtrun.data.crops import CropTurn
from filtrun.errors import UserError, unknown
from filtrun.losses import LOSSES, check_losses, model_terms, weighted
from filtrun.method import Method
from filtrun.metrics import image as quality
from filtrun.options import opt
from filtrun.task import Metric, Task
from filtrun.tasks.pair import Pair, conditions, pair, result
from filtrun.tiles import pad_to, tiled

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Batch, Data
    from filtrun.data.image_set import ImageData

QUALITY = {
    "psnr": Metric("PSNR", "higher", "peak signal-to-noise ratio in dB, per image, then the mean", ".2f"),
    "ssim": Metric("SSIM", "higher", "structural similarity, 11x11 Gaussian window", ".4f"),
    "ms_ssim": Metric("MS-SSIM", "higher", "structural similarity over five scales", ".4f"),
    "l1": Metric("L1", "lower", "mean absolute difference of values in [0, 1]", ".4f"),
    "delta_e": Metric("deltaE", "lower", "CIE 1976 colour difference", ".2f"),
    "delta_e2000": Metric("deltaE 2000", "lower", "CIEDE2000 colour difference", ".2f"),
    "lpips": Metric("LPIPS", "lower", "learned perceptual distance (AlexNet)", ".4f"),
    "input_psnr": Metric("PSNR of the input", "higher", "what doing nothing gives, dB", ".2f"),
    "gain": Metric("gain", "higher", "PSNR above that of the input, dB", ".2f"),
}


@dataclass
class ImageToImage(Task):
    """Restore or transform images. A subclass says how an input is made from a clean image (`degrade`).

    Training sees crops of tiles, degraded on the device with draws from torch's global generator (the runner seeds it
    for every step), or given pairs. Evaluation takes whole images one by one; the degradation of test image `i` is
    drawn from a CPU generator seeded with (degrade_seed, i), so it is the same for every run, device and model.

    A model's forward is called with x, and by name with `mask` and `sigma` where it takes them. Of a tuple it returns
    the last entry counts, of a dict the entry "output". Attributes a model may have: `multiple` (sides must be
    multiples of it; the image is mirrored to fill up), `tileable` (False: never cut into tiles).
    """

    losses: dict[str, float] = opt({"l1": 1.0}, "loss terms and their weights, see filtrun.losses; 0 leaves one out")
    model_losses: dict[str, float] = opt({}, "weights of the model's own loss terms, by name; 1 where not named")
    crop: int = opt(64, "side of the target in training, in pixels; 0: the whole tile", low=0)
    split: str = opt("test", "images the reported numbers are from", choices=("test", "val"))
    eval_images: int = opt(0, "evaluate this many images, the first; 0: all", low=0)
    degrade_seed: int = opt(0, "seed of the test images' degradation", low=0)
    measure: str = opt("rgb", "what PSNR and SSIM compare: all channels, or luma", choices=("rgb", "y"))
    border: int = opt(0, "pixels at each side of a test image that do not count", low=0)
    round8: bool = opt(True, "clip outputs to [0, 1] and round them to 8 bits before measuring")
    tile_above: int = opt(4_000_000, "input pixels above which an image is computed in tiles; 0: never", low=0)
    tile: int = opt(512, "side of the tiles", low=32)
    overlap: int = opt(64, "pixels neighbouring tiles share; exact for networks that see a quarter of it", low=0)
    show_images: int = opt(4, "test images in the sample sheet", low=0)
    extras: list[str] = opt([], "more numbers: ms_ssim, l1, delta_e, delta_e2000, lpips")

    kind: ClassVar[str] = ""
    training_options: ClassVar[tuple[str, ...]] = ("losses", "model_losses", "crop")
    metrics: ClassVar[dict[str, Metric]] = QUALITY
    reported: ClassVar[tuple[str, ...]] = ("psnr", "ssim")
    ratio: ClassVar[int] = 1
    margin: ClassVar[int] = 0
    """Target pixels around a training crop that only the degradation sees."""

    def __post_init__(self) -> None:
        optional = ("ms_ssim", "l1", "delta_e", "delta_e2000", "lpips")
        for name in self.extras:
            if name not in optional:
                raise unknown("metric of task.extras", name, optional)
        check_losses(self.losses)
        if self.overlap > self.tile // 2:
            raise UserError(f"task.overlap={self.overlap} must be at most half of task.tile={self.tile}")

    # -- to be written by a task ------------------------------------------------------------------------------------
    def degrade(self, clean: Tensor, generator: torch.Generator | None) -> Pair:
        """Input and target from clean images (N, C, H, W) in [0, 1].

        Args:
            generator: where random draws come from; None: torch's global one of the images' device.
        """
        raise NotImplementedError

    def given(self, x: Tensor, y: Tensor, generator: torch.Generator | None) -> Pair:
        """Input and target of a paired data set, as the task wants them."""
        return pair(x, y)

    def protocol(self) -> dict[str, Any]:
        """How inputs are made, in words, for the record."""
        return {}

    # -- training ---------------------------------------------------------------------------------------------------
    def check_data(self, data: Data) -> None:
        from filtrun.data.image_set import ImageData

        if not isinstance(data, ImageData):
            raise UserError(
                f"task={self.kind} works on photographs, and data={data.name} holds labelled images; "
                "use data=photos, data=images or data=pairs"
            )
        if data.paired and data.ratio != self.ratio:
            raise UserError(f"task={self.kind} needs pairs with data.ratio={self.ratio}, but data.ratio={data.ratio}")
        if self.crop + 2 * self.margin > data.patch:
            raise UserError(
                f"task.crop={self.crop} needs tiles of {self.crop + 2 * self.margin} pixels; "
                f"set data.patch to that or more (it is {data.patch})"
            )

    def prepare(self, run: Run) -> None:
        """Raise UserError, before anything trains, for a test image that is too small to be measured."""
        if not run.trainer.evaluate:
            return
        images, data = self.images(run), run.data
        sizes = getattr(data, "sizes", {}).get(self.split, [])
        least = quality.SSIM_WINDOW + 2 * self.border
        for picture, size in zip(images.pictures[: self.eval_images or None], sizes, strict=False):
            if min(n - n % self.ratio for n in size) < least:
                raise UserError(
                    f"{picture.files[-1]} has {size[1]}x{size[0]} pixels, too few to be measured: SSIM needs {least} a "
                    "side; take it out of the test set"
                )

    def sizes(self, data: Data) -> dict[str, Any]:
        """As for any task, with the side of a training input as the image size."""
        return super().sizes(data) | {"image_size": (self.crop or data.image_size) // self.ratio}

    def augment(self, data: Data) -> CropTurn:
        side = self.crop + 2 * self.margin if self.crop else 0
        return CropTurn(side, self.ratio if self.paired(data) else 1, data.flip, getattr(data, "rotate", False))

    def paired(self, data: Data) -> bool:
        """Whether the data set has targets of its own."""
        return bool(getattr(data, "paired", False))

    def make_pair(self, run: Run, batch: Batch, generator: torch.Generator | None = None) -> Pair:
        """The pair of a training batch: degraded now, or taken apart if the data set has pairs."""
        if not self.paired(run.data):
            made = self.degrade(batch.x, generator)
        else:
            channels = batch.x.shape[1] // 2
            x, y = batch.x[:, :channels], batch.x[:, channels:]
            made = self.given(x[..., :: self.ratio, :: self.ratio], y, generator)
        made.index = batch.index
        return made

    def forward(self, run: Run, made: Pair) -> Any:
        """What the network returns for a pair, as it is."""
        return run.net(made.x, **{name: getattr(made, name) for name in conditions(run.model, made)})

    def loss_terms(self, run: Run, made: Pair, output: Any) -> dict[str, Tensor]:
        """Weighted loss terms by name: the task's and the model's own; their sum is the loss."""
        terms = weighted(self.losses, result(output).float(), made.y)
        own = model_terms(self.model_losses, run.model, output, made.y, made)
        return terms | {f"model_{name}": term for name, term in own.items()}

    def loss(self, run: Run, batch: Batch) -> Tensor:
        made = self.make_pair(run, batch)
        output = self.forward(run, made)
        run.shared["pair"], run.shared["output"] = made, output  # for methods that add terms
        terms = [t.float() for t in self.loss_terms(run, made, output).values()]
        return torch.stack(terms).sum() if terms else self.no_loss(run, output)

    def no_loss(self, run: Run, output: Any) -> Tensor:
        """A loss of 0 without gradient, where neither the task nor the model has a term.

        Raises:
            UserError: no method of the run makes a loss either.
        """
        if all(type(method).loss is Method.loss for method in run.methods):
            raise UserError(
                "there is nothing to train on: no weight of task.losses is above 0, and the model has no loss of its "
                f"own with a weight above 0; set one of task.losses ({', '.join(LOSSES)}), as in task.losses.l1=1"
            )
        return result(output).float().sum() * 0

    # -- whole images -----------------------------------------------------------------------------------------------
    def restore(self, run: Run, made: Pair) -> Tensor:
        """The model's image for a pair of any size (1, C', r * H, r * W), in tiles when it is large."""
        model = run.model
        names = conditions(model, made)
        spatial = [name for name in names if getattr(made, name).ndim == 4]
        flat = {name: getattr(made, name) for name in names if name not in spatial}
        multiple = int(getattr(model, "multiple", 1))

        def network(*parts: Tensor) -> Tensor:
            named = dict(zip(spatial, parts[1:], strict=True)) | flat
            return result(run.net(parts[0], **named))

        inputs = [made.x, *(getattr(made, name) for name in spatial)]
        height, width = made.x.shape[-2:]
        if self.tile_above and height * width > self.tile_above and getattr(model, "tileable", True):
            out = tiled(network, *inputs, tile=self.tile, overlap=self.overlap, ratio=self.ratio, multiple=multiple)
        else:
            out = network(*(pad_to(x, multiple) for x in inputs))
            out = out[..., : height * self.ratio, : width * self.ratio]
        if out.shape[-2:] != (height * self.ratio, width * self.ratio):
            raise UserError(
                f"task={self.kind} needs outputs {self.ratio} times the input's {height}x{width} pixels, "
                f"but the model gives {out.shape[-2]}x{out.shape[-1]}"
            )
        return self.composite(made, out.float())

    def composite(self, made: Pair, out: Tensor) -> Tensor:
        """The image that is measured, from the model's."""
        return out

    def baseline(self, made: Pair) -> Tensor:
        """The input as an image of the target's size: what doing nothing gives."""
        return made.x

    def colours(self, made: Pair, image: Tensor) -> Tensor:
        """An output or target of the model's colour space as RGB or grey, for people."""
        return image

    def apply(self, run: Run, image: Tensor) -> Tensor:
        """What the trained model makes of a user's own image (1, C, H, W) in [0, 1]; nothing is degraded first."""
        made = self.given(image, image, None)
        return self.colours(made, self.restore(run, made)).clamp(0, 1)

    # -- evaluation -------------------------------------------------------------------------------------------------
    def test_pairs(self, run: Run, number: int, image: Tensor, target: Tensor | None) -> Iterator[tuple[str, Pair]]:
        """(bucket, pair) for test image `number`; the bucket is empty unless metrics are also given by bucket."""
        generator = torch.Generator().manual_seed(mix_seed(self.degrade_seed, number))
        if target is None:
            yield "", self.degrade(image, generator)
        else:
            yield "", self.given(image, target, generator)

    def measured(self) -> list[str]:
        """Names of the metrics, without buckets."""
        return [*self.reported, *(name for name in self.extras if name not in self.reported)]

    def compare(self, image: Tensor, target: Tensor, names: list[str], grey: bool = False) -> dict[str, float]:
        """Metrics of one image (1, C, H, W) against its target; `grey`: its file has one channel, so that its values
        are measured and not their studio-range luma."""
        if self.round8:
            image = quality.round8(image)
        image, target = (quality.crop_border(t, self.border).double() for t in (image, target))
        lit = (image, target)
        if self.as_luma(image):
            lit = quality.luma(image), quality.luma(target)
            lit = (quality.full_range(lit[0]), quality.full_range(lit[1])) if grey else lit
        found: dict[str, float] = {}
        for name in names:
            if name in ("psnr", "ssim", "ms_ssim"):
                if name == "ms_ssim" and min(image.shape[-2:]) < 161:
                    continue
                found[name] = float(getattr(quality, name)(*lit))
            elif name == "l1":
                found[name] = float(quality.mae(image, target))
            elif name in ("delta_e", "delta_e2000") and image.shape[1] == 3:
                function = quality.delta_e76 if name == "delta_e" else quality.delta_e2000
                found[name] = float(function(image, target))
            elif name == "lpips" and (lpips := quality.lpips_metric(str(image.device))) is not None:
                found[name] = float(lpips(image, target))
        return found

    def as_luma(self, image: Tensor) -> bool:
        """Whether PSNR and SSIM are taken of the luma of `image`."""
        return self.measure == "y"

    def evaluate(self, run: Run) -> dict[str, float]:
        images = self.images(run)
        count = min(len(images), self.eval_images or len(images))
        names = list(self.metrics)
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        for number in range(run.fabric.global_rank, count, run.fabric.world_size):
            for name, value in self._measure(run, images, number):
                column = names.index(name)
                sums[0, column] += value
                sums[1, column] += 1
        everyone: Any = run.fabric.all_reduce(sums.to(run.device), reduce_op="sum")
        sums = everyone.cpu()
        return {name: (sums[0, i] / sums[1, i]).item() for i, name in enumerate(names) if sums[1, i]}

    def _measure(self, run: Run, images: Any, number: int) -> Iterator[tuple[str, float]]:
        _, image, target = images[number]
        on = [None if t is None else t.to(run.device) for t in (image, target)]
        assert on[0] is not None
        grey = images.grey(number)
        for bucket, made in self.test_pairs(run, number, on[0], on[1]):
            found = self.compare(self.restore(run, made), made.y, self.measured(), grey)
            before = self.compare(self.baseline(made), made.y, ["psnr"], grey)["psnr"]
            found |= {"input_psnr": before, "gain": found["psnr"] - before}
            for name, value in found.items():
                yield name, value
                if bucket and f"{name}_{bucket}" in self.metrics:
                    yield f"{name}_{bucket}", value

    def images(self, run: Run) -> Any:
        """The whole images numbers are reported on."""
        data: ImageData = run.data  # type: ignore[assignment]
        return data.images(self.split)

    def probe(self, run: Run) -> Tensor:
        split = run.data.split(self.split, "all")
        batch = split.batch(torch.arange(min(4, len(split)))).to(run.device)
        side = self.crop + 2 * self.margin
        if self.crop:
            top, left = ((n - side) // 2 // self.ratio * self.ratio for n in batch.x.shape[-2:])
            batch.x = batch.x[..., top : top + side, left : left + side]
        made = self.make_pair(run, batch, torch.Generator().manual_seed(mix_seed(self.degrade_seed, 0)))
        return result(self.forward(run, made)).float()

    def show(self, run: Run, path: Path) -> bool:
        from filtrun.images import save_grid

        images, rows = self.images(run), []
        cells: list[list[Tensor]] = []
        for number in range(min(self.show_images, len(images))):
            name, image, target = images[number]
            target = None if target is None else target.to(run.device)
            _, made = next(iter(self.test_pairs(run, number, image.to(run.device), target)))
            drawn: list[Tensor] = [
                self.seen(made),
                self.colours(made, self.restore(run, made)),
                self.colours(made, made.y),
            ]
            rows.append(name)
            cells.append([torch.clamp(t, 0, 1).cpu() for t in drawn])
        if not cells:
            return False
        side = min(256, *(n for row in cells for n in row[-1].shape[-2:]))
        flat = [_centre(t, side) for row in cells for t in row]
        if run.fabric.global_rank == 0:
            save_grid(torch.cat(flat), path, columns=3, rows=rows, titles=["input", "output", "ground truth"])
        return True

    def seen(self, made: Pair) -> Tensor:
        """The input for people, in colour and of the target's size."""
        return self.colours(made, self.baseline(made))

    def notes(self, run: Run) -> dict[str, Any]:
        images = self.images(run)
        count = min(len(images), self.eval_images or len(images))
        missing = "lpips" in self.measured() and quality.lpips_metric(str(run.device)) is None
        tiles = f"in tiles of {self.tile} pixels above {self.tile_above} input pixels" if self.tile_above else "whole"
        return {
            "split": self.split,
            "images": count,
            "input": "given pairs" if self.paired(run.data) else self.protocol(),
            "measured_on": self.measured_on(),
            "mean": "per image, then over images",
            "computed": tiles,
            **({} if self.paired(run.data) else {"seed_rule": f"a CPU generator seeded with ({self.degrade_seed}, i)"}),
            **({"lpips": "not measured: no weights on this machine"} if missing else {}),
        }

    def measured_on(self) -> str:
        """The values metrics compare, in words."""
        space = "BT.601 studio-range luma (grey files: as they are)" if self.measure == "y" else "all channels"
        rounding = "8-bit rounded" if self.round8 else "not rounded"
        return f"{space}, {rounding}, {self.border} border pixels left out"

    def training_key(self) -> dict[str, Any]:
        own = {f.name for f in fields(self)} - {f.name for f in fields(ImageToImage)}
        return super().training_key() | {name: getattr(self, name) for name in sorted(own)}


def _centre(image: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` pixels of (1, C, H, W), as RGB."""
    top, left = ((n - side) // 2 for n in image.shape[-2:])
    image = image[..., top : top + side, left : left + side]
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image
