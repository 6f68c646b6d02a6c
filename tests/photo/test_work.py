"""Reading, computing and writing at once: files and messages as one after another, bounds, errors, interruption."""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from filtrun.errors import RunFailure, UserError
from filtrun.photo import names, work
from filtrun.photo.read import read_photo
from filtrun.photo.restore import as_input, as_output, restored
from filtrun.photo.work import Work
from filtrun.photo.write import write_photo
from filtrun.tasks.denoise import Denoise

LIMIT = 30


class Darken(nn.Module):
    """x / 2; what is white all over is refused. `seen` are the shapes it got."""

    def __init__(self):
        super().__init__()
        self.seen, self.before = [], lambda x: None

    def forward(self, x):
        self.before(x)
        self.seen.append(tuple(x.shape))
        if (x.amin((1, 2, 3)) == 1).any():
            raise RuntimeError("too bright\nfor this model")
        return x / 2


@pytest.fixture
def model():
    return Darken()


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Images of 24 x 32 go alone, four of 12 x 16 together."""
    monkeypatch.setattr(work, "TOGETHER", 4 * 12 * 16)


def make(folder, kinds, cat):
    """One file a kind: large or small, ``+`` with alpha (which JPEG loses), ``bad``, ``white``."""
    for i, kind in enumerate(kinds):
        path = folder / f"{i:02d}.png"
        if kind == "bad":
            path.touch()
            continue
        size = (slice(24), slice(32)) if kind.startswith(("large", "white")) else (slice(12), slice(16))
        pixels = np.roll(cat, i, 0)[size] if kind != "white" else np.full((24, 32, 3), 255, np.uint8)
        write_photo(path, "png", pixels, pixels[..., :1] if kind.endswith("+") else None)
    return names.plan([(path, Path(path.name)) for path in sorted(folder.iterdir())], folder / "out", "jpeg",
                      display=False)  # fmt: skip


def run_of(model):
    return SimpleNamespace(
        task=Denoise(), data=SimpleNamespace(channels=3), model=model, net=model, device=torch.device("cpu")
    )


def start(model, said, *, force=False):
    return Work(run_of(model), None, False, None, force, lambda: said.append("|"), said.append)


def one_after_another(model, jobs, out):
    """Lines and files as a program without threads makes them: read, until one does not fit; compute; write."""
    run, told, waiting = run_of(model), [], []

    def flush():
        photos = [photo for _, photo in waiting]
        inputs = [as_input(photo, display=False)[0] for photo in photos]
        try:
            results = list(restored(run, torch.cat(inputs))) if photos else []
        except RuntimeError:
            results = [None] * len(photos)  # white images are large and so alone
        for (job, photo), result in zip(waiting, results, strict=True):
            if result is None:
                told.append(f"skipped: {job.source}: too bright")
            else:
                pixels, alpha = as_output(photo, result, 1.0, np.dtype(np.uint8), display=False)
                notes = write_photo(out / job.target.name, "jpeg", pixels, alpha, dpi=photo.dpi)
                told.extend(f"{job.source}: {note}" for note in notes)
            told.append("|")
        waiting.clear()

    for job in jobs:
        try:
            photo = read_photo(job.source)
        except UserError as error:
            told.extend([f"skipped: {error}", "|"])
            continue
        size = waiting[0][1].size if waiting else photo.size
        if waiting and (photo.size != size or (len(waiting) + 1) * size[0] * size[1] > work.TOGETHER):
            flush()
        waiting.append((job, photo))
    flush()
    return told


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


@pytest.mark.parametrize("seed", range(12))
def test_files_and_messages_are_those_of_one_after_another(tmp_path, cat, model, monkeypatch, seed):
    draw = random.Random(seed)
    kinds = draw.choices(["large", "large+", "small", "small+", "bad", "white"], [2, 4, 2, 4, 4, 1], k=14)
    jobs = make(tmp_path, kinds, cat)
    expected = one_after_another(model, jobs, tmp_path / "expected")
    shapes, model.seen = model.seen, []
    pauses = random.Random(seed)

    def at_any_pace(function):
        def paced(*arguments, **options):
            time.sleep(pauses.choice((0, 0, 0.01)))
            return function(*arguments, **options)

        return paced

    for name in ("read_photo", "restored", "write_photo"):
        monkeypatch.setattr(work, name, at_any_pace(getattr(work, name)))
    said = []
    done = start(model, said)
    done.all(jobs)
    assert said == expected and model.seen == shapes
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert done.failed == sum(line.startswith("skipped") for line in said) and done.written == 14 - done.failed
    assert said.count("|") == 14


def test_a_large_image_is_told_after_the_unreadable_ones_behind_it(tmp_path, cat, model):
    jobs = make(tmp_path, ["large+", "bad", "large+", "bad", "small+", "bad"], cat)
    said = []
    start(model, said).all(jobs)
    told = [re.search(r"(\d\d)\.png", line)[1] for line in said if line != "|"]
    assert told == ["01", "00", "03", "02", "05", "04"]


def test_one_is_written_while_the_next_is_computed_and_the_one_after_it_read(tmp_path, cat, model, monkeypatch):
    """Each of the three waits until the other two are under way: one after another, this would not end."""
    jobs = make(tmp_path, ["large"] * 5, cat)
    meeting = threading.Barrier(3, timeout=LIMIT)
    read, write = work.read_photo, work.write_photo
    computed = []

    def meets(function, number):
        def at_the_meeting(*arguments, **options):
            if Path(arguments[0]).stem == number:
                meeting.wait()
            return function(*arguments, **options)

        return at_the_meeting

    def second(x):
        computed.append(1)
        if len(computed) == 2:
            meeting.wait()

    monkeypatch.setattr(work, "write_photo", meets(write, "00"))
    monkeypatch.setattr(work, "read_photo", meets(read, "02"))
    model.before = second
    done = start(model, [])
    done.all(jobs)
    assert done.written == 5 and not meeting.broken


def test_no_more_than_one_is_read_ahead_and_one_waits_to_be_written(tmp_path, cat, model, monkeypatch):
    jobs = make(tmp_path, ["large"] * 8, cat)
    read, write, go = work.read_photo, work.write_photo, threading.Event()
    counts = {"read": 0, "written": 0}

    def counted(path):
        counts["read"] += 1
        return read(path)

    def held(*arguments, **options):
        assert go.wait(LIMIT)
        counts["written"] += 1
        return write(*arguments, **options)

    monkeypatch.setattr(work, "read_photo", counted)
    monkeypatch.setattr(work, "write_photo", held)
    done = start(model, [])
    thread = threading.Thread(target=done.all, args=(jobs,))
    thread.start()
    try:
        end = time.monotonic() + LIMIT
        while (counts["read"] < 3 or len(model.seen) < 2) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)  # time to do more than it should
        assert counts == {"read": 3, "written": 0} and len(model.seen) == 2
    finally:
        go.set()
        thread.join(LIMIT)
    assert counts == {"read": 8, "written": 8} and done.written == 8


def left(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def no_threads():
    return not [t for t in threading.enumerate() if t.name.startswith(("read", "write"))]


def test_one_that_cannot_be_written_is_skipped(tmp_path, cat, model):
    jobs = make(tmp_path, ["large"] * 4, cat)
    (tmp_path / "out").mkdir()
    jobs[1].target.write_bytes(b"somebody else's")
    said = []
    done = start(model, said)
    done.all(jobs)
    assert said == ["|", f"skipped: {jobs[1].target} is there already", "|", "|", "|"]
    assert (done.written, done.failed) == (3, 1) and jobs[1].target.read_bytes() == b"somebody else's"
    assert left(tmp_path / "out") == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]


def test_a_full_disk_ends_it_before_the_next_is_written(tmp_path, cat, model, monkeypatch):
    jobs = make(tmp_path, ["large+"] * 5, cat)
    replace, published = os.replace, []

    def full(source, target):
        if len(published) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        published.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    said = []
    with pytest.raises(RunFailure, match=r"02.jpg could not be written: No space left on device \(2 images are wri"):
        start(model, said, force=True).all(jobs)
    assert left(tmp_path / "out") == ["00.jpg", "01.jpg"] and no_threads()
    assert [Path(line.split(":")[0]).name for line in said if line != "|"] == ["00.png", "01.png"]


def test_an_interruption_gives_up_what_is_being_written(tmp_path, cat, model, monkeypatch):
    """The second image is being written when the third one's computation is interrupted."""
    jobs = make(tmp_path, ["large+"] * 5, cat)
    write, writing = work.write_photo, threading.Event()
    said = []
    done = start(model, said)

    def slow(path, *arguments, **options):
        if path.stem == "01":
            writing.set()
            assert done.stop.wait(LIMIT)
        return write(path, *arguments, **options)

    def interrupted(x):
        if len(model.seen) == 2:
            assert writing.wait(LIMIT)
            raise KeyboardInterrupt

    monkeypatch.setattr(work, "write_photo", slow)
    model.before = interrupted
    with pytest.raises(KeyboardInterrupt):
        done.all(jobs)
    assert left(tmp_path / "out") == ["00.jpg"] and done.written == 1 and no_threads()
    assert said == [f"{jobs[0].source}: transparency is laid over white, jpeg has none", "|"]


def test_another_end_lets_what_is_being_written_come_to_its_own(tmp_path, cat, model, monkeypatch):
    jobs = make(tmp_path, ["large"] * 4, cat)
    write, failed = work.write_photo, threading.Event()

    def slow(path, *arguments, **options):
        if path.stem == "01":
            assert failed.wait(LIMIT)
        return write(path, *arguments, **options)

    def fails(x):
        if len(model.seen) == 2:
            failed.set()
            raise RunFailure("lookups cannot be compiled here")

    monkeypatch.setattr(work, "write_photo", slow)
    model.before = fails
    done = start(model, [])
    with pytest.raises(RunFailure, match="cannot be compiled"):
        done.all(jobs)
    assert left(tmp_path / "out") == ["00.jpg", "01.jpg"] and done.written == 2 and no_threads()
