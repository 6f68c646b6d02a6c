"""``filtrun apply RUN IMAGE... --out DIR``: run a trained model on your own images."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filtrun.errors import UserError, closest
from filtrun.record import Record
from filtrun.verbs import Parser
from filtrun.verbs.show import locate

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
    from filtrun.photo.work import Work
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
