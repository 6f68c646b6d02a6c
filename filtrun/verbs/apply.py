"""``filtrun apply RUN IMAGE... --out DIR``: run a trained model on your own images."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filtrun.errors import RunFailure, UserError, closest
from filtrun.record import Record
from filtrun.verbs import Parser
from filtrun.verbs.show import locate

if TYPE_CHECKING:
    from torch import Tensor

    from filtrun.context import Run
    from filtrun.photo.masks import Masks
    from filtrun.photo.names import Job
    from filtrun.photo.read import Photo

TOGETHER = 1 << 19
"""Input pixels of images of one size that go through the model at once."""
FITTING = {
    "classify": "it gives labels, no images; `filtrun show RUN` prints what it measured",
    "inverse": "it solves the inverse problem it was measured on; `filtrun show RUN` prints what it measured",
    "diffuse": "it draws images from noise: use `filtrun sample RUN`",
}
EPILOG = """\
Folders are searched with all below them; results keep its structure. Images keep their size (super-resolution
enlarges), bit depth, transparency, EXIF data and colour profile where the format can; formats that are not written
(GIF, BMP, PPM) become PNG, HDR images become 16-bit PNG when the model maps tones. Masks are white where the hole is.
A colour must be quoted: --mask '#ff00ff'. A tunable model takes knobs.NAME=VALUE beside the images.
"""


def main(argv: Sequence[str]) -> int:
    """Process images; returns 0, or 1 when some could not be. Raises UserError for what concerns the whole call."""
    options, knobs = parse(argv)
    out = Path(options.out).expanduser()
    check_options(options, out)
    folder = locate(options.run)
    task = task_of(Record.read(folder), options.run)

    from filtrun.photo import names
    from filtrun.photo.masks import Masks
    from filtrun.tasks.inpaint import Inpaint
    from filtrun.tasks.tonemap import ToneMap

    fills = issubclass(task, Inpaint)
    if fills and options.mask is None:
        raise UserError(f"{options.run} fills holes: say where they are with --mask FILE, DIR or '#rrggbb'")
    if options.mask is not None and not fills:
        raise UserError(f"{options.run} is a run of task={task.kind}, which takes no --mask")
    masks = None if options.mask is None else Masks(options.mask)
    aside = [out, *([masks.folder] if masks and masks.folder else [])]
    found, problems = names.find(options.images, aside)
    if not found:
        raise UserError("no image found: " + "; ".join(problems[:3]))
    display = issubclass(task, ToneMap)
    jobs = names.plan(found, out, options.format, display=display)
    names.check(jobs, masks.files if masks else [], force=options.force)

    from filtrun.reload import reload

    run, _ = reload(folder, device=options.device)
    if knobs:
        from filtrun.methods.restoration.tunable_layers import set_knobs

        set_knobs(run.model, knobs)
    from filtrun.lut.fused import fused

    with progress(len(jobs)) as (advance, say), run.evaluating(), fused(options.compile):
        work = Work(run, masks, display, options.quality, options.force, advance, say)
        for problem in problems:
            work.fail(problem)
        work.all(jobs)
    count = f"{work.written} image{'' if work.written == 1 else 's'} written"
    print(f"{out}: {count}" + (f", {work.failed} skipped" if work.failed else ""))
    return 1 if work.failed else 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, float]]:
    """(options, knobs by name). Raises UserError for what is neither."""
    parser = Parser("apply", __doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.usage = "%(prog)s RUN IMAGE... --out DIR [options] [knobs.NAME=VALUE ...]"
    parser.add_argument("run", metavar="RUN", help="a run folder, or the name of a folder in outputs/runs")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, folders, quoted patterns")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for the results; made when it is missing")
    parser.add_argument("--mask", metavar="MASK", help="holes to fill: an image, a folder of them by name, '#rrggbb'")
    parser.add_argument("--format", choices=("png", "jpeg", "tiff", "webp"), help="default: that of each image")
    parser.add_argument("--quality", metavar="N", type=int, help="of JPEG and WebP, 1 to 100 (default 95)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--force", action="store_true", help="replace results that exist")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile lookups in 3D tables: seconds at first, then faster (many images)",
    )
    knobs: dict[str, float] = {}
    words = []
    for word in argv:
        turned = re.fullmatch(r"knobs\.(\w+)=(.*)", word)
        if turned is None:
            words.append(word)
            continue
        try:
            knobs[turned[1]] = float(turned[2])
        except ValueError:
            raise UserError(f"{word} must be a number in [0, 1], such as knobs.{turned[1]}=0.5") from None
    options, rest = parser.parse_known_intermixed_args(words)
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        raise UserError(f"{parser.prog}: {rest[0]} is no option{closest(rest[0].partition('=')[0], known)}")
    return options, knobs


def check_options(options: argparse.Namespace, out: Path) -> None:
    """Raise UserError for values that cannot be meant."""
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality} must be from 1 to 100")
    if options.quality is not None and options.format in ("png", "tiff"):
        raise UserError(f"--quality is for JPEG and WebP; {options.format} keeps every value")
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"--out {out}: {place} is a file; a folder is needed")


def task_of(record: Record, run: str) -> Any:
    """The class of the run's task. Raises UserError, naming what fits, when it does not turn images into images."""
    from filtrun.build import resolve
    from filtrun.tasks.image_to_image import ImageToImage

    node = record.config.get("task")
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UserError(f"{run} has no task in its record: the run is {record.status}")
    found = resolve(node["_target_"], record.config.get("trust") or [])
    if not (isinstance(found, type) and issubclass(found, ImageToImage)):
        reason = FITTING.get(record.task, "apply needs a task that turns images into images").replace("RUN", run)
        raise UserError(f"{run} is a run of task={record.task}: {reason}")
    return found


