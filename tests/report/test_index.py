from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from filtrun.cells import cell_digest
from filtrun.report import index
from filtrun.report.index import INDEX, find, read_records


@pytest.fixture
def folder(records, tmp_path, monkeypatch):
    """Five records in two folders, in a place where an index is written from the first on."""
    monkeypatch.setattr(index, "LEAST", 1)
    for n in range(5):
        config = {"seed": n, "scale": "laptop", "trainer": {"lr": 0.1, "steps": 3}, "method": {"m": {"rank": n // 2}}}
        records.write_record(
            tmp_path / ("a" if n < 3 else "b") / f"r{n}",
            config=config,
            seed=n,
            status="failed" if n == 4 else "finished",
        )
    return tmp_path


def truth(folder):
    """The records, read one by one."""
    paths = sorted(folder.glob("*/*/record.json"))
    return [
        (made := json.loads(p.read_text())) | {"folder": str(p.parent), "cell": cell_digest(made["config"])}
        for p in paths
    ]


@pytest.fixture
def opened(monkeypatch):
    """The places whose record was read from its file."""
    places = []
    entry = index._entry
    monkeypatch.setattr(index, "_entry", lambda root, place, *rest: places.append(place) or entry(root, place, *rest))
    return places


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_second_read_opens_no_record_and_gives_the_same(folder, opened):
    want = truth(folder)
    assert read_records(folder) == want and len(opened) == 5
    assert read_records(folder) == want and len(opened) == 5
    assert [list(r["config"]) for r in read_records(folder)] == [list(r["config"]) for r in want]
    assert [r["seed"] for r in read_records(folder, finished=True)] == [0, 1, 2, 3]


def test_what_changed_came_or_went_is_seen_at_once(records, folder, opened):
    read_records(folder)
    opened.clear()
    change(folder / "a" / "r0" / "record.json", name="other")
    records.write_record(folder / "b" / "r9", seed=9)
    (folder / "a" / "r1" / "record.json").unlink()
    assert read_records(folder) == truth(folder) and sorted(opened) == ["a/r0", "b/r9"]
    opened.clear()
    assert read_records(folder) == truth(folder) and opened == []
    path = folder / "a" / "r2" / "record.json"
    before, text = path.stat(), path.read_text()
    work = path.with_name("work")  # same time and size, but another file
    work.write_text(text.replace("sara-digits", "lora-digits"))
    os.utime(work, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(work, path)
    assert read_records(folder)[1]["name"] == "lora-digits-unet"


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text", "other code", "folder"])
def test_a_broken_index_is_made_anew(folder, opened, harm, monkeypatch):
    want = read_records(folder)
    path = folder / INDEX
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    harmed = {"cut": whole[:-9], "flip": flipped, "empty": b"", "text": b"[1]\nno index", "other code": whole}
    if harm == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(harmed[harm])
    if harm == "other code":
        monkeypatch.setattr(index, "_code", lambda: 7)
    opened.clear()
    assert read_records(folder) == want and len(opened) == 5
    if harm != "folder":
        assert read_records(folder) == want and len(opened) == 5
    assert sorted(p.name for p in folder.iterdir()) == [INDEX, "a", "b"]  # no work file is left


def test_a_folder_that_cannot_be_written_works_without(folder, monkeypatch):
    def refuse(*words, **more):
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "replace", refuse)
    assert read_records(folder) == truth(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]


def test_few_records_leave_no_trace(folder, monkeypatch):
    monkeypatch.setattr(index, "LEAST", 6)
    assert len(read_records(folder)) == 5 and not (folder / INDEX).exists()


def test_broken_records_are_named_and_not_read_again(folder, opened):
    (folder / "a" / "r0" / "record.json").write_text("{")
    change(folder / "a" / "r1" / "record.json", metrics=[1])
    for _ in range(2):
        found = find(folder)
        assert found.broken == [folder / "a" / f"r{n}" / "record.json" for n in (0, 1)]
        assert [r["seed"] for r in found.records] == [2, 3, 4]
    assert len(opened) == 5


def test_where_records_are_looked_for(records, folder):
    records.write_record(folder / "a" / "r0" / "before-2026", seed=70)  # kept aside by force=true
    records.write_record(folder / ".hidden" / "r", seed=71)
    (folder / "b" / "loop").symlink_to(folder)
    assert [r["seed"] for r in read_records(folder)] == [0, 1, 2, 3, 4]
    records.write_record(folder.parent / f"{folder.name}-far" / "r", seed=72)
    (folder / "c").symlink_to(folder.parent / f"{folder.name}-far")
    assert [r["seed"] for r in read_records(folder)] == [0, 1, 2, 3, 4, 72]
    assert [r["folder"] for r in read_records(folder / "a" / "r2")] == [str(folder / "a" / "r2")]
    assert read_records(folder / "nowhere") == []


def test_two_processes_at_once(folder):
    code = (
        "import sys\nfrom filtrun.report import index\nindex.LEAST = 1\n"
        "for n in range(60):\n"
        "    assert len(index.read_records(sys.argv[1])) == 5\n"
        "    if n % 3 == 0: (index.Path(sys.argv[1]) / index.INDEX).unlink(missing_ok=True)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE) for _ in range(2)]
    for each in both:
        _, error = each.communicate()
        assert each.returncode == 0, error.decode()
    assert read_records(folder) == truth(folder)
    assert sorted(p.name for p in folder.iterdir() if p.name != INDEX) == ["a", "b"]
