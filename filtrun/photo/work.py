"""Many photographs through a trained model: while one is computed, the next is read and the one before is written."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from filtrun.aside import Aside
from filtrun.errors import RunFailure, UserError
from filtrun.photo.read import MAX_PIXELS, Photo, read_photo
from filtrun.photo.restore import as_input, as_output, restored
from filtrun.photo.write import depth, write_photo

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.photo.masks import Masks
    from filtrun.photo.names import Job

TOGETHER = 1 << 19
"""Input pixels of images of one size that go through the model at once."""


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
    """Reads, restores and writes images; those of one size and few pixels go through the model in groups.

    A thread reads one image ahead, another one writes the group before: of images too large for a group, one is being
    read, one computed and one written, never more. What is told, and its order, are as if each image (or group) were
    read, computed and written before the next: what concerns the one being written is told when it is through.

    Attributes:
        advance: called when an image is through.
        say: prints one line.
        written, failed: images so far.
    """

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
    reader: Aside[Item | UserError] = field(default_factory=lambda: Aside("read"))
    writer: Aside[list[list[str] | Exception]] = field(default_factory=lambda: Aside("write"))
    stop: threading.Event = field(default_factory=threading.Event)

    def all(self, jobs: Sequence[Job]) -> None:
        """Process images; what goes wrong with one is said and does not stop the others.

        Raises RunFailure when the disk is full. At KeyboardInterrupt the image that is being written is given up.
        """
        with (
            warnings.catch_warnings(),  # reading sets filters of the whole process: here they are put back
            contextlib.closing(self.reader),
            contextlib.closing(self.writer),
        ):
            try:
                self._all(jobs)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    self.stop.set()
                with contextlib.suppress(BaseException):  # what ended it is what is told last
                    self.settle()
                raise

    def _all(self, jobs: Sequence[Job]) -> None:
        due = True  # whether it is the turn of what is being written to be told
        for found in self.ahead(jobs):
            if isinstance(found, UserError):
                if due:
                    self.settle()
                self.fail(str(found))
                self.advance()
                continue
            due = True
            if self.waiting and not self.fits(found):
                self.flush()
            self.waiting.append(found)
            if 2 * found.x[0, 0].numel() > TOGETHER:  # no other will fit: no need to wait for the next one
                self.flush()
                due = False  # a file after it that cannot be read is named first
        self.flush()
        self.settle()

    def ahead(self, jobs: Sequence[Job]) -> Iterator[Item | UserError]:
        """The images, or why there is none, each read while the caller works on the one before."""
        for job in jobs:
            found = self.reader.wait()
            self.reader.start(self.read, job)
            if found is not None:
                yield found
        found = self.reader.wait()
        if found is not None:
            yield found

    def read(self, job: Job) -> Item | UserError:
        """The image and its mask, or what is wrong with the file, which is named."""
        try:
            photo = read_photo(job.source)
            height, width = photo.size
            ratio = int(getattr(self.run.task, "ratio", 1))
            if height * width * ratio**2 > MAX_PIXELS:
                told = f"would grow to {width * ratio}x{height * ratio} pixels"
                return UserError(f"{job.source} {told}; the most that is written is {MAX_PIXELS:,}")
            mask = None if self.masks is None else self.masks.of(photo, job.name)
            return Item(job, photo, *as_input(photo, display=self.display), mask)
        except UserError as error:
            return error

    def fits(self, item: Item) -> bool:
        """Whether an image can go through the model together with those that wait."""
        first = self.waiting[0].x
        return item.x.shape == first.shape and (len(self.waiting) + 1) * first[0, 0].numel() <= TOGETHER

    def flush(self) -> None:
        """Compute what waits, tell how the writing before went, and begin to write this."""
        made = self.made()
        self.settle()
        if made:
            self.writer.start(self.write, made)

    def made(self) -> list[tuple[Job, Photo | UserError]]:
        """What the model makes of the images that wait, or why there is nothing."""
        items, self.waiting = self.waiting, []
        if not items:
            return []
        try:
            results: list[Tensor | Exception] = list(self.restore(items))
        except (UserError, RuntimeError, MemoryError, ValueError) as error:
            results = [error] if len(items) == 1 else [self.alone(item) for item in items]
        return [(item.job, self.output(item, result)) for item, result in zip(items, results, strict=True)]

    def alone(self, item: Item) -> Tensor | Exception:
        """The result of one image, or why there is none."""
        try:
            return self.restore([item])[0]
        except (UserError, RuntimeError, MemoryError, ValueError) as error:
            return error

    def restore(self, items: list[Item]) -> Tensor:
        """(N, C, r * H, r * W) in [0, 1]."""
        masks = [item.mask for item in items if item.mask is not None]
        inputs = [item.x for item in items]
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs)  # no copy of a large one
        return restored(self.run, x, torch.cat(masks) if masks else None)

    def output(self, item: Item, result: Tensor | Exception) -> Photo | UserError:
        """The photograph to be written, with what the one that was read carried, or why there is none."""
        photo, job = item.photo, item.job
        if isinstance(result, Exception):
            return UserError(f"{job.source}: {(str(result) or type(result).__name__).splitlines()[0]}")
        kind = np.dtype(np.uint16) if self.display and photo.pixels.dtype == np.float32 else photo.pixels.dtype
        try:
            pixels, alpha = as_output(photo, result, item.scale, depth(job.format, kind), display=self.display)
        except (UserError, MemoryError) as error:
            return UserError(str(error) or f"{job.source} does not fit in memory")
        return replace(photo, pixels=pixels, alpha=alpha)

    def write(self, results: list[tuple[Job, Photo | UserError]]) -> list[list[str] | Exception]:
        """Write results one after another: for each what could not be kept, or why it is skipped.

        A RunFailure (the disk is full) is the last of them.
        """
        told: list[list[str] | Exception] = []
        for job, photo in results:
            if isinstance(photo, UserError):
                told.append(photo)
                continue
            try:
                notes = write_photo(
                    job.target, job.format, photo.pixels, photo.alpha, exif=photo.exif, icc=photo.icc, dpi=photo.dpi,
                    quality=self.quality, replace=self.force, stop=self.stop,
                )  # fmt: skip
                told.append([f"{job.source}: {note}" for note in (*photo.notes, *notes)])
            except UserError as error:
                told.append(error)
            except MemoryError as error:
                told.append(UserError(str(error) or f"{job.source} does not fit in memory"))
            except RunFailure as error:
                return [*told, error]
        return told

    def settle(self) -> None:
        """Wait for the last writing and tell how it went. Raises RunFailure when the disk is full."""
        for outcome in self.writer.wait() or []:
            if isinstance(outcome, RunFailure):
                raise RunFailure(f"{outcome} ({self.written} images are written)") from outcome
            if isinstance(outcome, Exception):
                self.fail(str(outcome))
            else:
                self.written += 1
                for note in outcome:
                    self.say(note)
            self.advance()

    def fail(self, reason: str) -> None:
        """Count and name what was skipped."""
        self.failed += 1
        self.say(f"skipped: {reason}")