@contextmanager
def progress(count: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """(call after each image, print a line above the bar); the bar is there for several images on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from filtrun.report.units import plain

    console = Console(stderr=True)
    columns = (TextColumn("images"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    bar = Progress(*columns, console=console, disable=count < 2 or not console.is_terminal, transient=True)
    line = bar.add_task("images", total=count)

    def say(text: str) -> None:
        print(f"filtrun: {plain(text)}".encode("utf-8", "replace").decode(), file=sys.stderr)

    with bar:
        yield (lambda: bar.advance(line)), say


@dataclass
class Item:
    """An image that is read and waits for the model."""

    job: Job
    photo: Photo
    x: Tensor
    scale: float
    mask: Tensor | None


@dataclass
class Work:
    """Reads, restores and writes images one after the other; those of one size and few pixels in groups."""

    run: Run
    masks: Masks | None
    display: bool
    quality: int | None
    force: bool
    advance: Callable[[], None]
    say: Callable[[str], None]
    written: int = 0
    failed: int = 0
    waiting: list[Item] = field(default_factory=list)

    def all(self, jobs: Sequence[Job]) -> None:
        """Process images; what goes wrong with one is said and does not stop the others."""
        for job in jobs:
            try:
                item = self.read(job)
            except UserError as error:
                self.fail(str(error))
                self.advance()
                continue
            if self.waiting and not self.fits(item):
                self.flush()
            self.waiting.append(item)
        self.flush()

    def read(self, job: Job) -> Item:
        """The image and its mask. Raises UserError naming the file."""
        from filtrun.photo.read import MAX_PIXELS, read_photo
        from filtrun.photo.restore import as_input

        photo = read_photo(job.source)
        height, width = photo.size
        ratio = int(getattr(self.run.task, "ratio", 1))
        if height * width * ratio**2 > MAX_PIXELS:
            told = f"{width * ratio}x{height * ratio}"
            raise UserError(f"{job.source} would grow to {told} pixels; the most that is written is {MAX_PIXELS:,}")
        mask = None if self.masks is None else self.masks.of(photo, job.name)
        return Item(job, photo, *as_input(photo, display=self.display), mask)

    def fits(self, item: Item) -> bool:
        """Whether an image can go through the model together with those that wait."""
        first = self.waiting[0].x
        return item.x.shape == first.shape and (len(self.waiting) + 1) * first[0, 0].numel() <= TOGETHER

    def flush(self) -> None:
        """Process what waits."""
        items, self.waiting = self.waiting, []
        if not items:
            return
        try:
            results: list[Any] = list(self.restore(items))
        except (UserError, RuntimeError, MemoryError, ValueError) as error:
            results = [error] if len(items) == 1 else [self.alone(item) for item in items]
        for item, result in zip(items, results, strict=True):
            if isinstance(result, BaseException):
                reason = (str(result) or type(result).__name__).splitlines()[0]
                self.fail(f"{item.job.source}: {reason}")
            else:
                self.write(item, result)
            self.advance()

    def alone(self, item: Item) -> Any:
        """The result of one image, or why there is none."""
        try:
            return self.restore([item])[0]
        except (UserError, RuntimeError, MemoryError, ValueError) as error:
            return error

    def restore(self, items: list[Item]) -> Tensor:
        """(N, C, r * H, r * W) in [0, 1]."""
        import torch

        from filtrun.photo.restore import restored

        masks = [item.mask for item in items if item.mask is not None]
        return restored(self.run, torch.cat([item.x for item in items]), torch.cat(masks) if masks else None)

    def write(self, item: Item, result: Tensor) -> None:
        """Write a result with what its photograph carried. Raises RunFailure when the disk is full."""
        import numpy as np

        from filtrun.photo.restore import as_output
        from filtrun.photo.write import depth, write_photo

        photo, job = item.photo, item.job
        kind = np.dtype(np.uint16) if self.display and photo.pixels.dtype == np.float32 else photo.pixels.dtype
        kind = depth(job.format, kind)
        try:
            pixels, alpha = as_output(photo, result, item.scale, kind, display=self.display)
            notes = write_photo(
                job.target, job.format, pixels, alpha, exif=photo.exif, icc=photo.icc, dpi=photo.dpi,
                quality=self.quality, replace=self.force,
            )  # fmt: skip
        except (UserError, MemoryError) as error:
            self.fail(str(error) or f"{job.source} does not fit in memory")
            return
        except RunFailure as error:
            raise RunFailure(f"{error} ({self.written} images are written)") from error
        self.written += 1
        for note in (*photo.notes, *notes):
            self.say(f"{job.source}: {note}")

    def fail(self, reason: str) -> None:
        """Count and name what was skipped."""
        self.failed += 1
        self.say(f"skipped: {reason}")
